"""Fuse several runs over the same queries into one (hybrid search)."""

from collections.abc import Sequence

from ..data.runs import Run

METHODS = ("reciprocal_rank", "weighted_sum")


def fuse_runs(
    runs: Sequence[Run], method: str = "reciprocal_rank", weights: Sequence[float] | None = None, constant: int = 60
) -> Run:
    """Fuse runs into one of all their documents, best first; ties are in the order of the runs.

    A document that a run does not contain gets nothing from it.

    Args:
        runs: rankings of the same collection; a query may be missing in some.
        method: "reciprocal_rank", the sum of weight / (constant + rank) with ranks from 1 (Cormack et al. 2009,
            https://doi.org/10.1145/1571941.1572114), which needs no common scale; or "weighted_sum" of scores that are
            scaled to 0..1 in each ranking (a ranking of equal scores gives 1).
        weights: one per run; None for equal ones that sum to 1.
        constant: the constant of reciprocal ranks.

    Raises:
        ValueError: if no runs are given, the method is unknown, or there is not one weight per run.
    """
    if method not in METHODS:
        raise ValueError(f"Runs are fused by {' or '.join(METHODS)}, got {method!r}.")
    weights = [1 / max(len(runs), 1)] * len(runs) if weights is None else list(weights)
    if not runs or len(weights) != len(runs):
        raise ValueError(f"Fusion needs at least one run and a weight for each, got {len(runs)} and {len(weights)}.")
    sums: dict[str, dict[str, float]] = {}
    for run, weight in zip(runs, weights, strict=True):
        for query_id, ranking in run.items():
            values = _values(ranking, method, constant)
            totals = sums.setdefault(query_id, {})
            for (doc_id, _), value in zip(ranking, values, strict=True):
                totals[doc_id] = totals.get(doc_id, 0.0) + weight * value
    fused = Run()
    for query_id, totals in sums.items():
        fused[query_id] = sorted(totals.items(), key=lambda scored: -scored[1])
    return fused


def _values(ranking: Sequence[tuple[str, float]], method: str, constant: int) -> list[float]:
    """Return what each document of a ranking adds to its sum."""
    if method == "reciprocal_rank":
        return [1 / (constant + rank) for rank in range(1, len(ranking) + 1)]
    scores = [score for _, score in ranking]
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    if high == low:
        return [1.0] * len(scores)
    return [(score - low) / (high - low) for score in scores]
