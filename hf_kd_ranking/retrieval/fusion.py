"""Fuse several runs over the same queries into one (hybrid search)."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from ..data.rankings import Ranking, Run, as_run
from ..errors import InputError, UnknownIdError

METHODS = ("reciprocal_rank", "weighted_sum", "standardized")


def fuse_runs(
    runs: Sequence[Run], method: str = "reciprocal_rank", weights: Sequence[float] | None = None, constant: int = 60
) -> Run:
    """Fuse runs into one of all their documents, best first; ties are in the order of the runs.

    A document that a run does not contain gets nothing from it, unless scores are standardized.

    Args:
        runs: rankings of the same collection; a query may be missing in some.
        method: "reciprocal_rank", the sum of weight / (constant + rank) with ranks from 1 (Cormack et al. 2009,
            https://doi.org/10.1145/1571941.1572114), which needs no common scale; "weighted_sum" of scores that are
            scaled to 0..1 in each ranking (a ranking of equal scores gives 1); or "standardized", the weighted sum of
            scores minus their run's mean, divided by the root mean square of their deviations from the means of their
            queries: margins within queries have one unit in all runs, and remain larger where a run is more certain.
            A document that a run lacks has there the lowest score of the query.
        weights: one per run; None for equal ones that sum to 1.
        constant: the constant of reciprocal ranks.

    Raises:
        InputError: if no runs are given, the method is unknown, or there is not one weight per run.
        UnknownIdError: naming the query, if scores are standardized and a run has no document for a query of another.
    """
    if method not in METHODS:
        raise InputError(f"Runs are fused by {' or '.join(METHODS)}, got {method!r}.")
    weights = [1 / max(len(runs), 1)] * len(runs) if weights is None else list(weights)
    if not runs or len(weights) != len(runs):
        raise InputError(f"Fusion needs at least one run and a weight for each, got {len(runs)} and {len(weights)}.")
    runs = list(map(as_run, runs))
    if method == "standardized":
        runs = _standardize(runs)
    fused = Run()
    for query_id in dict.fromkeys(chain.from_iterable(runs)):
        totals: dict[str, float] = {}
        for run, weight in zip(runs, weights, strict=True):
            ranking = run.get(query_id, ())
            for (doc_id, _), value in zip(ranking, _values(ranking, method, constant), strict=True):
                totals[doc_id] = totals.get(doc_id, 0.0) + weight * value
        doc_ids = sorted(totals, key=totals.get, reverse=True)  # stable
        fused[query_id] = Ranking(doc_ids, [totals[doc_id] for doc_id in doc_ids])
    return fused


def _standardize(runs: Sequence[Run]) -> list[Run]:
    """Return runs of standardized scores that all have the same documents for each query."""
    doc_ids: dict[str, dict[str, None]] = {}
    for query_id, ranking in chain.from_iterable(run.items() for run in runs):
        doc_ids.setdefault(query_id, {}).update(dict.fromkeys(doc_id for doc_id, _ in ranking))
    standardized = []
    for number, run in enumerate(runs, start=1):
        mean, unit = _mean_and_unit(run)
        result = Run()
        for query_id, wanted in doc_ids.items():
            scores = {doc_id: (score - mean) / unit for doc_id, score in run.get(query_id, ())}
            if wanted and not scores:
                raise UnknownIdError(
                    f"Run {number} of {len(runs)} has no document for query {query_id!r}, which another has; "
                    "standardized scores are fused over the same queries."
                )
            lowest = min(scores.values(), default=0.0)
            for doc_id in wanted:
                scores.setdefault(doc_id, lowest)
            result[query_id] = Ranking(list(scores), list(scores.values()))
        standardized.append(result)
    return standardized


def _mean_and_unit(run: Run) -> tuple[float, float]:
    """Return the mean of a run's scores, and the root mean square of deviations from the means of their queries."""
    count, total, squares = 0, 0.0, 0.0
    for ranking in run.values():
        scores = np.array([score for _, score in ranking])
        if len(scores):
            count += len(scores)
            total += scores.sum()
            squares += ((scores - scores.mean()) ** 2).sum()
    if count == 0:
        return 0.0, 1.0
    return float(total / count), float(squares / count) ** 0.5 or 1.0


def mix_runs(runs: Sequence[Run], shares: Sequence[float], k: int | None = None) -> Run:
    """Take from each run its share of k documents per query, spread evenly over its ranks.

    A document that an earlier run has given is not replaced, so that a query may get fewer than k.

    Args:
        runs: rankings of the same collection; a query may be missing in some.
        shares: one per run, above 0; they sum to 1.
        k: documents per query; None takes the length of the query's longest ranking.

    Returns:
        Documents in the order of the runs; scores are places, from 0 downwards.

    Raises:
        InputError: if there is not one share per run, or they do not sum to 1.
    """
    if not runs or len(shares) != len(runs) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-3:
        raise InputError(f"Needed a share above 0 for each of {len(runs)} runs, with the sum 1, got {list(shares)}.")
    mixed = Run()
    for query_id in dict.fromkeys(chain(*runs)):
        rankings = [run.get(query_id, []) for run in runs]
        most = max(map(len, rankings)) if k is None else k
        doc_ids: dict[str, None] = {}
        for found, share in zip(rankings, shares, strict=True):
            wanted = min(round(share * most), len(found))
            for number in range(wanted):
                doc_ids.setdefault(found[number * len(found) // wanted][0])
        mixed[query_id] = [(doc_id, float(-place)) for place, doc_id in enumerate(doc_ids)]
    return mixed


def _values(ranking: Sequence[tuple[str, float]], method: str, constant: int) -> list[float]:
    """Return what each document of a ranking adds to its sum."""
    if method == "reciprocal_rank":
        return [1 / (constant + rank) for rank in range(1, len(ranking) + 1)]
    scores = [score for _, score in ranking]
    if method == "standardized":
        return scores
    return scale_scores(scores)


def scale_scores(scores: Sequence[float]) -> list[float]:
    """Scale the scores of one ranking to 0..1; equal scores give 1."""
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    if high == low:
        return [1.0] * len(scores)
    return [(score - low) / (high - low) for score in scores]
