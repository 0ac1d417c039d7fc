"""Re-ranking of a first stage's candidates."""

from collections.abc import Sequence

from ..data.runs import Run
from ..data.texts import TextStore
from ..ranker import Ranker
from .metrics import DEFAULT_MEASURES, Qrels, evaluate_queries, evaluate_run, mean_values

DEPTHS = (10, 20, 50, 100, 200, 1000)


def rerank_run(ranker: Ranker, candidates: Run, queries: TextStore, documents: TextStore) -> Run:
    """Candidates in a ranker's order; ties keep the first stage's.

    Raises:
        KeyError: if a query or document has no text.
        ValueError: if no query has a candidate.
    """
    pairs = [(query_id, doc_id) for query_id, ranking in candidates.items() for doc_id, _ in ranking]
    if not pairs:
        raise ValueError(f"None of the {len(candidates):,} queries has a candidate to re-rank.")
    query_ids, doc_ids = zip(*pairs, strict=True)
    return Run.from_scores(query_ids, doc_ids, ranker.score(queries[query_ids], documents[doc_ids]))


def depth_curve(
    run: Run,
    candidates: Run,
    qrels: Qrels,
    measures: Sequence[str] = DEFAULT_MEASURES,
    depths: Sequence[int] = DEPTHS,
) -> dict[int, dict[str, float]]:
    """What re-ranking only the first d candidates of each query would reach, from one run over all of them.

    Args:
        run: all candidates in a ranker's order; other documents in it are passed over.
        candidates: the first stage's run, in its order.
        qrels: query_id -> {doc_id: grade}.
        measures: in ir_measures' notation.
        depths: numbers of candidates; of those that cover the longest list only the smallest is kept.

    Returns:
        depth -> measure -> mean over the queries of the qrels.

    Raises:
        KeyError: if the run lacks a candidate of a judged query, so that it is no re-ranking of them all.
        ValueError: as `evaluate_run`.
    """
    places = {
        query_id: {doc_id: place for place, (doc_id, _) in enumerate(ranking)}
        for query_id, ranking in candidates.items()
        if query_id in qrels
    }
    for query_id, known in places.items():
        if missing := known.keys() - {doc_id for doc_id, _ in run.get(query_id, ())}:
            raise KeyError(
                f"The run lacks {len(missing):,} of {len(known):,} candidates of query {query_id!r}, for example "
                f"{min(missing)!r}; a depth curve needs a run that scores every candidate."
            )
    depths, longest = sorted(depths), max(map(len, places.values()), default=0)
    curve = {}
    for i, depth in enumerate(depths):
        if i and depths[i - 1] >= longest:
            break
        cut = {q: [(doc, s) for doc, s in run[q] if known.get(doc, depth) < depth] for q, known in places.items()}
        curve[depth] = mean_values(evaluate_queries(Run(cut), qrels, measures))
    return curve


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
        self.last_run: Run | None = None  # what `rerank` gave last

    def rerank(self, ranker: Ranker) -> Run:
        """The candidates in the ranker's order, see `rerank_run`."""
        self.last_run = rerank_run(ranker, self.candidates, self.queries, self.documents)
        return self.last_run

    def __call__(self, ranker: Ranker) -> dict[str, float]:
        """Re-rank and measure: measure -> mean over the queries of the qrels."""
        return evaluate_run(self.rerank(ranker), self.qrels, self.measures)

    def first_stage(self) -> dict[str, float]:
        """The same measures of the candidates as they came."""
        return evaluate_run(self.candidates, self.qrels, self.measures)
