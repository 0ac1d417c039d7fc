"""Re-ranking from vectors stored ahead of the query: "passage caching" for PreTTR and TK, and for ColBERT.

A stored document costs no encoding: PreTTR runs its joint layers only, TK its kernels, ColBERT its products.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from ..data.ids import Id
from ..data.runs import Run
from ..data.texts import TextStore
from ..inference import score_stored
from ..ranker import Ranker
from .vector_store import VectorStore
from .versions import check_model

QUERIES_AT_ONCE = 256


class StoredReranker:
    """A ranker over a store of its documents' vectors; make one with `build` or `open`.

    Args:
        ranker: that made the vectors; it encodes the queries.
        store: of any architecture that stores.

    Raises:
        ValueError: if the vectors are of another model.
    """

    def __init__(self, ranker: Ranker, store: VectorStore) -> None:
        check_model(store.facts, ranker, store.folder)
        ranker.model.eval()
        self.ranker = ranker
        self.store = store

    @classmethod
    def build(
        cls, ranker: Ranker, documents: TextStore, folder: str | os.PathLike, storage: str = "float16"
    ) -> "StoredReranker":
        """Encode a collection, see `VectorStore.build`."""
        return cls(ranker, VectorStore.build(ranker, documents, folder, storage))

    @classmethod
    def open(cls, folder: str | os.PathLike, ranker: Ranker, is_verified: bool = True) -> "StoredReranker":
        """Open what was encoded before, see `VectorStore.open`."""
        return cls(ranker, VectorStore.open(folder, is_verified=is_verified))

    def __len__(self) -> int:
        return len(self.store)

    def score(self, query: str, doc_ids: Sequence[Id]) -> np.ndarray:
        """Scores of documents for a query, (N,) float32.

        Raises:
            KeyError: naming ids that are not in the store.
        """
        return self.score_vector(self.ranker.encode_queries([query])[0], doc_ids)

    def rerank(self, candidates: Run, queries: TextStore | Mapping[str, str]) -> Run:
        """Candidates in the ranker's order, as `evaluation.rerank.rerank_run` gives from texts; ties keep their order.

        Args:
            queries: query_id -> text.

        Raises:
            KeyError: if a query has no text, or a document is not in the store.
        """
        run, query_ids = Run(), list(candidates)
        for start in range(0, len(query_ids), QUERIES_AT_ONCE):
            some = query_ids[start : start + QUERIES_AT_ONCE]
            vectors = self.ranker.encode_queries([queries[query_id] for query_id in some])
            for query_id, query in zip(some, vectors, strict=True):
                doc_ids = [doc_id for doc_id, _ in candidates[query_id]]
                run |= Run.from_scores([query_id] * len(doc_ids), doc_ids, self.score_vector(query, doc_ids))
        return run

    def score_vector(self, query: np.ndarray, doc_ids: Sequence[Id]) -> np.ndarray:
        """`score` for an encoded query, (D,) or (Lq, D)."""
        rows = self.store.rows_of_known(doc_ids, f"documents of {self.store.folder}")
        return score_stored(self.ranker.model, query, self.store.take(rows), self.ranker.batch_size)
