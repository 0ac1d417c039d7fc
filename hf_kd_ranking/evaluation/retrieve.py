"""Retrieval from a whole collection by exact search, and its measures."""

from collections.abc import Mapping, Sequence

import faiss
import numpy as np

from ..data.runs import Run
from ..data.texts import TextStore
from ..ranker import Ranker
from ..retrieval.colbert import search_tokens
from ..retrieval.dense import search_index
from .metrics import DEFAULT_MEASURES, evaluate_queries, mean_values, parse_measures

DOCUMENTS_AT_ONCE = 1_024
ENCODED_AT_ONCE = 98_304  # vectors in memory besides those of the index


class RetrievalEvaluator:
    """Search a collection with a ranker and measure the result; for use in training and elsewhere.

    The vectors of all documents are held in memory during a call.

    Args:
        qrels: query_id -> {doc_id: grade}; its queries are searched for.
        queries: query_id -> text.
        documents: the collection.
        measures: in ir_measures' notation.
        k: number of documents per query.

    Raises:
        KeyError: if a query of the qrels has no text.
        ValueError: if no judged document is in the collection, or a measure is unknown.
    """

    def __init__(
        self,
        qrels: Mapping[str, Mapping[str, int]],
        queries: TextStore,
        documents: TextStore,
        measures: Sequence[str] = DEFAULT_MEASURES,
        k: int = 1_000,
    ) -> None:
        judged = []
        for grades in qrels.values():
            judged.extend(grades)
        if not (documents.rows_of(judged) >= 0).any():
            raise ValueError(f"None of the {len(judged):,} judged documents is in {documents.source}.")
        parse_measures(measures)  # raises before any model runs
        self.texts = dict(zip(qrels, queries[list(qrels)], strict=True))
        self.qrels = qrels
        self.documents = documents
        self.measures = tuple(measures)
        self.k = k

    def retrieve(self, ranker: Ranker) -> Run:
        """Return the best documents of every query; ties keep the order of the collection.

        Raises:
            ValueError: if the ranker's architecture can only re-rank.
        """
        config = ranker.model.config
        if not config.is_searchable or config.vectors_per_text not in ("one", "per_token"):
            raise ValueError(
                f"A {config.model_type} re-ranks candidates and cannot search a collection: use BERT_Dot or ColBERT, "
                "or a RerankingEvaluator."
            )
        doc_ids = self.documents.ids_of(self.documents.distinct_rows())
        queries = ranker.encode_queries(list(self.texts.values()))
        if config.vectors_per_text == "one":
            results = self._search_vectors(ranker, queries, doc_ids)
        else:
            results = self._search_token_vectors(ranker, queries, doc_ids)
        run = Run()
        for query_id, (scores, rows) in zip(self.texts, results, strict=True):
            run[query_id] = [(doc_ids[row], float(score)) for score, row in zip(scores, rows, strict=True)]
        return run

    def _search_vectors(self, ranker: Ranker, queries: np.ndarray, doc_ids: Sequence) -> list:
        index = faiss.IndexFlatIP(queries.shape[1])
        for start in range(0, len(doc_ids), ENCODED_AT_ONCE):
            index.add(ranker.encode_documents(self.documents[doc_ids[start : start + ENCODED_AT_ONCE]]))
        return search_index(index, queries, self.k)

    def _search_token_vectors(self, ranker: Ranker, queries: Sequence[np.ndarray], doc_ids: Sequence) -> list:
        vectors = ranker.encode_documents(self.documents[doc_ids])  # of (L, D)
        chunks = []
        for start in range(0, len(vectors), DOCUMENTS_AT_ONCE):
            chunk = vectors[start : start + DOCUMENTS_AT_ONCE]
            lengths = np.array([len(tokens) for tokens in chunk])
            chunks.append((start, lengths, np.concatenate(chunk)))
        return search_tokens(queries, chunks, self.k)

    def __call__(self, ranker: Ranker) -> dict[str, float]:
        """Retrieve and measure: measure -> mean over the queries of the qrels."""
        return mean_values(evaluate_queries(self.retrieve(ranker), self.qrels, self.measures))
