"""Hybrid search: several runs over the same queries become one."""

from collections.abc import Sequence

from ..data.runs import Run

METHODS = ("reciprocal_rank", "weighted_sum")


def fuse_runs(
    runs: Sequence[Run], method: str = "reciprocal_rank", weights: Sequence[float] | None = None, constant: int = 60
) -> Run:
    """Fuse runs; a document that a run does not list gets nothing from it.

    Args:
        runs: rankings of the same collection; a query may be missing in some.
        method: "reciprocal_rank", the sum of weight / (constant + rank) with ranks from 1 (Cormack et al. 2009,
            https://doi.org/10.1145/1571941.1572114), which needs no common scale; or "weighted_sum" of scores that are
            scaled to 0..1 in each ranking (a ranking of equal scores gives 1).
        weights: one a run; None for equal ones that sum to 1.
        constant: of reciprocal ranks.

    Returns:
        All documents of each query, best first; ties in the order of the runs.

    Raises:
        ValueError: if there are no runs, the method is unknown, or the weights are not one a run.
    """
    if method not in METHODS:
        raise ValueError(f"Runs are fused by {' or '.join(METHODS)}, got {method!r}.")
    weights = [1 / max(len(runs), 1)] * len(runs) if weights is None else list(weights)
    if not runs or len(weights) != len(runs):
        raise ValueError(f"Fusion needs at least one run and a weight for each, got {len(runs)} and {len(weights)}.")
    fused = Run()
    for query_id in dict.fromkeys(query_id for run in runs for query_id in run):
        sums: dict[str, float] = {}
        for run, weight in zip(runs, weights, strict=True):
            ranking = run.get(query_id, [])
            values = _ranks(ranking, constant) if method == "reciprocal_rank" else _scaled(ranking)
            for (doc_id, _), value in zip(ranking, values, strict=True):
                sums[doc_id] = sums.get(doc_id, 0.0) + weight * value
        fused[query_id] = sorted(sums.items(), key=lambda scored: -scored[1])
    return fused


def _ranks(ranking: Sequence[tuple[str, float]], constant: int) -> list[float]:
    return [1 / (constant + rank) for rank in range(1, len(ranking) + 1)]


def _scaled(ranking: Sequence[tuple[str, float]]) -> list[float]:
    scores = [score for _, score in ranking]
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    return [1.0 if high == low else (score - low) / (high - low) for score in scores]
