"""Measures of a run against qrels, by ir-measures (pytrec_eval underneath)."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from statistics import fmean
from typing import TYPE_CHECKING

from ..data.runs import Run
from . import matchmaker

if TYPE_CHECKING:
    from ir_measures.measures import Measure

DEFAULT_MEASURES = ("nDCG@10", "RR@10")
DIALECTS = ("trec_eval", "matchmaker")
# Queries handed to trec_eval at once: it takes dictionaries, some 100 bytes a ranked document.
QUERIES_AT_ONCE = 500

Qrels = Mapping[str, Mapping[str, int]]


def evaluate_run(
    run: Run, qrels: Qrels, measures: Sequence[str] = DEFAULT_MEASURES, dialect: str = "trec_eval"
) -> dict[str, float]:
    """Mean of each measure over the queries of the qrels; a query without results counts as 0.

    Args:
        run: query_id -> [(doc_id, score)].
        qrels: query_id -> {doc_id: grade}.
        measures: in ir_measures' notation: `nDCG@10` (graded), `RR@10` (the MRR@10 of MS MARCO), `RR(rel=2)@10`,
            `AP(rel=2)`, `R@1000`, `Judged@10` (the share of judged documents).
        dialect: "trec_eval", or "matchmaker" for tables of the paper's code, see `evaluation.matchmaker`.

    Returns:
        The measures as given, each with its mean, 0 to 1.

    Raises:
        ValueError: if a measure is not known, or run and qrels have no query or no document in common.
    """
    scores = evaluate_queries(run, qrels, measures, dialect)
    check_same_collection(run, qrels)
    return mean_values(scores)


def mean_values(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean over the queries of what `evaluate_queries` gives: measure -> mean."""
    return {measure: fmean(by_query.values()) for measure, by_query in values.items()}


def evaluate_queries(
    run: Run, qrels: Qrels, measures: Sequence[str] = DEFAULT_MEASURES, dialect: str = "trec_eval"
) -> dict[str, dict[str, float]]:
    """Each measure for each query of the qrels: measure -> query_id -> value; arguments as `evaluate_run`."""
    import ir_measures  # 0.3 s, and only needed here

    if dialect not in DIALECTS:
        raise ValueError(f"The dialect of measures is one of {', '.join(DIALECTS)}, got {dialect!r}.")
    if not any(query_id in qrels for query_id in run):
        raise ValueError(
            f"Run ({len(run)} queries, first {next(iter(run), None)!r}) and qrels ({len(qrels)} queries, first "
            f"{next(iter(qrels), None)!r}) have no query in common; are they of one data set?"
        )
    parsed = parse_measures(measures)
    if dialect == "matchmaker":
        return {name: matchmaker.evaluate_queries(run, qrels, measure) for name, measure in parsed.items()}
    values, depth = {measure: dict.fromkeys(qrels, 0.0) for measure in set(parsed.values())}, deepest(measures)
    query_ids = [query_id for query_id in run if query_id in qrels]
    for start in range(0, len(query_ids), QUERIES_AT_ONCE):
        some = query_ids[start : start + QUERIES_AT_ONCE]
        judged = {query_id: dict(qrels[query_id]) for query_id in some}
        scored = {query_id: _without_ties(run[query_id], depth) for query_id in some}
        for metric in ir_measures.iter_calc(list(values), judged, scored):
            values[metric.measure][metric.query_id] = metric.value
    return {name: dict(values[measure]) for name, measure in parsed.items()}


def parse_measures(measures: Sequence[str]) -> dict[str, "Measure"]:
    """Measures by the names given.

    Raises:
        ValueError: if one is not known.
    """
    import ir_measures

    try:
        parsed = {measure: ir_measures.parse_measure(measure) for measure in measures}
        for measure in parsed.values():
            measure.validate_params()
    except (NameError, SyntaxError, ValueError, KeyError, AssertionError) as error:  # what ir_measures raises
        raise ValueError(f"Unknown measure in {', '.join(measures)}: {error}; write them as nDCG@10, RR@10.") from None
    return parsed


def deepest(measures: Sequence[str]) -> int | None:
    """The largest cutoff of some measures: documents ranked below change none of them. None: there is no such rank."""
    cutoffs = [measure.params.get("cutoff") for measure in parse_measures(measures).values()]
    return None if None in cutoffs else max(cutoffs)


def check_same_collection(run: Run, qrels: Qrels) -> None:
    """Refuse a run that ranks no judged document at all: the numbers would be zeros without a meaning.

    Raises:
        ValueError: naming documents of both.
    """
    judged = dict.fromkeys(doc_id for grades in qrels.values() for doc_id in grades)
    if not any(doc_id in judged for ranking in run.values() for doc_id, _ in ranking):
        ranked = next((doc_id for ranking in run.values() for doc_id, _ in ranking), None)
        raise ValueError(
            f"Run (first document {ranked!r}) and qrels (first {next(iter(judged), None)!r}) have no document in "
            "common; are they of one collection?"
        )


def _without_ties(ranking: Sequence[tuple[str, float]], depth: int | None) -> dict[str, float]:
    """Ranks as scores, in trec_eval's order (ties by falling document id): ir_measures' providers break ties apart."""
    order = sorted(ranking, key=itemgetter(1, 0), reverse=True)[:depth]
    return {doc_id: float(len(order) - place) for place, (doc_id, _) in enumerate(order)}
