"""Measures of a run against qrels, by ir-measures (pytrec_eval underneath)."""

from collections.abc import Mapping, Sequence

from ..data.formats import Run

DEFAULT_MEASURES = ("nDCG@10", "RR@10")


def evaluate_run(
    run: Run, qrels: Mapping[str, Mapping[str, int]], measures: Sequence[str] = DEFAULT_MEASURES
) -> dict[str, float]:
    """Mean of each measure over the queries of the qrels; a query without results counts as 0.

    Args:
        run: query_id -> [(doc_id, score)].
        qrels: query_id -> {doc_id: grade}.
        measures: in ir_measures' notation: `nDCG@10` (graded), `RR@10` (the MRR@10 of MS MARCO), `RR(rel=2)@10`,
            `AP(rel=2)`, `R@1000`.

    Returns:
        The measures as given, each with its mean, 0 to 1.

    Raises:
        ValueError: if a measure is not known, or run and qrels have no query in common.
    """
    scores = evaluate_queries(run, qrels, measures)
    return {measure: sum(by_query.values()) / len(by_query) for measure, by_query in scores.items()}


def evaluate_queries(
    run: Run, qrels: Mapping[str, Mapping[str, int]], measures: Sequence[str] = DEFAULT_MEASURES
) -> dict[str, dict[str, float]]:
    """Each measure for each query of the qrels: measure -> query_id -> value; arguments as `evaluate_run`."""
    import ir_measures  # 0.3 s, and only needed here

    if not any(query_id in qrels for query_id in run):
        raise ValueError(
            f"Run ({len(run)} queries, first {next(iter(run), None)!r}) and qrels ({len(qrels)} queries, first "
            f"{next(iter(qrels), None)!r}) have no query in common; are they of one data set?"
        )
    try:
        parsed = {measure: ir_measures.parse_measure(measure) for measure in measures}
        for measure in parsed.values():
            measure.validate_params()
    except (NameError, SyntaxError, ValueError, KeyError, AssertionError) as error:  # what ir_measures raises
        raise ValueError(f"Unknown measure in {', '.join(measures)}: {error}; write them as nDCG@10, RR@10.") from None
    scored = {query_id: _without_ties(ranking) for query_id, ranking in run.items() if query_id in qrels}
    values = {measure: dict.fromkeys(qrels, 0.0) for measure in set(parsed.values())}
    for metric in ir_measures.iter_calc(list(values), {q: dict(g) for q, g in qrels.items()}, scored):
        values[metric.measure][metric.query_id] = metric.value
    return {name: dict(values[measure]) for name, measure in parsed.items()}


def _without_ties(ranking: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Ranks as scores, in trec_eval's order (ties by falling document id): ir_measures' providers break ties apart."""
    order = sorted(ranking, key=lambda scored: (scored[1], scored[0]))
    return {doc_id: float(place) for place, (doc_id, _) in enumerate(order)}
