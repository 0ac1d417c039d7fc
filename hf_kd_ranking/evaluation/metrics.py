"""Measures of a run against qrels, computed by ir-measures (with pytrec_eval)."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from ..data.rankings import Run, as_run
from ..data.runs import as_qrels, trec_eval_scores
from ..errors import InputError

if TYPE_CHECKING:
    from ir_measures.measures import Measure

DEFAULT_MEASURES = ("nDCG@10", "RR@10")
QUERIES_AT_ONCE = 500  # per call of trec_eval, which takes dictionaries of about 100 bytes per ranked document

Qrels = Mapping[str, Mapping[str, int]]


def evaluate_run(run: Run, qrels: Qrels, measures: Sequence[str] = DEFAULT_MEASURES) -> dict[str, float]:
    """Return the mean of each measure, 0 to 1, over the queries of the qrels; a query without results counts as 0.

    Args:
        run: query_id -> [(doc_id, score)], or {doc_id: score}. As in trec_eval, scores are compared as float32, and
            ties are broken by descending doc_id.
        qrels: query_id -> {doc_id: grade}, an integer.
        measures: in ir_measures' notation: `nDCG@10` (graded), `RR@10` (the MRR@10 of MS MARCO), `RR(rel=2)@10`,
            `AP(rel=2)`, `R@1000`, `Judged@10` (the share of judged documents).

    Raises:
        InputError: if a measure is unknown, a score or grade is not a number, or run and qrels have no query or no
            document in common.

    Example:
        >>> kd.evaluate_run({"q1": [("d1", 2.0), ("d2", 1.0)]}, {"q1": {"d2": 1}}, ["RR@10", "R@1"])
        {'RR@10': 0.5, 'R@1': 0.0}
    """
    run, qrels = as_run(run), as_qrels(qrels)
    values = evaluate_queries(run, qrels, measures)
    check_same_collection(run, qrels)
    return mean_values(values)


def mean_values(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the means over the queries of values from `evaluate_queries`: measure -> mean."""
    return {measure: fmean(by_query.values()) for measure, by_query in values.items()}


def evaluate_queries(
    run: Run, qrels: Qrels, measures: Sequence[str] = DEFAULT_MEASURES
) -> dict[str, dict[str, float]]:
    """Compute each measure for each query of the qrels: measure -> query_id -> value; arguments as `evaluate_run`."""
    import ir_measures  # takes 0.3 s

    run, qrels = as_run(run), as_qrels(qrels)
    query_ids = sorted(run.keys() & qrels.keys())
    if not query_ids:
        of_run = f"{len(run)} queries, first {next(iter(run), None)!r}"
        of_qrels = f"{len(qrels)} queries, first {next(iter(qrels), None)!r}"
        raise InputError(f"Run ({of_run}) and qrels ({of_qrels}) have no query in common; are they of one data set?")
    parsed = parse_measures(measures)
    cutoff = deepest(measures)
    values, by_measure = {}, {}  # two names may be one measure
    for name, measure in parsed.items():
        values[name] = by_measure.setdefault(measure, dict.fromkeys(qrels, 0.0))
    for start in range(0, len(query_ids), QUERIES_AT_ONCE):
        judgments, rankings = {}, {}
        for query_id in query_ids[start : start + QUERIES_AT_ONCE]:
            judgments[query_id] = qrels[query_id]
            # Places in the order of trec_eval instead of scores: the libraries of ir_measures break ties differently.
            scores = trec_eval_scores([score for _, score in run[query_id]]).tolist()
            doc_ids = [doc_id for doc_id, _ in run[query_id]]
            best_first = sorted(zip(scores, doc_ids, strict=True), reverse=True)[:cutoff]
            rankings[query_id] = {doc_id: -float(place) for place, (_, doc_id) in enumerate(best_first)}
        try:
            for metric in ir_measures.iter_calc(list(by_measure), judgments, rankings):
                by_measure[metric.measure][metric.query_id] = metric.value
        except RuntimeError as error:  # of a measure whose library is not installed
            raise InputError(f"ir_measures: {' '.join(str(error).split())}") from None
    return values


def parse_measures(measures: Sequence[str]) -> dict[str, "Measure"]:
    """Return the measures of ir_measures by name; an unknown measure, or none at all, raises an InputError."""
    import ir_measures

    if isinstance(measures, str) or not all(isinstance(name, str) for name in measures or ()):
        raise TypeError(f"Measures are a list of names such as nDCG@10, got {measures!r}.")
    if not measures:
        raise InputError("At least one measure is needed, for example nDCG@10.")
    parsed = {}
    for name in measures:
        try:
            parsed[name] = ir_measures.parse_measure(name)
            parsed[name].validate_params()
        except (NameError, SyntaxError, ValueError, KeyError, AssertionError) as error:  # all raised by ir_measures
            message = f"Unknown measure in {', '.join(measures)}: {error}; write them as nDCG@10, RR@10."
            raise InputError(message) from None
        for parameter in ("cutoff", "rel"):  # trec_eval ends the whole process if one is below 1, or too large for C
            value = parsed[name].params.get(parameter, 1)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise InputError(f"The {parameter} of {name} is an integer from 1, got {value!r}.")
    return parsed


def deepest(measures: Sequence[str]) -> int | None:
    """Return the largest cutoff, below which documents do not change the measures; None if a measure has no cutoff."""
    largest = 0
    for measure in parse_measures(measures).values():
        if "cutoff" not in measure.params:
            return None
        largest = max(largest, measure.params["cutoff"])
    return largest


def check_same_collection(run: Run, qrels: Qrels) -> None:
    """Raise an InputError for a run that ranks no judged document: its values would be zeros without a meaning."""
    judged = set().union(*qrels.values())
    for ranking in run.values():
        if not judged.isdisjoint(dict(ranking)):
            return
    ranked = next((ranking[0][0] for ranking in run.values() if ranking), None)
    raise InputError(
        f"Run (first document {ranked!r}) and qrels (first {min(judged, default=None)!r}) have no document in common; "
        "are they of one collection?"
    )
