"""Re-rank candidates from vectors that were stored in advance.

A stored document costs no encoding: PreTTR runs only the layers after the join, TK and TKL their kernels, ColBERT and
BERT_DOT their products.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array, issparse
from torch import Tensor

from ..data.ids import Id
from ..data.passages import run_of_documents, to_passages
from ..data.rankings import Run, as_run
from ..data.texts import TextStore
from ..errors import InputError, UnknownIdError
from ..inference import stack_vectors
from ..models import RankerModel
from ..models.scoring import max_sim_without_padding
from ..ranker import Ranker
from .vector_store import VectorStore

QUERIES_AT_ONCE = 256


class StoredReranker:
    """A ranker, of any architecture that stores vectors, with a store that knows it; it encodes the queries.

    Example:
        >>> ranker, documents = kd.Ranker.from_pretrained("prettr"), kd.TextStore.from_tsv("collection.tsv")
        >>> store = kd.VectorStore.build(ranker, documents, "states", storage="float16")
        >>> queries = kd.TextStore.from_tsv("queries.tsv")
        >>> run = kd.StoredReranker(store).rerank(kd.read_run("bm25.trec"), queries)
    """

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


def score_stored(
    model: RankerModel,
    query: np.ndarray | csr_array,
    documents: np.ndarray | csr_array | Sequence[np.ndarray],
    batch_size: int = 64,
) -> np.ndarray:
    """Score one query with documents that were encoded in advance by `encode_texts`, in any dtype; (N,) float32.

    Args:
        query: (D,), or (Lq, D) with one vector per token.
        documents: (N, D), which are scored at once, or N of (Ld, D).
        batch_size: documents per forward pass; those of similar length share one.
    """
    if issparse(documents):  # their similarity is the dot product
        return (documents @ query).toarray()
    query_vectors, query_mask = stack_vectors([query], model.device)
    with torch.inference_mode():
        if query_mask is None:
            vectors = torch.from_numpy(np.asarray(documents)).to(model.device)
            return model.score_vectors(query_vectors, vectors.unsqueeze(0))[0].cpu().numpy()
        if model.config.similarity == "max_sim" and model.device.type in ("cpu", "cuda"):  # those of segment_reduce
            return _max_sim_of_stored(query_vectors[0], documents, batch_size)
        scores = np.empty(len(documents), dtype=np.float32)
        order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            vectors, mask = stack_vectors([documents[row] for row in rows], model.device)
            batch = model.score_vectors(query_vectors, vectors.unsqueeze(0), query_mask, mask.unsqueeze(0))  # (1, n)
            scores[rows] = batch[0].cpu()
    return scores


def _max_sim_of_stored(query: Tensor, documents: Sequence[np.ndarray], batch_size: int) -> np.ndarray:
    scores = np.empty(len(documents), dtype=np.float32)
    for start in range(0, len(documents), batch_size):
        block = documents[start : start + batch_size]
        lengths = torch.tensor([len(document) for document in block], device=query.device)
        vectors = torch.from_numpy(np.concatenate(block)).to(query.device)
        scores[start : start + batch_size] = max_sim_without_padding(query, vectors, lengths).cpu()
    return scores
