"""Which words of a passage a query's words matched, for rankers that compare term by term (ColBERT, TK)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..models import RankingProcessor

LEAST_STRENGTH = 0.05  # weaker ones are not marked


@dataclass(frozen=True)
class Word:
    """A word of a text: `text[start:stop]`, and the rows of its tokens among the text's vectors."""

    start: int
    stop: int
    rows: list[int]


@dataclass(frozen=True)
class Part:
    """A piece of a passage.

    Args:
        text: the piece; those of a passage in order are the passage.
        strength: of the match, 0 (none) to 1, see `match_terms`.
        term: the query's word that it matched, "" for none.
    """

    text: str
    strength: float = 0.0
    term: str = ""


def words_of(tokenizer: RankingProcessor, side: str, text: str) -> list[Word]:
    """The words of a text that a ranker reads, whole ones of letters and digits; none of a prefix, no special tokens.

    Args:
        side: "query" or "document".
    """
    is_query = side == "query"
    prefix = tokenizer.query_prefix if is_query else tokenizer.document_prefix
    read = prefix + text
    tokens = tokenizer.tokenizer(
        read,
        add_special_tokens=tokenizer.adds_special_tokens,
        truncation=True,
        max_length=tokenizer.max_query_length if is_query else tokenizer.max_document_length,
        return_offsets_mapping=True,
    )
    words: dict[int, Word] = {}
    for row, (number, (start, stop)) in enumerate(zip(tokens.word_ids(), tokens["offset_mapping"], strict=True)):
        start += len(read[start:stop]) - len(read[start:stop].lstrip())  # some tokenizers count the blank before
        if number is not None and len(prefix) <= start < stop:
            first = words.get(number, Word(start - len(prefix), 0, []))
            words[number] = Word(first.start, stop - len(prefix), [*first.rows, row])
    return [word for word in words.values() if any(c.isalnum() for c in text[word.start : word.stop])]


def match_terms(
    query: np.ndarray, documents: Sequence[np.ndarray], rows: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The term of each document with the largest dot product with a query's term, and how much that counts.

    Strength is what the best product has above the mean product of the query's term with all terms of the documents,
    as a share of the largest such gain: a constant added to a term's products, or a factor on all, changes nothing.

    Args:
        query: (Lq, D) float32; of unit length, as the documents, where terms are compared by cosine.
        documents: of one ranking, (Ld, D) each; a document without terms matches nothing.
        rows: of the query's terms that are words; R of them.

    Returns:
        For every document the rows of its matching terms, (R,) int64, and the strengths, (R,) in 0..1.
    """
    products = [query[rows] @ document.T for document in documents]  # (R, Ld)
    if not sum(product.size for product in products):
        return [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(documents)
    means = np.concatenate(products, 1).mean(1)  # (R,)
    best = [product.argmax(1) if product.size else np.empty(0, np.int64) for product in products]
    gains = [product.max(1) - means if product.size else np.empty(0, np.float32) for product in products]
    largest = max(float(gain.max()) for gain in gains if len(gain)) or 1.0
    return [(places, np.clip(gain / largest, 0, 1)) for places, gain in zip(best, gains, strict=True)]


def mark_matches(
    tokenizer: RankingProcessor,
    query: str,
    texts: Sequence[str],
    query_vectors: np.ndarray,
    document_vectors: Sequence[np.ndarray],
    is_cosine: bool,
) -> list[list[Part]]:
    """Passages in parts, those marked that a query's word matched best.

    Args:
        query_vectors: (Lq, D), rows as the tokenizer makes them; what stands behind the query's words is not shown.
        document_vectors: of every text, (Ld, D).
        is_cosine: True compares by cosine (TK).
    """
    terms = [(row, query[word.start : word.stop]) for word in words_of(tokenizer, "query", query) for row in word.rows]
    if is_cosine:
        query_vectors, *document_vectors = (_unit_length(vectors) for vectors in (query_vectors, *document_vectors))
    found = match_terms(query_vectors, document_vectors, [row for row, _ in terms])
    passages = []
    for text, (places, strengths) in zip(texts, found, strict=True):
        best: dict[int, tuple[float, str]] = {}  # row -> its strongest match
        for place, strength, (_, term) in zip(places.tolist(), strengths.tolist(), terms[: len(places)], strict=True):
            best[place] = max(best.get(place, (0.0, "")), (strength, term))
        passages.append(_parts(text, words_of(tokenizer, "document", text), best))
    return passages


def _parts(text: str, words: Sequence[Word], best: dict[int, tuple[float, str]]) -> list[Part]:
    parts, end = [], 0
    for word in words:
        strength, term = max(best.get(row, (0.0, "")) for row in word.rows)
        if strength >= LEAST_STRENGTH:
            between = [Part(text[end : word.start])] if end < word.start else []
            parts += [*between, Part(text[word.start : word.stop], round(strength, 2), term)]
            end = word.stop
    return [*parts, Part(text[end:])] if end < len(text) or not parts else parts


def _unit_length(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-13)
