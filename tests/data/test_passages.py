"""Long documents are split once, and rankings of passages become rankings of documents."""

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.data.passages import (
    choose_passages,
    read_settings,
    split_documents,
    texts_of,
    to_documents,
    to_passages,
)
from hf_kd_ranking.data.texts import check_same_collection
from hf_kd_ranking.errors import UnknownIdError


@pytest.fixture
def split(tmp_path, tokenizer):
    """split({doc_id: text}, settings, ...): the store of passages, in a folder of the settings."""

    def make(texts: dict[str, str], passages: str, aggregation: str = "max") -> kd.TextStore:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.tsv"
        path.write_text("".join(f"{doc_id}\t{text}\n" for doc_id, text in texts.items()), encoding="utf-8")
        folder = tmp_path / f"{path.stem}-passages"
        return split_documents(kd.TextStore.from_tsv(path), tokenizer, passages, folder, aggregation)

    return make


# ---- Documents to passages ------------------------------------------------------------------------------------------


def test_passages_end_at_sentences_and_overlap_by_the_stride(split):
    text = "apple bread cat dog earth fire. Glass house iron jam king lake moon night"
    # Tokens 0..5 are the first sentence, 6 its point, 7..14 the rest; the window of 8 has the border 7 in its last
    # quarter, the second one none: it ends at a word. A stride of 4 has no sentence in its last quarter.
    assert dict(split({"a": text}, "8/8").items()) == {
        "a#0": "apple bread cat dog earth fire.",
        "a#1": "Glass house iron jam king lake moon night",
    }
    assert dict(split({"a": text}, "8/4").items()) == {
        "a#0": "apple bread cat dog earth fire.",
        "a#1": "earth fire. Glass house iron jam king",
        "a#2": "house iron jam king lake moon night",
    }


def test_document_of_one_passage_keeps_its_id_and_text(split):
    texts = {"1": "  apple   bread . cat ", "2": "", "3": "apple bread cat dog"}
    store = split(texts, "4/2")
    assert dict(store.items()) == texts
    assert store.has_integer_ids
    assert "3#0" in split(texts | {"3": "apple bread cat dog earth"}, "4/2")


def test_words_are_not_cut_where_none_is_too_long(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "ab": 1, "##c": 2, "##d": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    (tmp_path / "texts.tsv").write_text("x\tabc abcd abcd abc\ny\tabcdcdcdcdcd\n")
    store = split_documents(kd.TextStore.from_tsv(tmp_path / "texts.tsv"), tokenizer, "6/6", tmp_path / "store")
    parts = dict(store.items())
    assert [parts["x#0"], parts["x#1"]] == ["abc abcd", "abcd abc"]
    assert "".join(parts[f"y#{number}"] for number in range(2)) == "abcdcdcdcdcd"  # without a border it is cut


@pytest.mark.parametrize(
    "text",
    [
        "苹果很好。面包也很好！猫在哪里？狗在房子里。",
        "كلب في البيت. قطة في الماء؟ ملك تحت الشجرة.",
        "कुत्ता घर में है। बिल्ली पानी में है।",
        "🐕🏠🐈🌊 🐕🏠🐈🌊 🐕🏠🐈🌊",
        "แมวอยู่ในบ้าน หมาอยู่ในน้ำ",
        "one two three " * 9,
    ],
)
def test_every_character_is_in_a_passage(tmp_path, text):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # A token per byte, as in tokenizers that know no word of a language; several tokens share a character.
    alphabet = {symbol: place for place, symbol in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (tmp_path / "texts.tsv").write_text(f"x\t{text.strip()}\n", encoding="utf-8")
    texts = kd.TextStore.from_tsv(tmp_path / "texts.tsv")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for settings in ("9/9", "16/5"):
        store = split_documents(texts, tokenizer, settings, tmp_path / settings.replace("/", "-"))
        place = 0
        for _, part in store.items():
            found = text.find(part, max(0, place - len(part)))
            assert found >= 0
            assert not text[place:found].strip()  # only blanks are left out between two passages
            place = max(place, found + len(part))
        assert not text[place:].strip()


@pytest.mark.parametrize("passages", ["60/70", "0/0", "60/0", "60", "sixty/30", "-60/30"])
def test_settings_that_leave_texts_out_are_refused(passages):
    with pytest.raises(kd.InputError, match="--passages"):
        read_settings(passages)


def test_settings_are_part_of_the_collections_identity(split, tokenizer, tmp_path):
    texts = {"a": "apple bread cat dog earth fire", "b": "moon"}
    stores = {f"{name} {how}": split(texts, name, how) for name in ("4/4", "4/2") for how in ("max", "first")}
    stores["long"] = split(texts, "9/9")
    stores["longer"] = split(texts, "10/9")  # of the same texts
    assert len({store.fingerprint() for store in stores.values()}) == len(stores)
    for store in stores.values():
        assert store.compute_fingerprint() == kd.TextStore.open(store.folder).fingerprint()
    with pytest.raises(kd.InputError, match=r"4 by 4 tokens \(max\).*4 by 2 tokens \(max\)"):
        check_same_collection({name: stores[name].collection for name in ("4/4 max", "4/2 max")})
    whole = kd.TextStore.from_tsv(tmp_path / "0.tsv")
    with pytest.raises(FileExistsError, match="4 by 4"):
        split_documents(whole, tokenizer, "5/4", stores["4/4 max"].folder)
    assert split_documents(whole, tokenizer, "4/4", stores["4/4 max"].folder).aggregation == "max"
    stores["4/4 first"].save(tmp_path / "copy")
    assert kd.TextStore.open(tmp_path / "copy").collection == stores["4/4 first"].collection


def test_ambiguous_input_is_refused(split, tokenizer, tmp_path):
    with pytest.raises(kd.InputError, match=r"'a#0'.*rename"):
        split({"a#0": "apple"}, "4/4")
    with pytest.raises(kd.InputError, match="passages already"):
        split_documents(split({"a": "apple"}, "4/4"), tokenizer, "4/4", tmp_path / "again")
    with pytest.raises(kd.InputError, match="max, first, mean_top3, got 'sum'"):
        split({"a": "apple"}, "4/4", "sum")


# ---- Passages to documents ------------------------------------------------------------------------------------------

PASSAGES = [("b#1", 9.0), ("a#3", 8.0), ("c", 7.0), ("a#0", 4.0), ("b#0", 3.0), ("a#1", 3.0), ("a#2", 2.0)]


@pytest.mark.parametrize(
    "aggregation, expected",
    [
        ("max", [("b", 9.0), ("a", 8.0), ("c", 7.0)]),
        ("first", [("c", 7.0), ("a", 4.0), ("b", 3.0)]),
        ("mean_top3", [("c", 7.0), ("b", 6.0), ("a", 5.0)]),
    ],
)
def test_aggregations_equal_hand_computed_values(aggregation, expected):
    assert to_documents(PASSAGES, aggregation) == expected


def test_candidates_become_all_passages_of_their_documents(split):
    store = split({"a": "apple bread cat dog earth fire", "b#": "moon", "c": "king king king"}, "3/3")
    run = kd.Run({"q": [("c", 3.0), ("a", 2.0), ("b#", 1.0)], "r": [("a#1", 1.0)]})
    expanded = to_passages(run, store, "texts")
    assert expanded == {"q": [("c", 3.0), ("a#0", 2.0), ("a#1", 2.0), ("b#", 1.0)], "r": [("a#1", 1.0)]}
    with pytest.raises(KeyError, match=r"2 of 2 ids are not among the 4 texts: 'a#2', 'x'"):
        to_passages(kd.Run({"q": [("a#2", 1.0), ("x", 1.0), ("a", 0.0)]}), store, "texts")


def test_best_passage_is_judged_as_its_document(split):
    store = split({"a": "apple bread cat dog", "b": "moon king lake night", "c": "king"}, "2/2")
    run = kd.Run({"q": [("c", 3.0), ("a", 2.0), ("b", 1.0)]})
    passages = kd.Run({"q": [("a#1", 5.0), ("c", 4.0), ("a#0", 3.0)]})
    chosen, judged = choose_passages(run, passages, {"q": {"a": 2, "b": 1}}, store)
    assert chosen == {"q": [("c", 4.0), ("a#1", 5.0), ("b#0", 1.0)]}  # of b no passage was scored
    assert judged == {"q": {"a#1": 2, "b#0": 1}}
    for run, qrels in (({"q": [("x", 1.0)]}, {}), ({"q": []}, {"q": {"a": 1, "x": 1}})):
        with pytest.raises(UnknownIdError, match="'x'"):
            choose_passages(kd.Run(run), passages, qrels, store)


def test_texts_of_documents_are_those_of_all_their_passages(split, tmp_path):
    store = split({"a": "apple bread cat", "b": "moon"}, "2/2")
    assert texts_of(store, ["b", "a"]) == (["moon", "apple bread", "cat"], [1, 2])
    assert texts_of(kd.TextStore.from_tsv(tmp_path / "0.tsv"), ["b", "a"]) == (["moon", "apple bread cat"], [1, 1])
