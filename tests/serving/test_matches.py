"""Which words matched: by hand, and whatever is added to a term's products or multiplies them."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_kd_ranking as kd
from hf_kd_ranking.serving.matches import Part, mark_matches, match_terms, words_of

QUERY = np.array([[1, 0], [0, 1]], dtype=np.float32)
DOCUMENTS = [np.array([[4, 0], [0, 1], [0, 0]], dtype=np.float32), np.array([[1, 3]], dtype=np.float32)]


def test_strengths_equal_hand_computed_values():
    # Products of the first term: 4 0 0 | 1, mean 1.25; of the second: 0 1 0 | 3, mean 1. Largest gain: 4 - 1.25.
    (places, strengths), (other_places, other_strengths) = match_terms(QUERY, DOCUMENTS, [0, 1])
    assert (places.tolist(), other_places.tolist()) == ([0, 1], [0, 0])
    assert strengths == pytest.approx([1, 0])
    assert other_strengths == pytest.approx([0, 2 / 2.75])  # 1 is below the first term's mean


def test_a_constant_on_a_terms_products_or_a_factor_on_all_changes_no_strength():
    wide_query = np.concatenate([QUERY, [[5], [-7]]], 1).astype(np.float32)  # times 1 in every document
    wide = [3 * np.concatenate([d, np.ones((len(d), 1), np.float32)], 1) for d in DOCUMENTS]
    for old, new in zip(match_terms(QUERY, DOCUMENTS, [0, 1]), match_terms(wide_query, wide, [0, 1]), strict=True):
        assert new[0].tolist() == old[0].tolist()
        assert new[1] == pytest.approx(old[1], abs=1e-5)


def test_a_document_without_terms_matches_nothing():
    empty = np.empty((0, 2), np.float32)
    (places, strengths), (_, other) = match_terms(QUERY, [empty, DOCUMENTS[0]], [0])
    assert (len(places), len(strengths), len(other)) == (0, 0, 1)
    assert len(match_terms(QUERY, [empty], [0])[0][0]) == 0
    assert len(match_terms(QUERY, DOCUMENTS, [])[0][0]) == 0


@pytest.mark.parametrize("model", ["colbert", "tk"], indirect=True)
def test_words_are_where_the_text_has_them_and_prefix_and_special_tokens_are_none(model, ranker):
    rows_before = 1 if model.config.model_type == "ColBERT" else 0  # [CLS]
    words = words_of(ranker.processor, "document", "the  Cat, <b>")
    assert [(word.start, word.stop, word.rows) for word in words] == [
        (0, 3, [rows_before]),
        (5, 8, [rows_before + 1]),
        (11, 12, [rows_before + 4]),
    ]
    model.config.document_prefix = "what is "
    words = words_of(kd.Ranker(model, ranker.tokenizer).processor, "document", "the cat")
    assert [(word.start, word.stop, word.rows[0]) for word in words] == [
        (0, 3, rows_before + 2),
        (4, 7, rows_before + 3),
    ]


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_pieces_of_a_word_are_marked_as_one(model):
    pieces = {"[PAD]": 0, "[UNK]": 1, "un": 2, "##der": 3, "sea": 4}
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    inputs = kd.Ranker(model, fast).processor
    query = np.array([[1, 0]], np.float32)
    vectors = np.array([[0, 1], [0, 1], [1, 0]], np.float32)  # sea un ##der: the second piece matches
    (parts,) = mark_matches(inputs, "sea", ["sea under!"], query, [vectors], is_cosine=True)
    assert parts == [Part("sea "), Part("under", 1.0, "sea"), Part("!")]


@pytest.mark.parametrize("model", ["colbert", "colbert-normalized", "tk"], indirect=True)
def test_parts_are_the_text_and_the_same_word_without_context_matches_best(ranker):
    texts = ["A cat, a <DOG>\n", "", "zzz 😀 dog"]
    query = ranker.encode_queries(["dog"])[0]
    vectors = ranker.encode_documents(texts)
    is_cosine = ranker.model.config.model_type == "TK"
    passages = mark_matches(ranker.processor, "dog", texts, query, vectors, is_cosine)
    assert ["".join(part.text for part in parts) for parts in passages] == texts
    marked = [part for parts in passages for part in parts if part.strength]
    assert all(part.term == "dog" and 0 < part.strength <= 1 for part in marked)
    # The document's own term vectors as the query's: each word matches itself.
    rows = [word.rows[0] for word in words_of(ranker.processor, "document", texts[0])]
    unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-13) for v in vectors]
    assert match_terms(unit[0], unit[:1], rows)[0][0].tolist() == rows
