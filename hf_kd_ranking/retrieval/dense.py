"""Nearest neighbours among the vectors of BERT_DOT, by faiss: exact, HNSW, IVF-PQ, whatever its factory builds.

Exact results are those of brute force to the last rank: scores are inner products computed in float64 and rounded to
float32, ties stand in the order of the collection.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import faiss
import numpy as np

from ..artifacts import has_description, new_version, open_version
from ..data.ids import Id, IdIndex, open_ids
from ..data.runs import Run
from ..ranker import Ranker
from .vector_store import VectorStore, best_of, faiss_reason, train_index
from .versions import check_model

QUERIES_AT_ONCE = 256
RESULTS_AT_ONCE = 1 << 22  # scores and rows that faiss returns at once, 50 MB
# Of float32 sums, for vectors of length 1; what comes closer than this to rank k may belong before it.
ROUNDING = 4e-6


class DenseIndex:
    """A searchable index of one vector a document; make one with `build` or `open`.

    Args:
        ranker: that made the vectors; it encodes the queries.
        index: faiss' own, inner product.
        ids: of its rows.
        removed: (N,) True at rows that are found no more.
        facts: what the vectors were made by.
    """

    def __init__(
        self, ranker: Ranker, index: faiss.Index, ids: IdIndex, removed: np.ndarray, facts: Mapping[str, object]
    ) -> None:
        self.ranker = ranker
        self.index = index
        self.ids = ids
        self.removed = removed
        self.facts = dict(facts)

    @classmethod
    def build(cls, ranker: Ranker, store: VectorStore, factory: str = "Flat", seed: int = 0) -> "DenseIndex":
        """Index the vectors of a store.

        Args:
            factory: in faiss' notation: "Flat" (exact), "HNSW32", "IVF1024,Flat", "IVF4096,PQ64".
            seed: of the vectors that quantisers are trained on.

        Raises:
            ValueError: if the vectors are of another model, there is one a term, or the factory is not faiss'.
        """
        check_model(store.facts, ranker, store.folder)
        _refuse_terms(store)
        index = train_index(store, factory, seed)
        for _, _, vectors in store.chunks():
            index.add(vectors)
        facts = {name: store.facts[name] for name in ("architecture", "model_dtype", "model", "dimension", "storage")}
        facts |= {"kind": "dense", "factory": factory, "vectors": store.facts["checksum"]}
        ids = IdIndex.build(store.columns())
        return cls(ranker, index, ids, np.zeros(len(ids), dtype=bool), facts)

    def save(self, folder: str | os.PathLike, overwrite: bool = False) -> None:
        """Write the index; the folder, or its new version, counts when it is complete.

        Raises:
            FileExistsError: if there is an index and it is not to be replaced.
            OSError: if the disk is full; the old version is whole.
        """
        folder = Path(folder)
        if has_description(folder) and not overwrite:
            raise FileExistsError(f"{folder} exists; give a new folder, or overwrite=True to replace it.")
        with new_version(folder, self.facts | {"rows": len(self.ids)}) as data:
            try:
                faiss.write_index(self.index, str(data / "dense.faiss"))
            except RuntimeError as error:
                raise OSError(f"{folder}: faiss could not write the index: {faiss_reason(error)}") from None
            self.ids.save_ids(data)
            np.save(data / "removed.npy", self.removed)

    @classmethod
    def open(cls, folder: str | os.PathLike, ranker: Ranker, is_verified: bool = True) -> "DenseIndex":
        """Open a saved index, memory-mapped where faiss can (flat vectors, inverted lists).

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it was built by another model, or a file is truncated or damaged.
        """
        folder = Path(folder)
        facts, data = open_version(folder, "dense", is_verified)
        check_model(facts, ranker, folder)
        index = faiss.read_index(str(data / "dense.faiss"), faiss.IO_FLAG_MMAP_IFC)
        ids = IdIndex(facts["rows"], *open_ids(data))
        return cls(ranker, index, ids, np.load(data / "removed.npy"), facts)

    def __len__(self) -> int:
        return len(self.removed) - int(self.removed.sum())

    def add(self, store: VectorStore) -> None:
        """Add the vectors of another store; quantisers stay as they were trained.

        Raises:
            ValueError: if its vectors are of another model, or an id is in the index already.
        """
        check_model(store.facts, self.ranker, store.folder)
        _refuse_terms(store)
        new = list(store.ids())
        if (known := self.ids.rows_of(new) >= 0).any():
            first = new[int(np.flatnonzero(known)[0])]
            raise ValueError(
                f"{known.sum()} of the {len(new):,} ids of {store.folder} are in the index already, {first!r} first; "
                "remove them before."
            )
        self.index = faiss.deserialize_index(faiss.serialize_index(self.index))  # what is mapped cannot grow
        for _, _, vectors in store.chunks():
            self.index.add(vectors)
        self.removed = np.concatenate([self.removed, np.zeros(len(new), dtype=bool)])
        self.ids = IdIndex.build(self.ids.columns() + store.columns(), self.removed)

    def remove(self, ids: Sequence[Id]) -> None:
        """Leave documents out of all results; their space is free when the index is built again.

        Raises:
            KeyError: naming ids that are not in the index.
        """
        self.removed = self.removed.copy()
        self.removed[self.ids.rows_of_known(ids, "documents of the index")] = True
        self.ids = IdIndex.build(self.ids.columns(), self.removed)

    def tune(self, settings: str) -> None:
        """Set what trades recall for speed, in faiss' notation: "nprobe=16", "efSearch=128".

        Raises:
            ValueError: if the index has no such setting.
        """
        try:
            faiss.ParameterSpace().set_index_parameters(self.index, settings)
        except RuntimeError as error:
            raise ValueError(f"{self.facts['factory']} has no setting {settings!r}: {faiss_reason(error)}") from None

    def search(self, queries: Mapping[str, str], k: int = 100, only: Sequence[Id] | None = None) -> Run:
        """The best k documents of every query.

        Args:
            queries: query_id -> text.
            k: documents a query; all where the index has fewer.
            only: ids of the documents that may be found; None for all.

        Returns:
            A run; ties in the order of the collection.

        Raises:
            KeyError: naming ids of `only` that are not in the index.
        """
        run = Run()
        items = list(queries.items())
        for start in range(0, len(items), QUERIES_AT_ONCE):
            query_ids, texts = zip(*items[start : start + QUERIES_AT_ONCE], strict=True)
            results = self.search_vectors(self.ranker.encode_queries(texts), k, only)
            for query_id, (scores, rows) in zip(query_ids, results, strict=True):
                run[str(query_id)] = list(zip(self.ids.ids_of(rows), scores.tolist(), strict=True))
        return run

    def search_vectors(
        self, queries: np.ndarray, k: int = 100, only: Sequence[Id] | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The best k rows of every query vector.

        Args:
            queries: (Q, D) float32.

        Returns:
            Scores, falling, and rows, of every query; arguments and errors otherwise as `search`.

        Raises:
            ValueError: if the vectors have another dimension, or k is not positive.
        """
        if queries.ndim != 2 or queries.shape[1] != self.index.d:
            raise ValueError(f"The index holds vectors of {self.index.d} values, got queries of {queries.shape}.")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        allowed = ~self.removed
        if only is not None:
            chosen = np.zeros_like(allowed)
            chosen[self.ids.rows_of_known(only, "documents of the index")] = True
            allowed &= chosen
        if not allowed.any():
            return [(np.empty(0, np.float32), np.empty(0, np.int64))] * len(queries)
        return search_index(self.index, queries, k, None if allowed.all() else allowed)


def search_index(
    index: faiss.Index, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The best k of the rows allowed, (N,) bool, for every query, (Q, D): falling scores, and rows."""
    found = index.ntotal if allowed is None else int(allowed.sum())
    k, is_exact = min(k, found), isinstance(index, faiss.IndexFlat)
    selector = None if allowed is None else faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
    parameters = None if selector is None else _parameters(index, selector)
    results, step = [], max(1, min(QUERIES_AT_ONCE, RESULTS_AT_ONCE // (2 * k)))
    for start in range(0, len(queries), step):
        some = np.ascontiguousarray(queries[start : start + step], dtype=np.float32)
        if is_exact:
            results += _search_exact(index, some, k, found, parameters)
        else:
            results += [best_of(*pair, k) for pair in zip(*index.search(some, k, params=parameters), strict=True)]
    return results


def _search_exact(
    index: faiss.IndexFlat, queries: np.ndarray, k: int, found: int, parameters: faiss.SearchParameters | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ask for more than k until the last one is clearly below rank k, then score all of them again."""
    vectors = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(-1, index.d)
    wanted = min(k + 16, found)
    while True:
        scores, rows = index.search(queries, wanted, params=parameters)
        lengths = np.linalg.norm(queries, axis=1) * np.linalg.norm(vectors[rows[:, 0]], axis=1)
        if wanted == found or (scores[:, -1] < scores[:, k - 1] - ROUNDING * lengths).all():
            break
        wanted = min(4 * wanted, found)
    results = []
    for query, chosen in zip(queries.astype(np.float64), rows, strict=True):
        results.append(best_of((vectors[chosen] @ query).astype(np.float32), chosen, k))
    return results


def _parameters(index: faiss.Index, selector: faiss.IDSelector) -> faiss.SearchParameters:
    """What makes a search pass over rows; it must repeat the settings of the index."""
    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters(faiss.downcast_index(index.index), selector)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=index.nprobe)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
    return faiss.SearchParameters(sel=selector)


def _refuse_terms(store: VectorStore) -> None:
    if store.has_token_vectors:
        raise ValueError(
            f"{store.folder} has a vector a term ({store.facts['architecture']}); a dense index takes one a document: "
            "use ColBERTIndex, or StoredReranker."
        )
