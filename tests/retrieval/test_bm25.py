"""BM25 against its formula in plain Python, ties, saving, and a published figure."""

import os
import re
from collections import Counter
from math import log
from pathlib import Path

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.artifacts import read_description, write_description
from hf_kd_ranking.data.languages import SNOWBALL, detect_languages
from hf_kd_ranking.retrieval import bm25
from hf_kd_ranking.retrieval.bm25 import words as words_of

DOCUMENTS = {"d9": "Cat dog", "d1": "cat dog", "d5": "Dog, CAT!", "d3": "bird", "d0": "", "d2": "cat cat fish x2"}


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def ids(run: kd.Run, query_id: str = "q") -> list[str]:
    return [doc_id for doc_id, _ in run[query_id]]


def plain_bm25(documents: dict[str, str], query: str, k1: float = 0.9, b: float = 0.4) -> dict[str, float]:
    """BM25 as Lucene scores it (without the constant k1 + 1): doc_id -> score of the documents with a common word."""
    counts = {doc_id: Counter(words(text)) for doc_id, text in documents.items()}
    average = sum(count.total() for count in counts.values()) / len(counts)
    scores: dict[str, float] = {}
    for word in words(query):
        containing = [doc_id for doc_id, count in counts.items() if word in count]
        idf = log(1 + (len(counts) - len(containing) + 0.5) / (len(containing) + 0.5))
        for doc_id in containing:
            tf, length = counts[doc_id][word], counts[doc_id].total()
            scores[doc_id] = scores.get(doc_id, 0) + idf * tf / (tf + k1 * (1 - b + b * length / average))
    return scores


@pytest.fixture
def texts(make_texts) -> kd.TextStore:
    return make_texts(*DOCUMENTS.items())


@pytest.mark.parametrize("settings", [{}, {"k1": 1.5, "b": 0.75}, {"k1": 0.9, "b": 0.0}])
def test_bm25_scores_equal_the_formula(documents, queries, settings, monkeypatch):
    monkeypatch.setattr(kd.BM25Index, "queries_at_once", 5)
    queries |= {"r": "cat cat of", "u": "The unheard-of IRON"}
    run = kd.BM25Index.build(documents, **settings).search(queries, k=41)
    assert list(run) == list(queries)
    texts = dict(documents.items())  # an id that appears twice counts once
    assert len(texts) == 41
    for query_id, query in queries.items():
        assert len(run[query_id]) == len(dict(run[query_id]))
        assert dict(run[query_id]) == pytest.approx(plain_bm25(texts, query, **settings), rel=1e-5)
        scores = [score for _, score in run[query_id]]
        assert scores == sorted(scores, reverse=True)


def test_bm25_smaller_k_gives_the_start_of_the_ranking(toy):
    index = kd.BM25Index.build(kd.TextStore.from_tsv(toy / "collection.tsv"))
    everything = index.search({"q": "apple cat river"}, k=40)["q"]
    assert len({score for _, score in everything[:6]}) == 6  # no tie at the cut
    assert index.search({"q": "apple cat river"}, k=5)["q"] == everything[:5]
    assert len(index.search({"q": "the of a and"})["q"]) <= 40  # no error where k is larger than the collection
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        index.search({"q": "apple"}, k=0)


def test_bm25_ties_keep_the_order_of_the_collection(texts):
    run = kd.BM25Index.build(texts).search({"q": "dog"}, k=6)  # neither case nor punctuation counts
    assert ids(run) == ["d9", "d1", "d5"]
    assert len({score for _, score in run["q"]}) == 1


@pytest.mark.parametrize(
    ("query", "found"), [("zebra", []), ("", []), ("?!", []), ("zebra fish", ["d2"]), ("X2", ["d2"]), ("x", [])]
)
def test_bm25_leaves_out_documents_without_a_common_word(texts, query, found):
    run = kd.BM25Index.build(texts).search({"first": "cat", "q": query, "last": "bird"}, k=6)
    assert ids(run) == found
    assert (len(run["first"]), ids(run, "last")) == (4, ["d3"])


def test_bm25_results_are_a_run(texts, tmp_path):
    run = kd.BM25Index.build(texts).search({"q": "fish cat"})
    assert isinstance(run, kd.Run)
    kd.write_run(run, tmp_path / "run.trec")
    assert kd.read_run(tmp_path / "run.trec") == run
    assert kd.evaluate_run(run, {"q": {"d2": 1}}) == {"nDCG@10": 1.0, "RR@10": 1.0}


@pytest.mark.parametrize("pattern", ["{}", "7{}", "d ü {}"])  # an id that is its row, integers, strings
def test_bm25_saved_and_opened_gives_the_same_results(make_texts, tmp_path, pattern):
    texts = make_texts(*((pattern.format(i), text) for i, text in enumerate(DOCUMENTS.values())))
    queries = {"q1": "cat dog", "q2": "fish bird", "q3": "nothing"}
    index = kd.BM25Index.build(texts, tmp_path / "indexes" / "mine", k1=1.2)
    expected, opened = index.search(queries), kd.BM25Index.open(tmp_path / "indexes" / "mine")
    assert opened.search(queries) == expected
    assert set(ids(expected, "q1")) <= set(texts.ids())
    assert (len(opened), len(expected["q1"])) == (6, 4)
    assert opened.description.items() >= {"kind": "bm25", "k1": 1.2, "collection": texts.fingerprint()}.items()


def test_bm25_english_drops_stop_words_and_stems(make_texts, tmp_path):
    texts = make_texts(("a", "The running of the dogs"), ("b", "It is the of"), ("c", "a dog runs"))
    index = kd.BM25Index.build(texts, tmp_path / "mine", language="english")
    for opened in (index, kd.BM25Index.open(tmp_path / "mine")):
        run = opened.search({"stem": "Dog", "verb": "run", "stop": "of the"})
        assert [set(ids(run, query_id)) for query_id in run] == [{"a", "c"}, {"a", "c"}, set()]
    assert set(ids(kd.BM25Index.build(texts).search({"q": "of the"}))) == {"a", "b"}
    with pytest.raises(ValueError, match=r"one of .*english.*, got 'klingon'"):
        kd.BM25Index.build(texts, language="klingon")


@pytest.mark.parametrize(
    ("language", "stems", "stop_words"),
    [
        ("german", ("Häuser", "Hauses"), "und der"),
        ("french", ("continuait", "continuer"), "le et"),
        ("russian", ("книгами", "книга"), "и на"),
        ("finnish", ("taloissa", "talo"), None),  # bm25s has no list of Finnish stop words
        ("hindi", ("लड़कियाँ", "लड़कियों"), None),
    ],
)
def test_bm25_stems_words_of_every_language_of_snowball(make_texts, tmp_path, language, stems, stop_words):
    texts = make_texts(("a", stems[0]), ("b", stop_words or "x"))
    index = kd.BM25Index.build(texts, tmp_path / "mine", language=language)
    for opened in (index, kd.BM25Index.open(tmp_path / "mine")):
        run = opened.search({"stem": stems[1], "stop": stop_words or "?"})
        assert (ids(run, "stem"), ids(run, "stop")) == (["a"], [])
    assert ids(kd.BM25Index.build(texts).search({"q": stems[1]})) == []


GERMAN = ("Die Häuser stehen am Rand der Stadt.", "Das Dach des Hauses ist rot und sehr alt.", "Der Baum wird groß.")
ENGLISH = ("The houses are at the edge of the town.", "The roof of the house is red and very old.")
CHINESE = ("我们在北京大学学习自然语言处理", "这座房子的屋顶是红色的")
UKRAINIAN = ("Будинки стоять на околиці міста.", "Дах будинку червоний і дуже старий.")  # Snowball has no stemmer


@pytest.mark.parametrize(
    ("texts", "languages", "found"),
    [
        (GERMAN, ["de"], "german"),
        (ENGLISH, ["en"], "english"),
        (GERMAN * 20 + ENGLISH, ["de"], "german"),  # fewer than a tenth
        (GERMAN + ENGLISH, ["de", "en"], None),
        (CHINESE, ["zh"], None),
        (UKRAINIAN, ["uk"], None),
        (("12, 34", "🙂", "?!"), [], None),
    ],
    ids=str,
)
def test_bm25_language_auto_is_that_of_all_texts(make_texts, tmp_path, texts, languages, found):
    store = make_texts(*((str(i), text) for i, text in enumerate(texts)))
    assert detect_languages(store) == languages
    index = kd.BM25Index.build(store, tmp_path / "index", language="auto")
    assert index.description["language"] == found
    assert kd.BM25Index.open(tmp_path / "index").description["language"] == found
    assert bm25.BM25Vectors(store, language="auto").identity["language"] == found
    if found == "german":
        assert set(ids(index.search({"q": "Haus"}))) >= {"0", "1"}


def test_languages_are_those_of_snowball():
    assert set(SNOWBALL.values()) == set(bm25.LANGUAGES) - {"dutch_porter", "porter", "sesotho", "yiddish"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't x_1, 42!", ["don", "t", "x_1", "42"]),
        ("हिन्दी में क्षेत्र", ["हिन्दी", "में", "क्षेत्र"]),  # vowel signs and viramas are parts of words
        ("Zoe\u0308 cafe\u0301", ["zo\u00eb", "caf\u00e9"]),  # composed
        ("kom\u00adpo\u200dnist mi\u200cdan", ["komponist", "midan"]),
        ("東京都", ["東", "京", "都", "東京", "京都"]),
        ("한국어 책", ["한", "국", "어", "한국", "국어", "책"]),
        ("カメラ", ["カメ", "メラ"]),
        ("ラーメン", ["ラー", "ーメ", "メン"]),
        ("か\u3099", ["が"]),  # a combining voiced sound mark
        ("日本GDP3の", ["日", "本", "日本", "gdp3", "の"]),
        ("ที่นี่", ["ที่นี่"]),  # two characters with two marks each
        ("naïve—東 x", ["naïve", "東", "x"]),
    ],
)
def test_bm25_words_of_several_scripts(text, expected):
    assert words_of(text) == expected


def test_bm25_finds_texts_of_other_scripts_and_forms(make_texts):
    texts = make_texts(
        ("zh", "我们在北京大学学习自然语言处理"),
        ("ja", "東京タワーの夜景はとても美しい"),
        ("th", "ภาษาไทยเป็นภาษาที่สวยงาม"),
        ("fr", "un café à Besançon"),
    )
    index = kd.BM25Index.build(texts)
    queries = {"zh": "自然语言", "ja": "タワーの夜景", "th": "ภาษาไทย", "fr": "cafe\u0301 besanc\u0327on"}
    for query_id, ranking in index.search(queries).items():
        assert ranking[0][0] == query_id


@pytest.mark.parametrize("text", ["", "?!", "—"])
def test_bm25_of_texts_without_words_finds_nothing(make_texts, tmp_path, text):
    index = kd.BM25Index.build(make_texts(("a", text), ("b", "…")), tmp_path / "index")
    for opened in (index, kd.BM25Index.open(tmp_path / "index")):
        assert opened.search({"q": "cat", "empty": "", "marks": text}) == {"q": [], "empty": [], "marks": []}
        assert opened.search({}) == {}


@pytest.mark.parametrize("settings", [{"k1": -1}, {"k1": float("nan")}, {"b": 1.5}, {"b": float("nan")}])
def test_bm25_settings_out_of_range_are_refused(texts, settings):
    with pytest.raises(ValueError, match="k1 is a number of 0 or more and b one from 0 to 1"):
        kd.BM25Index.build(texts, **settings)


def test_bm25_replaces_an_index_only_if_asked(texts, tmp_path):
    index = kd.BM25Index.build(texts, tmp_path / "index")
    with pytest.raises(FileExistsError, match="index exists; give a new folder, or --overwrite"):
        index.save(tmp_path / "index")
    with pytest.raises(FileExistsError):
        kd.BM25Index.build(texts, tmp_path / "index")


def test_bm25_opening_says_what_is_wrong(texts, tmp_path, damage):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "artifact.json"))):
        kd.BM25Index.open(tmp_path)
    kd.BM25Index.build(texts, tmp_path / "index")
    description = read_description(tmp_path / "index")
    del description["language"]
    write_description(tmp_path / "index", description)
    with pytest.raises(ValueError, match="is a BM25 index of an earlier release; remove it and build it again"):
        kd.BM25Index.open(tmp_path / "index")
    write_description(tmp_path / "index", description | {"language": None})
    damage(tmp_path / "index" / "v1" / "vocab.index.json")
    with pytest.raises(ValueError, match=r"vocab\.index\.json is damaged"):
        kd.BM25Index.open(tmp_path / "index")


@pytest.mark.data
@pytest.mark.skipif("HF_KD_RANKING_DATA" not in os.environ, reason="needs the folder that HF_KD_RANKING_DATA names")
def test_bm25_reaches_the_published_ndcg_of_scifact():
    folder = Path(os.environ["HF_KD_RANKING_DATA"]) / "scifact"
    documents, queries = (kd.TextStore.from_jsonl(folder / f"{name}.jsonl") for name in ("corpus", "queries"))
    qrels = kd.read_qrels(folder / "qrels" / "test.tsv")
    assert (len(documents), len(qrels)) == (5183, 300)
    run = kd.BM25Index.build(documents).search({query_id: queries[query_id] for query_id in qrels})
    assert kd.evaluate_run(run, qrels)["nDCG@10"] == pytest.approx(0.6611, abs=0.005)


def test_bm25_by_numba_returns_the_same_rankings(documents, queries, tmp_path, monkeypatch):
    pytest.importorskip("numba", reason="the extra numba is not installed")
    index = kd.BM25Index.build(documents, tmp_path / "bm25")
    assert index._retriever.backend == "numpy"
    wanted = index.search(queries, 100)
    monkeypatch.setattr(bm25, "NUMBA_FROM", 1)
    opened = kd.BM25Index.open(tmp_path / "bm25")
    assert opened._retriever.backend == "numba"
    assert opened.search(queries, 100) == wanted
