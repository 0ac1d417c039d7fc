"""ColBERT over stored term vectors: exact MaxSim for candidates and for whole collections, and end-to-end search.

End-to-end search as PLAID prunes (https://arxiv.org/abs/2205.09707): each term belongs to its nearest centroid; a
query's terms choose centroids, the documents with terms there are ranked by the centroids' products, and exact MaxSim
ranks the best of them. Products are dot products, as in arXiv 2010.02666.
"""

import os
from collections.abc import Iterable, Mapping, Sequence

import faiss
import numpy as np

from ..artifacts import new_version, open_version
from ..data.runs import Run
from ..inference import score_stored
from ..models.scoring import MASKED_SIMILARITY
from ..ranker import Ranker
from .stored_reranker import StoredReranker
from .vector_store import TRAINING_VECTORS, VectorStore, best_of, faiss_reason

QUERIES_AT_ONCE = 16


class ColBERTIndex(StoredReranker):
    """MaxSim search and re-ranking; make one with `build`, or `open`.

    Args:
        ranker: a ColBERT.
        store: of its documents' term vectors, in any storage.

    Raises:
        ValueError: if the vectors are of another model, or none of terms.
    """

    def __init__(self, ranker: Ranker, store: VectorStore) -> None:
        super().__init__(ranker, store)
        if store.facts["architecture"] != "ColBERT":
            raise ValueError(f"{store.folder} has vectors of {store.facts['architecture']}, MaxSim needs ColBERT's.")
        self.centroids: np.ndarray | None = None  # (C, D)
        self.starts: np.ndarray | None = None  # (C + 1,), where a centroid's documents begin
        self.lists: np.ndarray | None = None  # rows of documents, ascending for each centroid

    @classmethod
    def open(cls, folder: str | os.PathLike, ranker: Ranker, is_verified: bool = True) -> "ColBERTIndex":
        """Open a store, and the centroids that `cluster` left beside it, if any.

        Raises:
            ValueError: if it is another model's or damaged, or the centroids are of an earlier version of the vectors.
        """
        index = super().open(folder, ranker, is_verified)
        if (beside := index.store.folder / "centroids").is_dir():
            facts, data = open_version(beside, "centroids", is_verified)
            if facts["vectors"] != index.store.facts["checksum"]:
                raise ValueError(f"{beside} is of an earlier version of the vectors; call cluster() again.")
            index.centroids, index.starts, index.lists = (
                np.load(data / f"{name}.npy", mmap_mode="r") for name in ("centroids", "starts", "lists")
            )
        return index

    def cluster(self, count: int | None = None, seed: int = 0) -> None:
        """Find centroids of the term vectors, for search without comparing everything; kept beside the store.

        Args:
            count: of centroids; None takes 4 * sqrt(terms), and no more than a 39th of the vectors trained on.
            seed: of the sample and of k-means.
        """
        total, sample = len(self.store.values), self.store.sample(TRAINING_VECTORS, seed)
        count = count or max(1, min(int(4 * total**0.5), len(sample) // 39))
        kmeans = faiss.Kmeans(self.store.dimension, count, niter=10, seed=seed + 1, min_points_per_centroid=1)
        try:
            kmeans.train(sample)
        except RuntimeError as error:
            raise ValueError(f"{count} centroids of {len(sample):,} vectors: {faiss_reason(error)}") from None
        documents, nearest = [], []
        for start, stop, vectors in self.store.chunks():
            lengths = np.diff(self.store.offsets[start : stop + 1])
            pairs = np.stack([kmeans.index.search(vectors, 1)[1][:, 0], np.repeat(np.arange(start, stop), lengths)])
            pairs = np.unique(pairs, axis=1)  # a document once a centroid
            nearest.append(pairs[0])
            documents.append(pairs[1].astype(np.int32))
        nearest, documents = np.concatenate(nearest), np.concatenate(documents)
        self.centroids, self.lists = kmeans.centroids, documents[np.argsort(nearest, kind="stable")]
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(nearest, minlength=count))])
        facts = {"kind": "centroids", "vectors": self.store.facts["checksum"], "count": count, "seed": seed}
        with new_version(self.store.folder / "centroids", facts) as data:
            for name in ("centroids", "starts", "lists"):
                np.save(data / f"{name}.npy", vars(self)[name])

    def search(
        self, queries: Mapping[str, str], k: int = 100, probes: int | None = None, candidates: int | None = None
    ) -> Run:
        """The best k documents of every query.

        Args:
            queries: query_id -> text.
            k: documents a query; all where there are fewer.
            probes: centroids a query term; None compares every document (exact).
            candidates: documents that exact MaxSim ranks; None takes 4 * k, and 256 at least.

        Returns:
            A run; ties in the order of the collection.

        Raises:
            ValueError: if there are no centroids for an approximate search, or k is not positive.
        """
        run, items = Run(), list(queries.items())
        for start in range(0, len(items), QUERIES_AT_ONCE):
            query_ids, texts = zip(*items[start : start + QUERIES_AT_ONCE], strict=True)
            results = self.search_vectors(self.ranker.encode_queries(texts), k, probes, candidates)
            for query_id, (scores, rows) in zip(query_ids, results, strict=True):
                run[str(query_id)] = list(zip(self.store.ids_of(rows), scores.tolist(), strict=True))
        return run

    def search_vectors(
        self, queries: Sequence[np.ndarray], k: int = 100, probes: int | None = None, candidates: int | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The best k rows for every query's term vectors, (Lq, D).

        Returns:
            Scores, falling, and rows, of every query; arguments and errors otherwise as `search`.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        if probes is None:
            return search_terms(queries, self._chunks(), k)
        if self.centroids is None:
            raise ValueError(f"{self.store.folder} has no centroids for a search with probes; call cluster() once.")
        return [self._search_candidates(query, k, probes, candidates or max(256, 4 * k)) for query in queries]

    def _chunks(self) -> Iterable[tuple[int, np.ndarray, np.ndarray]]:
        for start, stop, vectors in self.store.chunks():
            yield start, np.diff(self.store.offsets[start : stop + 1]), vectors

    def _search_candidates(
        self, query: np.ndarray, k: int, probes: int, candidates: int
    ) -> tuple[np.ndarray, np.ndarray]:
        products = query @ self.centroids.T  # (Lq, C)
        probes = min(probes, products.shape[1])
        chosen = np.argpartition(-products, probes - 1, axis=1)[:, :probes]  # (Lq, probes)
        rows = np.unique(np.concatenate([self._documents_of(centroid) for centroid in np.unique(chosen)]))
        # A term that a document matches in no probed centroid counts as the worst of those probed.
        worst = np.take_along_axis(products, chosen, 1).min(1)  # (Lq,)
        approximate = np.repeat(worst[:, None], len(rows), 1)  # (Lq, documents)
        for centroid in np.unique(chosen):
            places = np.searchsorted(rows, self._documents_of(centroid))
            approximate[:, places] = np.maximum(approximate[:, places], products[:, centroid, None])
        rows = rows[np.sort(np.argsort(-approximate.sum(0), kind="stable")[:candidates])]
        scores = score_stored(self.ranker.model, query, self.store.take(rows), self.ranker.batch_size)
        return best_of(scores, rows, k)

    def _documents_of(self, centroid: int) -> np.ndarray:
        return self.lists[self.starts[centroid] : self.starts[centroid + 1]]


def search_terms(
    queries: Sequence[np.ndarray], chunks: Iterable[tuple[int, np.ndarray, np.ndarray]], k: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Exact MaxSim of queries with all documents, in memory of one query's terms with a chunk.

    Args:
        queries: term vectors of each, (Lq, D).
        chunks: first row, terms of each document (n,), and their vectors (T, D).

    Returns:
        Of every query the best k: falling scores, and rows.
    """
    best = [(np.empty(0, np.float32), np.empty(0, np.int64))] * len(queries)
    for start, lengths, vectors in chunks:
        rows = np.flatnonzero(lengths)
        firsts, everyone = (np.cumsum(lengths) - lengths)[rows], np.arange(start, start + len(lengths))
        for i, query in enumerate(queries):
            maxima = np.full((len(query), len(lengths)), MASKED_SIMILARITY, dtype=np.float32)
            if len(rows):  # others are documents without terms
                maxima[:, rows] = np.maximum.reduceat(query @ vectors.T, firsts, axis=1)
            best[i] = best_of(np.append(best[i][0], maxima.sum(0)), np.append(best[i][1], everyone), k)
    return best
