"""The served model: what the engine's thread computes, each method for a batch of requests."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..ranker import Ranker
from ..retrieval.stored_reranker import score_stored

if TYPE_CHECKING:  # the API alone needs no libraries of the extra `retrieval`
    from ..retrieval.vector_store import VectorStore
    from ..searcher import OnnxRanker
    from .schemas import SearchAnswer
    from .search import SearchEngine

PIECE_TOKENS = 16_384  # estimated; longer requests are split, so that others and a cancellation come in between
CHARACTERS_PER_TOKEN = 3


class ServedModel:
    """A ranker under the name that requests may give, with what it can search and score from.

    Args:
        ranker: None for a pipeline of BM25 alone, which only searches.
        store: vectors of documents that requests name by id; None if there are none.
        search: the pipeline of `/search` and the page; None serves the API alone.
    """

    def __init__(
        self,
        name: str,
        ranker: "Ranker | OnnxRanker | None",
        store: "VectorStore | None" = None,
        search: "SearchEngine | None" = None,
    ) -> None:
        self.name = name
        self.ranker = ranker
        self.store = store
        self.search = search
        # The activations of an int8 graph have one scale per batch, so that its scores depend on the batch.
        self.is_batched = isinstance(ranker, Ranker)
        self.config = None
        if ranker is not None:
            self.config = ranker.model.config if self.is_batched else ranker.config

    def split_pairs(self, query: str, texts: list[str]) -> tuple[list[tuple[str, list[str]]], list[int]]:
        """Return a query and its texts in pieces, and the estimated tokens of each, see `split`."""
        query_tokens = _estimate_tokens(query, self.config.max_query_length)
        pieces, tokens = self.split(texts, self.config.max_document_length, query_tokens)
        return [(query, piece) for piece in pieces], tokens

    def split(self, texts: list[str], longest: int, added: int = 0) -> tuple[list[list[str]], list[int]]:
        """Return texts in pieces of at most `PIECE_TOKENS` where possible, and the estimated tokens of each.

        `longest` is the number of tokens that the model reads of a text, `added` that of those read with each text.
        """
        pieces: list[list[str]] = []
        tokens: list[int] = []
        for text in texts:
            count = added + _estimate_tokens(text, longest)
            is_full = self.is_batched and bool(pieces) and tokens[-1] + count > PIECE_TOKENS
            if is_full or not pieces:
                pieces.append([])
                tokens.append(0)
            pieces[-1].append(text)
            tokens[-1] += count
        return pieces, tokens

    def check_pair_lengths(self, query: str, texts: Sequence[str]) -> None:
        """Raise an InputError that names the first text that the model would read only in part."""
        if self.config.joins_texts:
            replace(self.ranker.processor, truncation=False).pairs([query] * len(texts), texts)
        else:
            self.check_lengths("query", [query])
            self.check_lengths("document", texts)

    def check_lengths(self, side: Literal["query", "document"], texts: Sequence[str]) -> None:
        """Raise an InputError that names the first text of one side that the model would read only in part."""
        processor = replace(self.ranker.processor, truncation=False)
        if side == "query":
            processor.queries(texts)
        else:
            processor.documents(texts)

    def score_texts(self, batch: list[tuple[str, list[str]]]) -> list[np.ndarray]:
        """Return the raw scores of each query with its texts, (N,) float32 each, as `Ranker.score`."""
        if not self.is_batched:
            return [self.ranker.score(query, texts) for query, texts in batch]
        queries: list[str] = []
        documents: list[str] = []
        for query, texts in batch:
            queries += [query] * len(texts)
            documents += texts
        scores = self.ranker.score(queries, documents)
        ends = np.cumsum([len(texts) for _, texts in batch])
        return np.split(scores, ends[:-1])

    def score_stored(self, batch: list[tuple[str, np.ndarray]]) -> list[np.ndarray]:
        """Return the raw scores of each query with its rows of the store, (N,) float32 each."""
        queries = self.ranker.encode_queries([query for query, _ in batch])
        results = []
        for vectors, (_, rows) in zip(queries, batch, strict=True):
            stored = self.store.take(rows)
            results.append(score_stored(self.ranker.model, vectors, stored, self.ranker.batch_size))
        return results

    def encode_queries(self, batch: list[list[str]]) -> list[np.ndarray]:
        """Return the vectors of each request's queries, (N, D) float32 each."""
        return _encode(self.ranker.encode_queries, batch)

    def encode_documents(self, batch: list[list[str]]) -> list[np.ndarray]:
        """Return the vectors of each request's documents, (N, D) float32 each."""
        return _encode(self.ranker.encode_documents, batch)

    def run_searches(self, batch: list[tuple[str, int]]) -> "list[SearchAnswer]":
        """Search for each query and number of passages, one after the other: every stage is timed."""
        return [self.search.search(query, k) for query, k in batch]


def _estimate_tokens(text: str, longest: int) -> int:
    return min(len(text) // CHARACTERS_PER_TOKEN + 2, longest)


def _encode(encode: Callable[[list[str]], np.ndarray], batch: list[list[str]]) -> list[np.ndarray]:
    texts: list[str] = []
    for request in batch:
        texts += request
    ends = np.cumsum([len(request) for request in batch])
    return np.split(encode(texts), ends[:-1])
