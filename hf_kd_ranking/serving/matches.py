"""The words of a passage that match the words of a query, for rankers that compare single tokens (ColBERT, TK)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..models import RankingProcessor

LEAST_STRENGTH = 0.05  # weaker matches are not marked
NO_MATCH = (0.0, "")


@dataclass
class Word:
    """A word of a text: `text[start:stop]`, and the rows of its tokens among the text's vectors."""

    start: int
    stop: int
    rows: list[int]


@dataclass(frozen=True)
class Part:
    """A part of a passage, and the word of the query that it matches, with a strength of 0 (none) to 1."""

    text: str
    strength: float = 0.0
    query_word: str = ""


def mark_matches(
    processor: RankingProcessor,
    query: str,
    texts: Sequence[str],
    query_vectors: np.ndarray,
    document_vectors: Sequence[np.ndarray],
    token_similarity: Literal["dot", "cosine"],
) -> list[list[Part]]:
    """Split passages into parts, whose texts joined are the passage; those that match the query best are marked.

    Args:
        processor: the ranker's processor.
        query, texts: the query and the passages.
        query_vectors: (Lq, D), one row per token of the query; tokens after its words are ignored.
        document_vectors: (Ld, D) for every passage.
        token_similarity: how the ranker compares tokens.
    """
    query_rows, query_words = [], []  # of the tokens that belong to words
    for word in find_words(processor, "query", query):
        query_rows.extend(word.rows)
        query_words.extend([query[word.start : word.stop]] * len(word.rows))
    if token_similarity == "cosine":
        query_vectors = _scale_to_unit_length(query_vectors)
        document_vectors = [_scale_to_unit_length(vectors) for vectors in document_vectors]
    passages = []
    matches = match_tokens(query_vectors, document_vectors, query_rows)
    for text, (rows, strengths) in zip(texts, matches, strict=True):
        strongest: dict[int, tuple[float, str]] = {}  # row of the passage -> its strongest match
        # A passage without tokens has no matches.
        for row, strength, query_word in zip(rows.tolist(), strengths.tolist(), query_words, strict=False):
            strongest[row] = max((strength, query_word), strongest.get(row, NO_MATCH))
        passages.append(_split(text, find_words(processor, "document", text), strongest))
    return passages


def find_words(processor: RankingProcessor, side: Literal["query", "document"], text: str) -> list[Word]:
    """Return the words with letters or digits that a ranker reads of a text, without its prefix."""
    prefix, max_length = processor.document_prefix, processor.max_document_length
    if side == "query":
        prefix, max_length = processor.query_prefix, processor.max_query_length
    prefixed = prefix + text
    tokens = processor.encode(
        prefixed,
        add_special_tokens=processor.adds_special_tokens,
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=True,
    )
    words: dict[int, Word] = {}
    for row, number in enumerate(tokens.word_ids()):
        start, stop = tokens["offset_mapping"][row]
        token = prefixed[start:stop]
        start += len(token) - len(token.lstrip())  # some tokenizers count the blank before a word
        if number is None or start < len(prefix) or start >= stop:  # a special token, the prefix, or a blank
            continue
        word = words.setdefault(number, Word(start - len(prefix), 0, []))
        word.stop = stop - len(prefix)
        word.rows.append(row)
    return [word for word in words.values() if any(map(str.isalnum, text[word.start : word.stop]))]


def match_tokens(
    query: np.ndarray, documents: Sequence[np.ndarray], rows: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Find the token of each document that each token of the query matches best, and how strongly.

    The gain of a match is its product minus the mean product of the query's token with all tokens of the documents.
    The strength is the gain divided by the largest gain, so that shifts and scales of the products change nothing.

    Args:
        query: (Lq, D) float32; of length 1, as the documents, if the ranker compares by cosine.
        documents: (Ld, D) for every document of one ranking; a document without tokens has no matches.
        rows: R rows of the query, those of tokens that belong to words.

    Returns:
        For every document the rows of its matching tokens, (R,) int64, and the strengths, (R,) from 0 to 1.
    """
    products = [query[rows] @ document.T for document in documents]  # (R, Ld)
    all_products = np.concatenate([np.empty((len(rows), 0), np.float32), *products], axis=1)
    means = all_products.sum(axis=1) / max(all_products.shape[1], 1)  # (R,)
    matches, largest = [], 0.0
    for product in products:
        if product.size == 0:
            matches.append((np.empty(0, np.int64), np.empty(0, np.float32)))
            continue
        gains = product.max(axis=1) - means
        largest = max(largest, float(gains.max()))
        matches.append((product.argmax(axis=1), gains))
    return [(best, np.clip(gains / (largest or 1.0), 0, 1)) for best, gains in matches]


def _split(text: str, words: Sequence[Word], strongest: Mapping[int, tuple[float, str]]) -> list[Part]:
    parts, end = [], 0
    for word in words:
        strength, query_word = max(strongest.get(row, NO_MATCH) for row in word.rows)
        if strength < LEAST_STRENGTH:
            continue
        if end < word.start:
            parts.append(Part(text[end : word.start]))
        parts.append(Part(text[word.start : word.stop], round(strength, 2), query_word))
        end = word.stop
    if end < len(text) or not parts:
        parts.append(Part(text[end:]))
    return parts


def _scale_to_unit_length(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-13)
