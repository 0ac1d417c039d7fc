"""Retrieval from a whole collection by exact search, and its measures."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import faiss
import numpy as np

from ..data.passages import run_of_documents, split_id
from ..data.rankings import Ranking, Run
from ..data.texts import TextStore
from ..errors import InputError
from ..ranker import Ranker
from ..retrieval.colbert import search_tokens
from ..retrieval.dense import search_index
from ..retrieval.sparse import InvertedLists
from .metrics import DEFAULT_MEASURES, Qrels, evaluate_queries, mean_values, parse_measures

DOCUMENTS_AT_ONCE = 1_024
ENCODED_AT_ONCE = 98_304  # vectors in memory besides those of the index


@dataclass(eq=False, repr=False)
class RetrievalEvaluator:
    """Search a collection with a ranker and measure the result; for use in training and elsewhere.

    The vectors of all documents are held in memory during a call.

    Args:
        qrels, measures: as `evaluate_run`; the queries of the qrels are searched for.
        queries, documents: their texts, and the collection.
        k: number of documents per query.
        exclude_same_id: leave out the document with the id of its query, see `without_id`.

    Raises:
        UnknownIdError: if a query of the qrels has no text.
        InputError: if no judged document is in the collection, or a measure is unknown.

    Example:
        >>> queries, documents = kd.TextStore.from_tsv("queries.tsv"), kd.TextStore.from_tsv("collection.tsv")
        >>> evaluator = kd.RetrievalEvaluator(kd.read_qrels("qrels.txt"), queries, documents, ["R@10"], k=10)
        >>> evaluator(kd.Ranker.from_pretrained("bert_dot"))
        {'R@10': ...}
    """

    qrels: Qrels
    queries: TextStore
    documents: TextStore
    measures: Sequence[str] = DEFAULT_MEASURES
    k: int = 1_000
    exclude_same_id: bool = False

    def __post_init__(self) -> None:
        judged = list(chain(*self.qrels.values()))
        if not (self.documents.rows_of_documents(judged) >= 0).any():
            raise InputError(f"None of the {len(judged):,} judged documents is in {self.documents.source}.")
        parse_measures(self.measures)  # raises before any model runs
        self.texts = self.queries[list(self.qrels)]

    def retrieve(self, ranker: Ranker) -> Run:
        """Return the best documents of every query; ties keep the order of the collection.

        A ranker that can only re-rank raises an InputError.
        """
        config = ranker.model.config
        if not config.is_searchable:
            advice = "use BERT_Dot, ColBERT or Splade, or a RerankingEvaluator"
            raise InputError(f"A {config.model_type} re-ranks candidates and cannot search a collection: {advice}.")
        k = self.k + self.exclude_same_id
        doc_ids = list(self.documents.ids())
        if self.documents.aggregation is not None:  # so many passages have k documents
            [(_, most)] = Counter(split_id(passage_id)[0] for passage_id in doc_ids).most_common(1)
            k = min(k * most, len(doc_ids))
        queries = ranker.encode_queries(self.texts)
        if config.vectors_per_text == "one":
            index = faiss.IndexFlatIP(queries.shape[1])
            for start in range(0, len(doc_ids), ENCODED_AT_ONCE):
                index.add(ranker.encode_documents(self.documents[doc_ids[start : start + ENCODED_AT_ONCE]]))
            results = search_index(index, queries, k)
        elif config.vectors_per_text == "sparse":
            vectors = ranker.encode_documents(self.documents[doc_ids])
            results = InvertedLists.build(vectors, np.float32).search(queries, k)
        else:
            vectors, chunks = ranker.encode_documents(self.documents[doc_ids]), []  # (L, D) each
            for start in range(0, len(vectors), DOCUMENTS_AT_ONCE):
                chunk = vectors[start : start + DOCUMENTS_AT_ONCE]
                chunks.append((start, np.fromiter(map(len, chunk), int), np.concatenate(chunk)))
            results = search_tokens(queries, chunks, k)
        run = Run()
        for query_id, (scores, rows) in zip(self.qrels, results, strict=True):
            run[query_id] = Ranking([doc_ids[row] for row in rows], scores)
        run = run_of_documents(run, self.documents.aggregation and "max")
        return (run.without_same_ids() if self.exclude_same_id else run).top(self.k)

    def __call__(self, ranker: Ranker) -> dict[str, float]:
        """Retrieve and measure: measure -> mean over the queries of the qrels."""
        return mean_values(evaluate_queries(self.retrieve(ranker), self.qrels, self.measures))
