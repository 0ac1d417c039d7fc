"""Search in an inverted index of sparse vectors: for every word of the vocabulary the documents that have it.

Exact results are those of brute force to the last rank: scores are dot products computed in float64 and rounded to
float32, tied documents are in the order of the collection. Only documents with a score above zero are returned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array, hstack

from ..artifacts import open_version
from ..data.ids import Id, IdIndex, map_array, open_ids
from ..errors import InputError
from ..ranker import Ranker
from .base import Result, best_of, check_k, check_model
from .vector_index import VectorIndex
from .vector_store import VectorStore

ARRAYS = ("starts", "doc_rows", "weights")


@dataclass(frozen=True)
class InvertedLists:
    """The documents that have a word, and their weights, for every word of the vocabulary.

    Args:
        starts: (V + 1,), where the documents of a word begin.
        doc_rows: (T,) rows of documents, ascending for each word.
        weights: (T,) float32 or float16.
        count: N, the number of documents.
    """

    starts: np.ndarray
    doc_rows: np.ndarray
    weights: np.ndarray
    count: int

    @classmethod
    def build(cls, documents: csr_array, dtype: np.dtype) -> "InvertedLists":
        """Invert vectors, (N, V)."""
        by_word = documents.tocsc()
        return cls(by_word.indptr, by_word.indices, by_word.data.astype(dtype, copy=False), documents.shape[0])

    def joined(self, more: "InvertedLists") -> "InvertedLists":
        """Return the lists of these documents and of others, whose rows follow."""
        by_word = hstack([self._matrix(), more._matrix()], format="csr")
        weights = by_word.data.astype(self.weights.dtype, copy=False)
        return InvertedLists(by_word.indptr, by_word.indices, weights, self.count + more.count)

    def _matrix(self) -> csr_array:
        weights = np.asarray(self.weights, dtype=np.float32)
        return csr_array((weights, self.doc_rows, self.starts), (len(self.starts) - 1, self.count))

    def search(
        self, queries: csr_array, k: int, allowed: np.ndarray | None = None, query_words: int | None = None
    ) -> list[Result]:
        """Return the scores and rows of the best k documents for every query vector, (Q, V).

        Args:
            allowed: (N,) True at rows that may be returned; None for all.
            query_words: see `SparseIndex.search_vectors`.
        """
        results = []
        for start, stop in zip(queries.indptr[:-1], queries.indptr[1:], strict=True):
            words, weights = queries.indices[start:stop], queries.data[start:stop].astype(np.float64)
            if query_words is not None:
                largest = np.argsort(-np.abs(weights), kind="stable")[:query_words]
                words, weights = words[largest], weights[largest]
            scores = self._scores(words, weights)
            if allowed is not None:
                scores[~allowed] = 0
            results.append(_best_positive(scores, k))
        return results

    def _scores(self, words: np.ndarray, weights: np.ndarray) -> np.ndarray:
        scores = np.zeros(self.count)
        for word, weight in zip(words, weights, strict=True):
            chosen = slice(self.starts[word], self.starts[word + 1])
            scores[self.doc_rows[chosen]] += weight * self.weights[chosen]
        return scores.astype(np.float32)


def _best_positive(scores: np.ndarray, k: int) -> Result:
    rows = np.flatnonzero(scores > 0)
    if len(rows) > k:
        # All that are tied with rank k stay, so that the order of the collection decides among them.
        last = np.partition(scores[rows], len(rows) - k)[len(rows) - k]
        rows = rows[scores[rows] >= last]
    return best_of(scores[rows], rows, k)


class SparseIndex(VectorIndex):
    """An inverted index of one sparse vector per document; make one with `build` or `open`.

    Example:
        >>> ranker, documents = kd.Ranker.from_pretrained("splade"), kd.TextStore.from_tsv("collection.tsv")
        >>> store = kd.VectorStore.build(ranker, documents, "weights")
        >>> run = kd.SparseIndex.build(store).search({"q1": "what is bread"}, k=10)
    """

    compares = (("sparse", "dot"),)

    def __init__(
        self, ranker: Ranker, lists: InvertedLists, ids: IdIndex, removed: np.ndarray, description: dict
    ) -> None:
        super().__init__(ranker, ids, removed, description)
        self.lists = lists

    @classmethod
    def build(cls, store: VectorStore, folder: str | Path | None = None) -> "SparseIndex":
        """Index the vectors of a store, see `Index`.

        Raises:
            FileExistsError: if the folder contains something.
            InputError: if the vectors are not sparse.
        """
        ranker = cls.check_ranker(store.ranker, store.folder)
        lists = InvertedLists.build(store.matrix(), store.values.dtype)
        description = store.identity | {"kind": "sparse", "rows": len(store)}
        index = cls(ranker, lists, store, np.zeros(len(store), dtype=bool), description)
        if folder is not None:
            index.save(folder)
        return index

    def _write(self, data: Path) -> None:
        for name in ARRAYS:
            np.save(data / f"{name}.npy", getattr(self.lists, name))
        np.save(data / "removed.npy", self.removed)
        self.ids.save_ids(data)

    @classmethod
    def open(cls, folder: str | Path, ranker: Ranker, is_verified: bool = True) -> "SparseIndex":
        """Open a saved index, memory-mapped; see `Index`."""
        folder = Path(folder)
        description, data = open_version(folder, "sparse", is_verified)
        check_model(description, ranker, folder)
        arrays = {name: map_array(data / f"{name}.npy") for name in ARRAYS}
        ids = IdIndex(description["rows"], *open_ids(data))
        lists = InvertedLists(**arrays, count=description["rows"])
        return cls(ranker, lists, ids, np.load(data / "removed.npy"), description)

    def _append(self, store: VectorStore) -> None:
        self.lists = self.lists.joined(InvertedLists.build(store.matrix(), store.values.dtype))

    def search_vectors(
        self, queries: csr_array, k: int = 100, only: Sequence[Id] | None = None, query_words: int | None = None
    ) -> list[Result]:
        """Return the scores and rows of the best k documents for every query vector.

        Args:
            queries: (Q, V).
            k: rows per query; fewer if fewer documents have a score above zero.
            only: ids of the documents that may be returned; None for all.
            query_words: number of a query's words to read, those of the largest weights, which is faster and not
                exact; None for all.

        Raises:
            InputError: if the vectors have another dimension, or k or `query_words` is not positive.
            UnknownIdError: naming ids of `only` that are not in the index.
        """
        size = len(self.lists.starts) - 1
        if queries.ndim != 2 or queries.shape[1] != size:
            raise InputError(f"The index holds vectors over {size:,} words, got queries of {queries.shape}.")
        check_k(k)
        if query_words is not None and query_words < 1:
            raise InputError(f"query_words must be at least 1, or None for all, got {query_words}.")
        return self.lists.search(queries, k, self._allowed(only), query_words)
