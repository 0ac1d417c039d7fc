"""Significance tests of the differences between rankers."""

import logging
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data.rankings import Run, as_run
from ..data.runs import as_qrels
from ..errors import InputError
from .metrics import DEFAULT_MEASURES, Qrels, check_same_collection, evaluate_queries, mean_values

RESAMPLES = 10_000
DECIMALS = 12  # of differences; the others are rounding errors
FEW_QUERIES = 30  # fewer make p-values and intervals unreliable
RESAMPLING = {"n_resamples": RESAMPLES, "vectorized": True, "batch": 100}  # options of scipy
logger = logging.getLogger(__name__)

PAIRS_HEADER = (
    "| measure | treatment - control | difference | 95 % interval | p (t-test) | p ({correction}) | p (randomisation) "
    "| effect size | wins / ties / losses |"
)
PAIR_ROW = (
    "| {measure} | {treatment} - {control} | {difference:+.4f} | {interval[0]:+.4f} to {interval[1]:+.4f} "
    "| {p_value:.2g} | {p_corrected:.2g} | {p_randomisation:.2g} | {effect} | {wins} / {ties} / {losses} |"
)


def compare_runs(
    runs: Mapping[str, Run],
    qrels: Qrels,
    measures: Sequence[str] = DEFAULT_MEASURES,
    correction: str = "holm",
    intersect: bool = False,
    moved: int = 5,
    seed: int = 42,
) -> dict[str, Any]:
    """Compare all pairs of runs on every measure.

    Args:
        runs: name -> run, at least two.
        qrels, measures: as `evaluate_run`; a query that no run has counts as 0 for all runs.
        correction: name in `CORRECTIONS`, applied to the p-values over all pairs of a measure.
        intersect: True compares the queries that all runs have, where they differ; False refuses such runs.
        moved: number of queries listed per pair and measure, those with the largest differences.
        seed: seed of the resampling.

    Returns:
        `queries` (their number), `correction`, `means` {run: {measure: mean}}, and `pairs`, each with `control`,
        `treatment`, `measure`, `difference` (treatment minus control), `interval` (95 %, bootstrap over queries),
        `p_value` (see `paired_t_test`), `p_randomisation` (sign flips), `p_corrected` (of `p_value`), `effect_size`
        (mean over standard deviation of the differences; None if all differ by the same), `wins`, `ties`, `losses`,
        `moved` [[query_id, difference]]. A warning is logged for fewer than 30 queries.

    Raises:
        InputError: if there are fewer than two runs, their judged queries differ or are fewer than two, or the
            correction is unknown.

    Example:
        >>> runs = {"bm25": kd.read_run("bm25.trec"), "dense": kd.read_run("dense.trec")}
        >>> result = kd.compare_runs(runs, kd.read_qrels("qrels.txt"), ["RR@10"])
        >>> pair = result["pairs"][0]
        >>> pair["control"], pair["treatment"]
        ('bm25', 'dense')
    """
    if len(runs) < 2 or correction not in CORRECTIONS:
        needed = f"at least two runs and a correction, one of {', '.join(CORRECTIONS)}"
        raise InputError(f"A comparison needs {needed}; got {len(runs)} and {correction!r}.")
    values, judged, qrels = {}, {}, as_qrels(qrels)
    for name in runs:
        run = as_run(runs[name])
        values[name] = evaluate_queries(run, qrels, measures)
        check_same_collection(run, qrels)
        judged[name] = run.keys() & qrels.keys()
        del run  # where runs are read from files on access, only one at a time is in memory
    shared = shared_queries(judged, qrels, intersect)
    for by_measure in values.values():
        for measure, by_query in by_measure.items():
            by_measure[measure] = {query_id: by_query[query_id] for query_id in shared}
    return compare_values(values, correction, moved, seed)


def compare_values(
    values: Mapping[str, Mapping[str, Mapping[str, float]]], correction: str = "holm", moved: int = 5, seed: int = 42
) -> dict[str, Any]:
    """Compare all pairs as `compare_runs`, by `values` of the same queries: name -> measure -> query_id -> value."""
    means = dict(zip(values, map(mean_values, values.values()), strict=True))
    first, pairs = next(iter(values.values())), []
    queries = len(next(iter(first.values())))
    if queries < FEW_QUERIES:
        logger.warning(
            "%d queries are few for a comparison: p-values and intervals are reliable from about %d on.",
            queries,
            FEW_QUERIES,
        )
    for measure in first:
        tests = []
        for control, treatment in tqdm(list(combinations(values, 2)), desc=f"Comparing {measure}", delay=3):
            names = {"control": control, "treatment": treatment, "measure": measure}
            tests.append(names | _compare(values[treatment][measure], values[control][measure], moved, seed))
        correct(tests, correction)
        pairs.extend(tests)
    return {"queries": queries, "correction": correction, "means": means, "pairs": pairs}


def shared_queries(judged: Mapping[str, set[str]], qrels: Mapping[str, Any], intersect: bool = False) -> list[str]:
    """Return the queries on which to compare runs, in the order of the qrels: all, or those in common (`intersect`).

    `judged` is run -> the queries of the qrels that it has. An InputError is raised for different queries without
    `intersect`, and for fewer than two in common.
    """
    common = set.intersection(*judged.values())
    not_common = set.union(*judged.values()) - common
    if not_common and not intersect:
        counts = ", ".join(f"{name} {len(query_ids):,}" for name, query_ids in judged.items())
        raise InputError(
            f"The runs have results for different judged queries ({counts}; {len(common):,} in common, not in all: "
            f"{', '.join(sorted(not_common)[:3])}); complete them, or compare those in common with intersect."
        )
    if len(common) < 2:
        raise InputError(f"A comparison needs at least two judged queries in common, got {len(common)}.")
    return [query_id for query_id in qrels if query_id in common or not intersect]


def comparison_text(result: Mapping[str, Any]) -> str:
    """Format a result of `compare_runs` as Markdown tables: means, then pairs."""
    measures = list(next(iter(result["means"].values())))
    lines = [f"| run ({result['queries']:,} queries) | {' | '.join(measures)} |", "|---" * (len(measures) + 1) + "|"]
    for name, means in result["means"].items():
        lines.append(f"| {name} | {' | '.join(map('{:.4f}'.format, means.values()))} |")
    lines += ["", PAIRS_HEADER.format_map(result), "|---" * PAIR_ROW.count(" |") + "|"]
    for pair in result["pairs"]:
        effect = "-" if pair["effect_size"] is None else f"{pair['effect_size']:.2g}"
        lines.append(PAIR_ROW.format_map({**pair, "effect": effect}))
    return "\n".join(lines)


def compare_with_first_stage(
    reranked: Mapping[str, Mapping[str, float]], first_stage: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """Compare a re-ranking with its first stage for a model card, both measure -> query_id -> value.

    Returns `first_stage` and `after` (measure -> mean) and `tests` (measure -> `paired_t_test` of the two).
    """
    tests = {}
    for measure, by_query in first_stage.items():
        tests[measure] = paired_t_test(reranked[measure], by_query)
    return {"first_stage": mean_values(first_stage), "after": mean_values(reranked), "tests": tests}


def paired_t_test(treatment: Mapping[str, float], control: Mapping[str, float]) -> dict[str, float]:
    """Run a paired two-sided t-test over at least two queries (scipy), both query_id -> value of a measure.

    Returns `difference` (mean of treatment minus control), `p_value` and `queries`. Where all queries differ by the
    same there is no variance to compare with, and the p-value is that of the randomisation test; it is 1.0 where no
    query differs. Different or too few queries raise an InputError.
    """
    from scipy.stats import ttest_1samp  # takes 0.6 s

    if treatment.keys() != control.keys() or len(treatment) < 2:
        counts = f"{len(treatment)} and {len(control)}, of which {len(treatment.keys() & control.keys())} in common"
        raise InputError(f"A paired test needs the same queries on both sides, at least two; got {counts}.")
    differences = np.array([value - control[query_id] for query_id, value in treatment.items()])
    if _are_constant(differences):
        p_value = _p_of_constant(differences)
    else:
        p_value = float(ttest_1samp(differences, 0).pvalue)
    return {"difference": fmean(differences), "p_value": p_value, "queries": len(differences)}


def compare_seeds(
    treatment: Sequence[Mapping[str, float]],
    control: Sequence[Mapping[str, float]],
    resamples: int = RESAMPLES,
    seed: int = 42,
) -> dict[str, Any]:
    """Compare two rankers that were trained several times, by a bootstrap over training seeds and queries.

    A resample draws seeds of each side and queries, the same for both sides, all with replacement. So the test covers
    new seeds and new queries, which a test of the means over seeds does not. It is conservative where seeds differ by
    chance on single queries, and too confident with two seeds of very different means: train three or more.

    Args:
        treatment, control: query_id -> value of a measure, one per training seed; all of the same queries.
        resamples, seed: number of resamples, and their seed.

    Returns:
        `difference` (mean of treatment minus control), `interval` (95 %), `p_value` (two-sided, from the share of
        resamples on the other side of 0; with one seed on both sides that of `paired_t_test`), `queries`, and `seeds`
        (their numbers, treatment and control).

    Raises:
        InputError: if a side has no seed, or the queries differ or are fewer than two.
    """
    runs = [*treatment, *control]
    counts = [len(treatment), len(control)]
    if 0 in counts or len(runs[0]) < 2 or any(run.keys() != runs[0].keys() for run in runs):
        queries = ", ".join(str(len(run)) for run in runs)
        raise InputError(
            "A comparison of seeds needs a seed on both sides and the same queries for all seeds, at least two; got "
            f"{counts[0]} and {counts[1]} seeds with {queries or 'no'} queries."
        )
    query_ids = list(runs[0])
    values = np.array([[run[query_id] for query_id in query_ids] for run in runs])  # (seeds, queries)
    differences = _resample_differences(values, counts, resamples, np.random.default_rng(seed))
    if counts == [1, 1]:
        p_value = paired_t_test(runs[0], runs[1])["p_value"]
    else:
        fewer = min((differences <= 0).sum(), (differences >= 0).sum())
        p_value = min(1.0, 2 * float(fewer + 1) / (resamples + 1))
    return {
        "difference": float(values[: counts[0]].mean() - values[counts[0] :].mean()),
        "interval": np.percentile(differences, [2.5, 97.5]).tolist(),
        "p_value": p_value,
        "queries": len(query_ids),
        "seeds": counts,
    }


def _resample_differences(
    values: np.ndarray, counts: Sequence[int], resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the mean differences of resamples; `values` has a row per seed, those of the treatment first."""
    shares = [rng.multinomial(count, [1 / count] * count, resamples) / count for count in counts]
    weights = np.hstack([shares[0], -shares[1]])  # (resamples, seeds)
    queries = values.shape[1]
    differences = np.empty(resamples)
    for start in range(0, resamples, RESAMPLING["batch"]):
        by_query = weights[start : start + RESAMPLING["batch"]] @ values
        drawn = rng.integers(0, queries, by_query.shape)
        differences[start : start + len(drawn)] = np.take_along_axis(by_query, drawn, axis=1).mean(axis=1)
    return differences.round(DECIMALS)  # else rounding errors give equal sides a sign


def mean_interval(values: Sequence[float], seed: int = 42) -> dict[str, float]:
    """Return the `mean` of at least two values and its 95 % bootstrap interval (scipy), `low` to `high`."""
    from scipy.stats import bootstrap

    low, high = bootstrap((values,), np.mean, method="percentile", rng=seed, **RESAMPLING).confidence_interval
    return {"mean": fmean(values), "low": float(low), "high": float(high)}


def _compare(treatment: Mapping[str, float], control: Mapping[str, float], moved: int, seed: int) -> dict[str, Any]:
    by_query = {query_id: value - control[query_id] for query_id, value in treatment.items()}
    differences = np.array([*by_query.values()])
    interval = mean_interval(differences, seed)
    effect_size = None
    if not differences.round(DECIMALS).any():
        effect_size = 0.0
    elif not _are_constant(differences):
        effect_size = float(differences.mean() / differences.std(ddof=1))
    largest = sorted(by_query.items(), key=lambda item: (-abs(item[1]), item[0]))[:moved]
    return {
        "difference": interval["mean"],
        "interval": [interval["low"], interval["high"]],
        "p_value": paired_t_test(treatment, control)["p_value"],
        "p_randomisation": _randomisation_test(differences, seed),
        "effect_size": effect_size,
        "wins": int((differences > 0).sum()),
        "ties": int((differences == 0).sum()),
        "losses": int((differences < 0).sum()),
        "moved": [[query_id, difference] for query_id, difference in largest if difference],
    }


def _randomisation_test(differences: np.ndarray, seed: int) -> float:
    """Return the p-value of the mean difference under random signs; for few queries all combinations are tried."""
    from scipy.stats import monte_carlo_test, permutation_test

    if _are_constant(differences):
        return _p_of_constant(differences)
    rng = np.random.default_rng(seed)
    if 2 ** len(differences) <= RESAMPLES:
        test = permutation_test((differences,), np.mean, permutation_type="samples", rng=rng, **RESAMPLING)
        return float(test.pvalue)

    def flip_signs(size: tuple[int, ...]) -> np.ndarray:
        return differences * (1 - 2 * rng.integers(0, 2, size, dtype=np.int8))

    return float(monte_carlo_test(differences, flip_signs, np.mean, **RESAMPLING).pvalue)


def _are_constant(differences: np.ndarray) -> bool:
    """Return whether all differences are equal but for rounding."""
    return bool(np.ptp(differences.round(DECIMALS)) == 0)


def _p_of_constant(differences: np.ndarray) -> float:
    """Return the p-value for equal differences: only all signs positive or all negative give so large a mean."""
    return 2.0 ** (1 - len(differences)) if differences.round(DECIMALS).any() else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values by Holm's step-down method (1979): the k-th smallest of m is multiplied by m - k + 1."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(steps).clip(max=1)
    return corrected.tolist()


def bonferroni(p_values: Sequence[float]) -> list[float]:
    """Multiply p-values by their number, to at most 1."""
    return (np.asarray(p_values) * len(p_values)).clip(max=1).tolist()


CORRECTIONS = {"holm": holm, "bonferroni": bonferroni}


def correct(tests: Sequence[dict[str, Any]], correction: str = "holm") -> None:
    """Give each of a family of tests `p_corrected`, the correction of its `p_value`."""
    p_values = [test["p_value"] for test in tests]
    for test, p_value in zip(tests, CORRECTIONS[correction](p_values), strict=True):
        test["p_corrected"] = p_value
