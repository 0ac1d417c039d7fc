"""Re-rank candidates from vectors that were stored in advance.

A stored document costs no encoding: PreTTR runs only the layers after the join, TK its kernels, ColBERT and BERT_DOT
their products.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data.ids import Id
from ..data.passages import run_of_documents, to_passages
from ..data.rankings import Run, as_run
from ..data.texts import TextStore
from ..errors import InputError, UnknownIdError
from ..inference import score_stored
from ..ranker import Ranker
from .vector_store import VectorStore

QUERIES_AT_ONCE = 256


class StoredReranker:
    """A ranker, of any architecture that stores vectors, with a store that knows it; it encodes the queries."""

    def __init__(self, store: VectorStore) -> None:
        if store.ranker is None:
            raise InputError(f"{store.folder} was opened without its ranker; give VectorStore.open(folder, ranker).")
        store.ranker.model.eval()
        self.ranker = store.ranker
        self.store = store

    @classmethod
    def open(cls, folder: str | Path, ranker: Ranker, is_verified: bool = True) -> "StoredReranker":
        """Open an encoded collection, see `VectorStore.open`."""
        return cls(VectorStore.open(folder, ranker, is_verified))

    def score(self, query: str, doc_ids: Sequence[Id]) -> np.ndarray:
        """Return the scores of documents for a query, (N,) float32; an UnknownIdError names ids without vectors."""
        return self._score(self.ranker.encode_queries([query])[0], doc_ids)

    def rerank(self, candidates: Run, queries: TextStore | Mapping[str, str]) -> Run:
        """Sort candidates by the ranker's scores, as `evaluation.rerank.rerank_run` does from texts.

        Args:
            candidates: a run; tied documents keep its order. All passages of a document are scored.
            queries: query_id -> text.

        Raises:
            UnknownIdError: if a query has no text, or a document is not in the store.
        """
        candidates, aggregation = as_run(candidates), self.store.collection.aggregation
        if aggregation is not None:
            candidates = to_passages(candidates, self.store, f"documents of {self.store.folder}")
        for query_id, ranking in candidates.items():  # before the work
            self._rows([doc_id for doc_id, _ in ranking])
            if query_id not in queries:
                raise UnknownIdError(f"Query {query_id!r} of the candidates has no text among the queries.")
        run = Run({query_id: [] for query_id in candidates})
        query_ids = [query_id for query_id, ranking in candidates.items() if ranking]
        for start in range(0, len(query_ids), QUERIES_AT_ONCE):
            block = query_ids[start : start + QUERIES_AT_ONCE]
            vectors = self.ranker.encode_queries([queries[query_id] for query_id in block])
            for query_id, query in zip(block, vectors, strict=True):
                doc_ids = [doc_id for doc_id, _ in candidates[query_id]]
                run |= Run.from_scores([query_id] * len(doc_ids), doc_ids, self._score(query, doc_ids))
        return run_of_documents(run, aggregation)

    def _score(self, query: np.ndarray, doc_ids: Sequence[Id]) -> np.ndarray:
        if len(doc_ids) == 0:
            return np.empty(0, dtype=np.float32)
        vectors = self.store.take(self._rows(doc_ids))
        return score_stored(self.ranker.model, query, vectors, self.ranker.batch_size)

    def _rows(self, doc_ids: Sequence[Id]) -> np.ndarray:
        return self.store.rows_of_known(doc_ids, f"documents of {self.store.folder}")
