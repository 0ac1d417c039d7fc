"""MaxSim search over stored token vectors: exact, or end to end with centroids.

With centroids, candidates are found as in PLAID (https://arxiv.org/abs/2205.09707): each token belongs to its nearest
centroid; the tokens of a query choose centroids, the documents with tokens there are ranked by the products with the
centroids, and exact MaxSim ranks the best of them. Products are dot products, as in https://arxiv.org/abs/2010.02666.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import faiss
import numpy as np

from ..artifacts import has_description, new_version, open_version
from ..data.ids import map_array
from ..data.texts import Collection
from ..errors import InputError
from ..models.scoring import MASKED_SIMILARITY
from ..ranker import Ranker
from .base import Index, Result, best_of, check_k, check_vectors
from .vector_store import TRAINING_VECTORS, Chunk, VectorStore, faiss_errors


class ColBERTIndex(Index):
    """MaxSim search over a vector store in any storage; make one with `build` or `open`.

    Example:
        >>> ranker, documents = kd.Ranker.from_pretrained("colbert"), kd.TextStore.from_tsv("collection.tsv")
        >>> store = kd.VectorStore.build(ranker, documents, "tokens", storage="int8")
        >>> run = kd.ColBERTIndex.build(store).search({"q1": "what is bread"}, k=10)
    """

    compares = (("per_token", "max_sim"),)
    queries_at_once = 16

    def __init__(self, store: VectorStore) -> None:
        self.ranker = self.check_ranker(store.ranker, store.folder)
        self.ranker.model.eval()
        self.store = self.ids = store
        self.probes: int | None = None
        self.centroids: np.ndarray | None = None  # (C, D)
        self.starts: np.ndarray | None = None  # (C + 1,), where the documents of a centroid begin in `lists`
        self.lists: np.ndarray | None = None  # rows of documents, ascending for each centroid

    @classmethod
    def build(
        cls, store: VectorStore, folder: str | Path | None = None, *, centroids: int | None = None, seed: int = 0
    ) -> "ColBERTIndex":
        """Index the vectors of a store, see `Index`.

        Args:
            folder: None, or the folder of the store, where the centroids are saved.
            centroids: number of centroids; 0 chooses 4 * sqrt(vectors), at most a 39th of the vectors trained on; None
                searches exactly only.
            seed: seed of the sample and of k-means.

        Raises:
            InputError: if the vectors are not compared by MaxSim, or are too few for the centroids.
        """
        if folder is not None and Path(folder).resolve() != store.folder.resolve():
            raise InputError(f"A ColBERTIndex is saved with its vectors in {store.folder}, not in {folder}.")
        index = cls(store)
        if centroids is not None:
            index._cluster(centroids, seed)
        return index

    @classmethod
    def open(cls, folder: str | Path, ranker: Ranker, is_verified: bool = True) -> "ColBERTIndex":
        """Open a store and the centroids inside, if there are any, which must belong to its vectors; see `Index`."""
        index = cls(VectorStore.open(folder, ranker, is_verified))
        inside = index.store.folder / "centroids"
        if has_description(inside):
            description, data = open_version(inside, "centroids", is_verified)
            check_vectors(description, index.store.description, inside)
            for name in ("centroids", "starts", "lists"):
                setattr(index, name, map_array(data / f"{name}.npy"))
        return index

    @property
    def collection(self) -> Collection:
        """The collection that was indexed."""
        return self.store.collection

    def __len__(self) -> int:
        return len(self.store)

    def search_vectors(
        self, queries: Sequence[np.ndarray], k: int = 100, probes: int | None = None, candidates: int | None = None
    ) -> list[Result]:
        """Return the scores and rows of the best k documents for the token vectors of every query.

        Args:
            queries: (Lq, D) float32 each.
            k: rows per query; all if the index has fewer.
            probes: centroids per query token; None takes the attribute `probes`, whose None compares every document.
            candidates: documents that exact MaxSim ranks after the centroids; None takes 4 * k and at least 256.

        Raises:
            InputError: if there are no centroids for probes, or k is not positive.
        """
        check_k(k)
        probes = probes or self.probes
        if probes is None:
            return search_tokens(queries, self.store.chunks(), k)
        if self.centroids is None:
            raise InputError(f"{self.store.folder} has no centroids to probe; build the index with centroids.")
        return [self._search_candidates(query, k, probes, candidates or max(256, 4 * k)) for query in queries]

    def _search_candidates(self, query: np.ndarray, k: int, probes: int, candidates: int) -> Result:
        products = query @ self.centroids.T  # (Lq, C)
        probes = min(probes, products.shape[1])
        chosen = np.argpartition(-products, probes - 1, axis=1)[:, :probes]  # (Lq, probes)
        probed = np.unique(chosen)
        lists = [self.lists[self.starts[centroid] : self.starts[centroid + 1]] for centroid in probed]
        documents = np.concatenate(lists)  # (M,), a document once per probed centroid
        order = np.argsort(documents)
        starts = np.flatnonzero(np.diff(documents[order], prepend=-1))
        rows = documents[order][starts]
        nearest = np.repeat(probed, list(map(len, lists)))[order]
        approximate = np.maximum.reduceat(products[:, nearest], starts, axis=1)  # (Lq, documents)
        # A token that a document matches in no probed centroid counts as the worst of those probed.
        worst = np.take_along_axis(products, chosen, 1).min(1, keepdims=True)  # (Lq, 1)
        approximate = np.maximum(approximate, worst).sum(0)
        if len(rows) > candidates:
            rows = rows[np.sort(np.argpartition(-approximate, candidates)[:candidates])]
        ((scores, places),) = search_tokens([query], [(0, *self.store.take_tokens(rows))], k)
        return scores, rows[places]

    def _cluster(self, count: int, seed: int) -> None:
        """Find the centroids and the documents of each, and save them with the store."""
        sample = self.store.sample(TRAINING_VECTORS, seed)
        count = count or max(1, min(int(4 * len(self.store.values) ** 0.5), len(sample) // 39))
        kmeans = faiss.Kmeans(self.store.dimension, count, niter=10, seed=seed + 1, min_points_per_centroid=1)
        with faiss_errors(f"{count} centroids of {len(sample):,} vectors"):
            kmeans.train(sample)
        documents, nearest = [], []
        for start, lengths, vectors in self.store.chunks():
            _, centroids = kmeans.index.search(vectors, 1)
            rows = np.repeat(np.arange(start, start + len(lengths)), lengths)
            pairs = np.unique(np.stack([centroids[:, 0], rows]), axis=1)  # a document once per centroid
            nearest.append(pairs[0])
            documents.append(pairs[1].astype(np.int32))
        nearest, documents = np.concatenate(nearest), np.concatenate(documents)
        self.centroids = kmeans.centroids
        self.lists = documents[np.argsort(nearest, kind="stable")]
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(nearest, minlength=count))])
        vectors = self.store.description["checksum"]
        description = {"kind": "centroids", "count": count, "seed": seed, "vectors": vectors}
        with new_version(self.store.folder / "centroids", description) as data:
            for name in ("centroids", "starts", "lists"):
                np.save(data / f"{name}.npy", vars(self)[name])


def search_tokens(queries: Sequence[np.ndarray], chunks: Iterable[Chunk], k: int) -> list[Result]:
    """Return the scores and rows of the best k documents for every query, by exact MaxSim.

    The products of one query with one chunk are in memory at once.

    Args:
        queries: the token vectors of each, (Lq, D).
        chunks: the token vectors of the documents, see `VectorStore.chunks`.
        k: documents per query; all if there are fewer.
    """
    best = [(np.empty(0, np.float32), np.empty(0, np.int64))] * len(queries)
    for start, lengths, vectors in chunks:
        filled = np.flatnonzero(lengths)  # other documents have no tokens
        firsts = (np.cumsum(lengths) - lengths)[filled]
        rows = np.arange(start, start + len(lengths))
        for i, query in enumerate(queries):
            maxima = np.full((len(query), len(lengths)), MASKED_SIMILARITY, dtype=np.float32)
            if len(filled):
                maxima[:, filled] = np.maximum.reduceat(query @ vectors.T, firsts, axis=1)
            scores = np.append(best[i][0], maxima.sum(0))
            best[i] = best_of(scores, np.append(best[i][1], rows), k)
    return best
