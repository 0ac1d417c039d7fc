"""Re-ranking of the candidates of a first stage."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.passages import run_of_documents, to_passages
from ..data.rankings import Run, as_run
from ..data.texts import TextStore
from ..errors import InputError, UnknownIdError
from ..ranker import Ranker
from .metrics import DEFAULT_MEASURES, Qrels, evaluate_queries, evaluate_run, mean_values

DEPTHS = (10, 20, 50, 100, 200, 1000)


def rerank_run(ranker: Ranker, candidates: Run, queries: TextStore, documents: TextStore) -> Run:
    """Return the candidates, at least one, in the order of a ranker; ties keep the order of the first stage.

    In a collection of passages, all passages of a candidate are scored, and aggregated to the score of the document.
    """
    candidates = as_run(candidates)
    if documents.aggregation is not None:
        candidates = to_passages(candidates, documents, f"texts of {documents.source}")
    query_ids, doc_ids = [], []
    for query_id, ranking in candidates.items():
        for doc_id, _ in ranking:
            query_ids.append(query_id)
            doc_ids.append(doc_id)
    if not query_ids:
        raise InputError(f"None of the {len(candidates):,} queries has a candidate to re-rank.")
    scored = Run.from_scores(query_ids, doc_ids, ranker.score(queries[query_ids], documents[doc_ids]))
    run = Run({query_id: scored.get(query_id, []) for query_id in candidates})
    return run_of_documents(run, documents.aggregation)


def depth_curve(
    run: Run, candidates: Run, qrels: Qrels, measures: Sequence[str] = DEFAULT_MEASURES, depths: Sequence[int] = DEPTHS
) -> dict[int, dict[str, float]]:
    """Compute the measures of re-ranking only the first d candidates of each query, from one run over all of them.

    Args:
        run: all candidates in the order of a ranker; other documents in it are ignored.
        candidates: the first stage's run, in its order.
        depths: numbers of candidates; only the smallest of those that cover the longest list is used.

    Returns:
        depth -> measure -> mean over the queries of the qrels.

    Raises:
        UnknownIdError: if the run lacks a candidate of a judged query.
    """
    run, candidates = as_run(run), as_run(candidates)
    places, longest = {}, 0
    for query_id, ranking in candidates.items():
        if query_id not in qrels:
            continue
        by_document = {doc_id: place for place, (doc_id, _) in enumerate(ranking)}
        missing = by_document.keys() - dict(run.get(query_id, ())).keys()
        if missing:
            counts = f"{len(missing):,} of {len(by_document):,} candidates of query {query_id!r}"
            raise UnknownIdError(
                f"The run lacks {counts}, for example {min(missing)!r}; a depth curve needs all of them."
            )
        places[query_id] = by_document
        longest = max(longest, len(by_document))
    curve = {}
    for depth in sorted(depths):
        top = Run()
        for query_id, by_document in places.items():
            top[query_id] = [scored for scored in run[query_id] if by_document.get(scored[0], depth) < depth]
        curve[depth] = mean_values(evaluate_queries(top, qrels, measures))
        if depth >= longest:
            break
    return curve


@dataclass(eq=False, repr=False)
class RerankingEvaluator:
    """Re-rank candidates with a ranker and measure the result; for use in training and elsewhere.

    Args:
        candidates: the first stage's run; queries without qrels are left out.
        qrels, measures: as `evaluate_run`.
        queries, documents: their texts.
        depth: number of candidates per query; None takes all.

    Raises:
        InputError: if candidates and qrels have no query in common, or a measure is unknown.

    Example:
        >>> queries, documents = kd.TextStore.from_tsv("queries.tsv"), kd.TextStore.from_tsv("collection.tsv")
        >>> candidates, qrels = kd.read_run("bm25.trec"), kd.read_qrels("qrels.txt")
        >>> evaluator = kd.RerankingEvaluator(candidates, qrels, queries, documents, ["RR@10"])
        >>> evaluator(kd.Ranker.from_pretrained("bert_cat"))
        {'RR@10': ...}
    """

    candidates: Run
    qrels: Qrels
    queries: TextStore
    documents: TextStore
    measures: Sequence[str] = DEFAULT_MEASURES
    depth: int | None = None

    def __post_init__(self) -> None:
        self.candidates = as_run(self.candidates)
        evaluate_run(self.candidates, self.qrels, self.measures)  # raises before any model runs
        judged = Run()
        for query_id, ranking in self.candidates.items():
            if query_id in self.qrels:
                judged[query_id] = ranking[: self.depth or None]
        self.candidates = judged

    def rerank(self, ranker: Ranker) -> Run:
        """Return the candidates in the order of the ranker, see `rerank_run`."""
        return rerank_run(ranker, self.candidates, self.queries, self.documents)

    def measure(self, run: Run) -> dict[str, float]:
        """Measure a run: measure -> mean over the queries of the qrels."""
        return evaluate_run(run, self.qrels, self.measures)

    def __call__(self, ranker: Ranker) -> dict[str, float]:
        """Re-rank with the ranker and measure the result."""
        return self.measure(self.rerank(ranker))

    def first_stage(self) -> dict[str, float]:
        """Measure the candidates in the order of the first stage."""
        return self.measure(self.candidates)
