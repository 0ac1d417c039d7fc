"""Re-ranking of a first stage's candidates."""

from collections.abc import Sequence

from ..data.texts import TextStore
from ..data.trec import Run
from ..ranker import Ranker
from .metrics import DEFAULT_MEASURES, Qrels, evaluate_run


def rerank_run(ranker: Ranker, candidates: Run, queries: TextStore, documents: TextStore) -> Run:
    """Candidates in a ranker's order; ties keep the first stage's.

    Raises:
        KeyError: if a query or document has no text.
    """
    pairs = [(query_id, doc_id) for query_id, ranking in candidates.items() for doc_id, _ in ranking]
    query_ids, doc_ids = zip(*pairs, strict=True)
    return Run.from_scores(query_ids, doc_ids, ranker.score(queries[query_ids], documents[doc_ids]))


class RerankingEvaluator:
    """Re-ranks candidates with a ranker and measures the result; usable inside training and outside.

    Args:
        candidates: the first stage's run; queries without qrels are left out.
        qrels: query_id -> {doc_id: grade}.
        queries: query_id -> text.
        documents: doc_id -> text.
        measures: in ir_measures' notation.
        depth: candidates a query; None takes all.

    Raises:
        ValueError: if candidates and qrels have no query in common.
    """

    def __init__(
        self,
        candidates: Run,
        qrels: Qrels,
        queries: TextStore,
        documents: TextStore,
        measures: Sequence[str] = DEFAULT_MEASURES,
        depth: int | None = None,
    ) -> None:
        evaluate_run(candidates, qrels, measures)  # refuses what cannot be measured before any model runs
        self.candidates = Run({query_id: candidates[query_id] for query_id in candidates if query_id in qrels})
        self.candidates = self.candidates.top(depth) if depth else self.candidates
        self.qrels = qrels
        self.queries = queries
        self.documents = documents
        self.measures = tuple(measures)

    def rerank(self, ranker: Ranker) -> Run:
        """The candidates in the ranker's order, see `rerank_run`."""
        return rerank_run(ranker, self.candidates, self.queries, self.documents)

    def __call__(self, ranker: Ranker) -> dict[str, float]:
        """Re-rank and measure: measure -> mean over the queries of the qrels."""
        return evaluate_run(self.rerank(ranker), self.qrels, self.measures)

    def first_stage(self) -> dict[str, float]:
        """The same measures of the candidates as they came."""
        return evaluate_run(self.candidates, self.qrels, self.measures)
