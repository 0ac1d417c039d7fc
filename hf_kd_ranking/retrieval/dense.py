"""Nearest neighbours by faiss among vectors of which a document has one: exact, HNSW, IVF-PQ, or any of its factories.

Exact results are those of brute force to the last rank: scores are inner products computed in float64 and rounded to
float32, tied documents are in the order of the collection.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from ..artifacts import open_version
from ..data.ids import Id, IdIndex, open_ids
from ..errors import InputError
from ..ranker import Ranker
from .base import Result, best_of, check_k, check_model
from .vector_index import VectorIndex
from .vector_store import VectorStore, faiss_errors, train_index

RESULTS_AT_ONCE = 1 << 22  # scores and rows that faiss returns at once, 50 MB
# Rounding error of float32 sums for vectors of length 1: what comes closer than this to rank k may belong before it.
ROUNDING = 4e-6


class DenseIndex(VectorIndex):
    """A faiss index of one vector per document; make one with `build` or `open`.

    Example:
        >>> ranker, documents = kd.Ranker.from_pretrained("bert_dot"), kd.TextStore.from_tsv("collection.tsv")
        >>> store = kd.VectorStore.build(ranker, documents, "vectors")
        >>> index = kd.DenseIndex.build(store, "hnsw", factory="HNSW32")  # exact without a factory
        >>> run = index.search({"q1": "what is bread"}, k=10)
    """

    compares = (("one", "dot"),)

    def __init__(
        self, ranker: Ranker, index: faiss.Index, ids: IdIndex, removed: np.ndarray, description: dict
    ) -> None:
        super().__init__(ranker, ids, removed, description)
        self.index = index  # for inner products
        self.is_mapped = False

    @classmethod
    def build(
        cls, store: VectorStore, folder: str | Path | None = None, *, factory: str = "Flat", seed: int = 0
    ) -> "DenseIndex":
        """Index the vectors of a store, see `Index`.

        Args:
            factory: in faiss' notation: "Flat" (exact), "HNSW32", "IVF1024,Flat", "IVF4096,PQ64".
            seed: seed of the choice of vectors that quantisers are trained on.

        Raises:
            FileExistsError: if the folder contains something.
            InputError: if the vectors are not compared by dot product, or faiss cannot build the index.
        """
        ranker = cls.check_ranker(store.ranker, store.folder)
        faiss_index = train_index(store, factory, seed)
        for _, _, vectors in store.chunks():
            faiss_index.add(vectors)
        description = store.identity | {"kind": "dense", "factory": factory, "rows": len(store)}
        index = cls(ranker, faiss_index, store, np.zeros(len(store), dtype=bool), description)
        if folder is not None:
            index.save(folder)
        return index

    def _write(self, data: Path) -> None:
        with faiss_errors(f"faiss cannot write {data}", OSError):
            faiss.write_index(self.index, str(data / "dense.faiss"))
        self.ids.save_ids(data)
        np.save(data / "removed.npy", self.removed)

    @classmethod
    def open(cls, folder: str | Path, ranker: Ranker, is_verified: bool = True) -> "DenseIndex":
        """Open a saved index, memory-mapped where faiss can (flat vectors, inverted lists); see `Index`."""
        folder = Path(folder)
        description, data = open_version(folder, "dense", is_verified)
        check_model(description, ranker, folder)
        index = faiss.read_index(str(data / "dense.faiss"), faiss.IO_FLAG_MMAP_IFC)
        ids = IdIndex(description["rows"], *open_ids(data))
        opened = cls(ranker, index, ids, np.load(data / "removed.npy"), description)
        opened.is_mapped = True
        return opened

    def _append(self, store: VectorStore) -> None:
        if self.is_mapped:  # what is mapped cannot grow
            with tempfile.TemporaryDirectory() as folder:
                faiss.write_index(self.index, f"{folder}/dense.faiss")
                self.index = faiss.read_index(f"{folder}/dense.faiss")
            self.is_mapped = False
        for _, _, vectors in store.chunks():
            self.index.add(vectors)

    def tune(self, settings: str) -> None:
        """Set what trades recall for speed, in faiss' notation: "nprobe=16", "efSearch=128"."""
        with faiss_errors(f"{self.description['factory']} does not have the setting {settings!r}"):
            faiss.ParameterSpace().set_index_parameters(self.index, settings)

    def search_vectors(self, queries: np.ndarray, k: int = 100, only: Sequence[Id] | None = None) -> list[Result]:
        """Return the scores and rows of the best k documents for every query vector.

        Args:
            queries: (Q, D) float32.
            k: rows per query; all if the index has fewer.
            only: ids of the documents that may be returned; None for all.

        Raises:
            InputError: if the vectors have another dimension, or k is not positive.
            UnknownIdError: naming ids of `only` that are not in the index.
        """
        if queries.ndim != 2 or queries.shape[1] != self.index.d:
            raise InputError(f"The index holds vectors of {self.index.d} values, got queries of {queries.shape}.")
        check_k(k)
        return search_index(self.index, queries, k, self._allowed(only))


def search_index(index: faiss.Index, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> list[Result]:
    """Return the scores and rows of the best k of N vectors for every query; exact for flat indexes.

    Args:
        index: for inner products.
        queries: (Q, D).
        k: rows per query; all if there are fewer.
        allowed: (N,) True at rows that may be returned; None for all.
    """
    available, parameters = index.ntotal, None
    if allowed is not None:
        available = int(allowed.sum())
        parameters = _parameters(index, faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little")))
    if available == 0:
        return [(np.empty(0, np.float32), np.empty(0, np.int64))] * len(queries)
    k = min(k, available)
    results, step = [], max(1, min(256, RESULTS_AT_ONCE // (2 * k)))
    for start in range(0, len(queries), step):
        block = np.ascontiguousarray(queries[start : start + step], dtype=np.float32)
        if isinstance(index, faiss.IndexFlat):
            results += _search_exact(index, block, k, available, parameters)
            continue
        for scores, rows in zip(*index.search(block, k, params=parameters), strict=True):
            results.append(best_of(scores, rows, k))
    return results


def _search_exact(
    index: faiss.IndexFlat, queries: np.ndarray, k: int, available: int, parameters: faiss.SearchParameters | None
) -> list[Result]:
    """Ask for more than k until the last one is clearly below rank k, then score all of them again."""
    vectors = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(-1, index.d)
    wanted = min(k + 16, available)
    while True:
        scores, rows = index.search(queries, wanted, params=parameters)
        lengths = np.linalg.norm(queries, axis=1) * np.linalg.norm(vectors[rows[:, 0]], axis=1)
        if wanted == available or (scores[:, -1] < scores[:, k - 1] - ROUNDING * lengths).all():
            break
        wanted = min(4 * wanted, available)
    results = []
    for query, chosen in zip(queries.astype(np.float64), rows, strict=True):
        results.append(best_of((vectors[chosen] @ query).astype(np.float32), chosen, k))
    return results


def _parameters(index: faiss.Index, selector: faiss.IDSelector) -> faiss.SearchParameters:
    """Return the parameters of a search that skips rows; they must repeat the settings of the index."""
    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters(faiss.downcast_index(index.index), selector)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=index.nprobe)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
    return faiss.SearchParameters(sel=selector)
