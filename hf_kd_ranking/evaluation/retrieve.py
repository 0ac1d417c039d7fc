"""Retrieval from a whole collection: encoded and searched exactly, measured; usable inside training."""

from collections.abc import Mapping, Sequence

import faiss
import numpy as np

from ..data.runs import Run
from ..data.texts import TextStore
from ..ranker import Ranker
from ..retrieval.colbert import search_tokens
from ..retrieval.dense import search_index
from .metrics import DEFAULT_MEASURES, evaluate_queries, evaluate_run, mean_values

DOCUMENTS_AT_ONCE = 1_024
ENCODED_AT_ONCE = 98_304  # vectors beside those of the index


class RetrievalEvaluator:
    """Searches a collection with a ranker and measures the result. The vectors are held in memory, for one call.

    Args:
        qrels: query_id -> {doc_id: grade}; its queries are searched for.
        queries: query_id -> text.
        documents: the collection.
        measures: in ir_measures' notation.
        k: documents a query.

    Raises:
        KeyError: if a query of the qrels has no text.
        ValueError: if no judged document is in the collection.
    """

    def __init__(
        self,
        qrels: Mapping[str, Mapping[str, int]],
        queries: TextStore,
        documents: TextStore,
        measures: Sequence[str] = DEFAULT_MEASURES,
        k: int = 1_000,
    ) -> None:
        judged = [doc_id for grades in qrels.values() for doc_id in grades]
        if not (documents.rows_of(judged) >= 0).any():
            raise ValueError(f"None of the {len(judged):,} judged documents is in {documents.source}.")
        self.texts = dict(zip(qrels, queries[list(qrels)], strict=True))
        evaluate_run(Run.from_scores(list(qrels)[:1], judged[:1], [0.0]), qrels, measures)  # refuses unknown measures
        self.qrels = qrels
        self.documents = documents
        self.measures = tuple(measures)
        self.k = k

    def retrieve(self, ranker: Ranker) -> Run:
        """The best documents of every query by a BERT_DOT or a ColBERT; ties in the order of the collection.

        Raises:
            ValueError: if the ranker is another one, which re-ranks only.
        """
        if ranker.model.config.model_type not in ("BERT_Dot", "ColBERT"):
            raise ValueError(
                f"A {ranker.model.config.model_type} ranks candidates and searches no collection: use BERT_Dot or "
                "ColBERT, or a RerankingEvaluator."
            )
        rows = self.documents.distinct_rows()
        ids = self.documents.ids_of(rows)
        queries = ranker.encode_queries(list(self.texts.values()))
        if isinstance(queries, np.ndarray):
            index = faiss.IndexFlatIP(queries.shape[1])
            for start in range(0, len(ids), ENCODED_AT_ONCE):
                index.add(ranker.encode_documents(self.documents[ids[start : start + ENCODED_AT_ONCE]]))
            results = search_index(index, queries, self.k)
        else:
            vectors = ranker.encode_documents(self.documents[ids])  # of (L, D)
            parts = [(i, vectors[i : i + DOCUMENTS_AT_ONCE]) for i in range(0, len(vectors), DOCUMENTS_AT_ONCE)]
            chunks = ((i, np.array([len(terms) for terms in part]), np.concatenate(part)) for i, part in parts)
            results = search_tokens(queries, chunks, self.k)
        return Run(
            (query_id, [(ids[row], float(score)) for score, row in zip(scores, found, strict=True)])
            for query_id, (scores, found) in zip(self.texts, results, strict=True)
        )

    def __call__(self, ranker: Ranker) -> dict[str, float]:
        """Retrieve and measure: measure -> mean over the queries of the qrels."""
        return mean_values(evaluate_queries(self.retrieve(ranker), self.qrels, self.measures))
