"""Words that match: hand-computed strengths, invariances, and places in the text."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_kd_ranking as kd
from hf_kd_ranking.serving.matches import Part, find_words, mark_matches, match_tokens

QUERY = np.array([[1, 0], [0, 1]], dtype=np.float32)
DOCUMENTS = [np.array([[4, 0], [0, 1], [0, 0]], dtype=np.float32), np.array([[1, 3]], dtype=np.float32)]


def test_match_strengths_equal_hand_computed_values():
    # Products of the first token: 4 0 0 | 1, mean 1.25; of the second: 0 1 0 | 3, mean 1. Largest gain: 4 - 1.25.
    (rows, strengths), (other_rows, other_strengths) = match_tokens(QUERY, DOCUMENTS, [0, 1])
    assert (rows.tolist(), other_rows.tolist()) == ([0, 1], [0, 0])
    assert strengths == pytest.approx([1, 0])
    assert other_strengths == pytest.approx([0, 2 / 2.75])  # 1 is below the mean of the first token


def test_match_strengths_ignore_shifts_and_scales_of_products():
    wide_query = np.concatenate([QUERY, [[5], [-7]]], 1).astype(np.float32)  # times 1 in every document
    wide = [3 * np.concatenate([d, np.ones((len(d), 1), np.float32)], 1) for d in DOCUMENTS]
    for old, new in zip(match_tokens(QUERY, DOCUMENTS, [0, 1]), match_tokens(wide_query, wide, [0, 1]), strict=True):
        assert new[0].tolist() == old[0].tolist()
        assert new[1] == pytest.approx(old[1], abs=1e-5)


def test_document_without_tokens_matches_nothing():
    empty = np.empty((0, 2), np.float32)
    (rows, strengths), (_, other) = match_tokens(QUERY, [empty, DOCUMENTS[0]], [0])
    assert (len(rows), len(strengths), len(other)) == (0, 0, 1)
    assert len(match_tokens(QUERY, [empty], [0])[0][0]) == 0
    assert len(match_tokens(QUERY, DOCUMENTS, [])[0][0]) == 0
    assert match_tokens(QUERY, [], [0]) == []


@pytest.mark.parametrize("model", ["colbert", "tk"], indirect=True)
def test_words_exclude_prefix_punctuation_and_special_tokens(model, ranker):
    first = 1 if model.config.adds_special_tokens else 0  # after [CLS]
    words = find_words(ranker.processor, "document", "the  Cat, <b>")
    assert [(word.start, word.stop, word.rows) for word in words] == [
        (0, 3, [first]),
        (5, 8, [first + 1]),
        (11, 12, [first + 4]),
    ]
    model.config.document_prefix = "what is "
    words = find_words(kd.Ranker(model, ranker.tokenizer).processor, "document", "the cat")
    assert [(word.start, word.stop, word.rows[0]) for word in words] == [(0, 3, first + 2), (4, 7, first + 3)]


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_pieces_of_a_word_are_marked_as_one(model):
    pieces = {"[PAD]": 0, "[UNK]": 1, "un": 2, "##der": 3, "sea": 4}
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    processor = kd.Ranker(model, fast).processor
    query = np.array([[1, 0]], np.float32)
    vectors = np.array([[0, 1], [0, 1], [1, 0]], np.float32)  # sea un ##der: the second piece matches
    (parts,) = mark_matches(processor, "sea", ["sea under!"], query, [vectors], "cosine")
    assert parts == [Part("sea "), Part("under", 1.0, "sea"), Part("!")]


@pytest.mark.parametrize("model", ["colbert", "colbert-normalized", "tk"], indirect=True)
def test_parts_join_to_the_text_and_equal_words_match_best(ranker):
    texts = ["A cat, a <DOG>\n", "", "zzz 😀 dog"]
    query = ranker.encode_queries(["dog"])[0]
    vectors = ranker.encode_documents(texts)
    passages = mark_matches(ranker.processor, "dog", texts, query, vectors, ranker.model.config.token_similarity)
    assert ["".join(part.text for part in parts) for parts in passages] == texts
    marked = [part for parts in passages for part in parts if part.strength]
    assert all(part.query_word == "dog" and 0 < part.strength <= 1 for part in marked)
    # With the document's token vectors as those of the query each word matches itself.
    rows = [word.rows[0] for word in find_words(ranker.processor, "document", texts[0])]
    unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-13) for v in vectors]
    assert match_tokens(unit[0], unit[:1], rows)[0][0].tolist() == rows
