"""Batches, token by token: what the collator's docstring shows, padding, truncation, prefixes, lists."""

import pickle

import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.data.collate import RankingCollator, split_batch
from hf_kd_ranking.models import RankingProcessor

# Ids of the tiny tokenizer in conftest.py.
PAD, UNK, CLS, SEP = 0, 1, 2, 3
APPLE, BREAD, CAT, DOG, EARTH, FIRE, GLASS, HOUSE = range(5, 13)
OF = 34
ROW = {"query_id": 7, "doc_ids": [1, 2], "teacher_scores": [9.0, 4.0]}


@pytest.fixture
def collator(tokenizer, tmp_path):
    """Make a collator over two queries and four documents; arguments are those of RankingProcessor."""

    def make(**settings) -> RankingCollator:
        (tmp_path / "queries.tsv").write_text("7\tapple\n8\tbread cat\n")
        (tmp_path / "docs.tsv").write_text("1\tdog\n2\tEarth unheard of\n3\t\n4\tfire glass house dog earth fire\n")
        lengths = {"max_query_length": 5, "max_document_length": 6} | settings
        texts = [kd.TextStore.from_tsv(tmp_path / name) for name in ("queries.tsv", "docs.tsv")]
        return RankingCollator(RankingProcessor(tokenizer, **lengths), *texts)

    return make


def lists(batch: dict) -> dict:
    return {name: tensor.tolist() for name, tensor in batch.items()}


# ---- The docstring's example ----------------------------------------------------------------------------------------


def test_row_of_the_docstring_becomes_the_batch_of_the_docstring(collator):
    batch = collator()([ROW])
    assert list(batch) == ["query", "document", "rows", "teacher_scores"]
    assert lists(batch["rows"]) == {"query": [0], "document": [[0, 1]]}
    assert lists(batch["query"]) == {
        "input_ids": [[CLS, APPLE, SEP]],
        "token_type_ids": [[0, 0, 0]],
        "attention_mask": [[1, 1, 1]],
        "lengths": [3],
    }
    assert lists(batch["document"]) == {
        "input_ids": [[[CLS, DOG, SEP, PAD, PAD], [CLS, EARTH, UNK, OF, SEP]]],
        "token_type_ids": [[[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]],
        "attention_mask": [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]],
        "lengths": [[3, 5]],
    }
    assert batch["teacher_scores"].tolist() == [[9.0, 4.0]]
    assert batch["teacher_scores"].dtype == torch.float32


def test_joined_documents_follow_their_query(collator):
    batch = collator(joins_texts=True)([ROW])
    inputs, targets = split_batch(batch)
    assert targets["teacher_scores"].tolist() == [[9.0, 4.0]]
    assert lists(inputs) == {
        "input_ids": [[[CLS, APPLE, SEP, DOG, SEP, PAD, PAD], [CLS, APPLE, SEP, EARTH, UNK, OF, SEP]]],
        "token_type_ids": [[[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]]],
        "attention_mask": [[[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]],
        "lengths": [[5, 7]],
    }


# ---- Several rows ---------------------------------------------------------------------------------------------------


def test_rows_stay_in_order_and_sides_are_padded_separately(collator):
    rows = [ROW, {"query_id": 8, "doc_ids": [3, 1], "teacher_scores": [-1.0, 0.5]}]
    batch = collator()(rows)
    assert batch["query"]["input_ids"].tolist() == [[CLS, APPLE, SEP, PAD], [CLS, BREAD, CAT, SEP]]
    assert batch["query"]["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    empty, dog = batch["document"]["input_ids"][1].tolist()
    assert empty == [CLS, SEP, PAD, PAD, PAD]
    assert dog == [CLS, DOG, SEP, PAD, PAD]
    assert batch["teacher_scores"].tolist() == [[9.0, 4.0], [-1.0, 0.5]]


def test_joined_batch_pairs_each_query_with_its_documents(collator):
    rows = [{"query_id": 8, "doc_ids": [1, 3, 1]}, {"query_id": 7, "doc_ids": [3, 1, 3]}]
    ids = collator(joins_texts=True)(rows)["input_ids"]
    with_dog, without = [CLS, BREAD, CAT, SEP, DOG, SEP], [CLS, BREAD, CAT, SEP, SEP, PAD]
    assert ids[0].tolist() == [with_dog, without, with_dog]
    with_dog, without = [CLS, APPLE, SEP, DOG, SEP, PAD], [CLS, APPLE, SEP, SEP, PAD, PAD]
    assert ids[1].tolist() == [without, with_dog, without]


def test_a_row_alone_and_in_a_batch_differ_in_padding_only(collator):
    collate = collator()
    alone, both = collate([ROW]), collate([ROW, ROW | {"query_id": 8, "doc_ids": [4, 2]}])
    for side in ("query", "document"):
        width = alone[side]["input_ids"].shape[-1]
        assert torch.equal(both[side]["input_ids"][0, ..., :width], alone[side]["input_ids"][0])
        assert not both[side]["attention_mask"][0, ..., width:].any()


def test_rows_without_scores_give_none(collator):
    batch = collator()([{"query_id": 7, "doc_ids": [1, 2]}])
    assert list(batch) == ["query", "document", "rows"]
    assert batch["document"]["input_ids"].shape[:2] == (1, 2)


@pytest.mark.parametrize("joins_texts", [False, True])
def test_lists_of_different_lengths_are_filled_up_and_marked(collator, joins_texts):
    collate = collator(joins_texts=joins_texts)
    longer = {"query_id": 8, "doc_ids": [3, 2, 4, 1], "teacher_scores": [1.0, 2.0, 3.0, 4.0]}
    batch = collate([ROW, longer])
    assert batch["is_listed"].tolist() == [[True, True, False, False], [True] * 4]
    assert batch["teacher_scores"].tolist() == [[9.0, 4.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]]
    assert batch["rows"]["document"].tolist() == [[0, 1, 0, 0], [2, 1, 3, 0]]
    wanted = collate([ROW | {"doc_ids": [1, 2, 1, 1], "teacher_scores": [0.0] * 4}, longer])
    assert "is_listed" not in wanted
    inputs, targets = split_batch(batch)
    assert "is_listed" in targets
    assert str(inputs) == str(split_batch(wanted)[0])


@pytest.mark.parametrize(("change", "source"), [({"query_id": 99}, "queries.tsv"), ({"doc_ids": [1, 99]}, "docs.tsv")])
def test_an_id_without_a_text_is_named_with_its_store(collator, change, source):
    with pytest.raises(KeyError, match=rf"ids are not among the .*{source}: '99';"):
        collator()([ROW, ROW | change])


# ---- Lengths and prefixes -------------------------------------------------------------------------------------------


def test_sides_are_cut_to_their_lengths_with_special_tokens(collator):
    batch = collator(max_query_length=3, max_document_length=4)([{"query_id": 8, "doc_ids": [4, 4]}])
    assert batch["query"]["input_ids"].tolist() == [[CLS, BREAD, SEP]]
    assert batch["document"]["input_ids"].tolist() == [[[CLS, FIRE, GLASS, SEP]] * 2]


@pytest.mark.parametrize(
    ("query", "document", "expected"),
    [
        ("apple bread cat", "dog", [CLS, APPLE, BREAD, CAT, SEP, DOG, SEP]),  # the sum counts: a long query may stay
        ("apple", "dog earth fire glass house", [CLS, APPLE, SEP, DOG, EARTH, FIRE, SEP]),
        ("apple bread cat dog", "dog earth fire glass", [CLS, APPLE, BREAD, SEP, DOG, EARTH, SEP]),
        ("apple bread cat dog earth", "", [CLS, APPLE, BREAD, CAT, DOG, SEP, SEP]),
    ],
)
def test_joined_pair_is_cut_longest_text_first(tokenizer, query, document, expected):
    pairs = RankingProcessor(tokenizer, max_query_length=3, max_document_length=4).pairs([query], [document])
    assert pairs["input_ids"] == [expected]


def test_prefixes_stand_before_their_side(collator):
    prefixes = {"query_prefix": "house ", "document_prefix": "glass "}
    batch = collator(**prefixes)([ROW])
    assert batch["query"]["input_ids"].tolist() == [[CLS, HOUSE, APPLE, SEP]]
    assert batch["document"]["input_ids"][0, 0, :4].tolist() == [CLS, GLASS, DOG, SEP]
    joined = collator(**prefixes, joins_texts=True)([ROW])
    assert joined["input_ids"][0, 0, :7].tolist() == [CLS, HOUSE, APPLE, SEP, GLASS, DOG, SEP]


@pytest.mark.parametrize("joins_texts", [False, True])
def test_a_batch_equals_a_direct_call_of_the_tokenizer(collator, tokenizer, joins_texts):
    rows = [{"query_id": q, "doc_ids": d} for q, d in [(7, [4, 3]), (8, [2, 1]), (7, [1, 1])]]
    batch, _ = split_batch(collator(joins_texts=joins_texts)(rows))
    queries = ["apple", "bread cat", "apple"]
    documents = ["fire glass house dog earth fire", "", "Earth unheard of", "dog", "dog", "dog"]
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    if joins_texts:
        flat = [query for query in queries for _ in range(2)]
        expected = [(batch, tokenizer(flat, documents, max_length=11, **options))]
    else:
        expected = [
            (batch["query"], tokenizer(queries, max_length=5, **options)),
            (batch["document"], tokenizer(documents, max_length=6, **options)),
        ]
    for got, wanted in expected:
        assert got.keys() == {*wanted, "lengths"}
        for name in wanted:
            assert torch.equal(got[name].flatten(0, -2), wanted[name])


def test_padding_is_masked_for_every_tokenizer(collator, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_input_names", ["input_ids"])
    query = collator()([ROW, ROW | {"query_id": 8}])["query"]
    assert lists(query) == {
        "input_ids": [[CLS, APPLE, SEP, PAD], [CLS, BREAD, CAT, SEP]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        "lengths": [3, 4],
    }


# ---- Model and workers ----------------------------------------------------------------------------------------------


def test_processor_settings_come_from_the_config(tokenizer, model):
    model.config.query_prefix, model.config.document_prefix = "q ", "d "
    assert RankingProcessor.from_config(tokenizer, model.config) == RankingProcessor(
        tokenizer,
        8,
        16,
        "q ",
        "d ",
        joins_texts=isinstance(model, kd.BertCat),
        adds_special_tokens=not isinstance(model, kd.TK),
        reads_separators=isinstance(model, kd.BertCat) and model.config.passage_length is not None,
        query_augmentation=8 if isinstance(model, kd.ColBERT | kd.PreTTR) else 0,
    )


def test_tokenizer_larger_than_the_vocabulary_is_refused(tokenizer, model):
    RankingProcessor.from_config(tokenizer, model.config)  # as large is right
    model.config.get_text_config().vocab_size -= 1
    size = len(tokenizer)
    with pytest.raises(ValueError, match=rf"tokenizer has {size} tokens, the encoder embeddings for {size - 1}; take"):
        RankingProcessor.from_config(tokenizer, model.config)


def test_a_pickled_collator_makes_the_same_batch(collator):
    collate = collator()
    again = pickle.loads(pickle.dumps(collate))
    assert lists(again([ROW])["document"]) == lists(collate([ROW])["document"])
