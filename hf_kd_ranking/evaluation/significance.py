"""Whether a difference between two rankers is more than chance."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data.runs import Run
from .metrics import DEFAULT_MEASURES, Qrels, check_same_collection, evaluate_queries, mean_values

RESAMPLES = 10_000


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
        qrels: query_id -> {doc_id: grade}; a query of them that no run has counts as 0 for all.
        measures: in ir_measures' notation.
        correction: of the p-values over all pairs of a measure, a name in `CORRECTIONS`.
        intersect: True compares the queries that all runs have, where they differ; False refuses that.
        moved: how many of the queries that changed most are named, of each pair and measure.
        seed: of the resampling.

    Returns:
        `queries` (their number), `correction`, `means` {run: {measure: mean}}, and `pairs`, each with `control`,
        `treatment`, `measure`, `difference` (treatment minus control), `interval` (95 %, bootstrap over queries),
        `p_value` (paired t-test), `p_randomisation` (sign flips), `p_corrected` (of `p_value`), `effect_size` (mean
        over standard deviation of the differences), `wins`, `ties`, `losses`, `moved` [[query_id, difference]].

    Raises:
        ValueError: if there are fewer than two runs, their judged queries differ or are fewer than two, or the
            correction is not known.
    """
    _check_comparable(runs, correction)
    values, judged = {}, {}
    for name in runs:
        values[name], judged[name] = _measured(runs[name], qrels, measures)
    shared = shared_queries(judged, qrels, intersect)
    values = {
        name: {measure: {query_id: of_run[measure][query_id] for query_id in shared} for measure in measures}
        for name, of_run in values.items()
    }
    return compare_values(values, correction, moved, seed)


def against(
    last: Mapping[str, Mapping[str, float]], first: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """What a card says of a ranker beside its first stage, both measure -> query_id -> value of the same queries.

    Returns:
        `first_stage` and `after` (measure -> mean), `tests` (measure -> `paired_t_test` of after against first_stage).
    """
    tests = {measure: paired_t_test(last[measure], first[measure]) for measure in first}
    return {"first_stage": mean_values(first), "after": mean_values(last), "tests": tests}


def compare_values(
    values: Mapping[str, Mapping[str, Mapping[str, float]]], correction: str = "holm", moved: int = 5, seed: int = 42
) -> dict[str, Any]:
    """Compare all pairs of rankers by what `evaluate_queries` gave for each.

    Args:
        values: name -> measure -> query_id -> value, the same measures and queries for all.

    Returns:
        As `compare_runs`, arguments and errors otherwise too.
    """
    _check_comparable(values, correction)
    means = {name: mean_values(by_measure) for name, by_measure in values.items()}
    measures, couples, pairs = list(next(iter(means.values()))), list(combinations(values, 2)), []
    with tqdm(total=len(measures) * len(couples), desc="Comparing", unit="pair", delay=3) as progress:
        for measure in measures:
            tests = []
            for control, treatment in couples:
                test = _compare(values[treatment][measure], values[control][measure], moved, seed)
                tests.append({"control": control, "treatment": treatment, "measure": measure} | test)
                progress.update()
            corrected = CORRECTIONS[correction]([test["p_value"] for test in tests])
            pairs += [test | {"p_corrected": p_value} for test, p_value in zip(tests, corrected, strict=True)]
    queries = len(next(iter(values.values()))[measures[0]])
    return {"queries": queries, "correction": correction, "means": means, "pairs": pairs}


def shared_queries(judged: Mapping[str, set[str]], qrels: Mapping[str, Any], intersect: bool = False) -> list[str]:
    """The queries to compare runs on, in the order of the qrels: all of them, or with `intersect` those in common.

    Args:
        judged: name -> the queries of the qrels that a run has.
        qrels: query_id -> judgments.
        intersect: False refuses runs that differ.

    Raises:
        ValueError: if they differ and are not to be intersected, or fewer than two are in common.
    """
    shared, every = set.intersection(*judged.values()), set.union(*judged.values())
    if shared != every and not intersect:
        counts = ", ".join(f"{name} {len(found):,}" for name, found in judged.items())
        raise ValueError(
            f"The runs have results for different judged queries ({counts}; {len(shared):,} in common, not in all: "
            f"{', '.join(sorted(every - shared)[:3])}); complete them, or compare those in common with intersect."
        )
    if len(shared) < 2:
        raise ValueError(f"A comparison needs at least two judged queries in common, got {len(shared)}.")
    return [query_id for query_id in qrels if query_id in shared or not intersect]


def comparison_text(result: Mapping[str, Any]) -> str:
    """What `compare_runs` gives as Markdown tables: means, then pairs."""
    measures = list(next(iter(result["means"].values())))
    lines = [f"| run ({result['queries']:,} queries) | {' | '.join(measures)} |", "|---" * (len(measures) + 1) + "|"]
    for name, means in result["means"].items():
        lines.append(f"| {name} | {' | '.join(f'{means[measure]:.4f}' for measure in measures)} |")
    heads = (
        "measure",
        "treatment - control",
        "difference",
        "95 % interval",
        "p (t-test)",
        f"p ({result['correction']})",
    )
    heads += ("p (randomisation)", "effect size", "wins / ties / losses")
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for pair in result["pairs"]:
        low, high = pair["interval"]
        cells = [pair["measure"], f"{pair['treatment']} - {pair['control']}", f"{pair['difference']:+.4f}"]
        cells += [f"{low:+.4f} to {high:+.4f}"]
        cells += [f"{pair[name]:.2g}" for name in ("p_value", "p_corrected", "p_randomisation", "effect_size")]
        lines.append(f"| {' | '.join([*cells, ' / '.join(str(pair[n]) for n in ('wins', 'ties', 'losses'))])} |")
    return "\n".join(lines)


def _measured(run: Run, qrels: Qrels, measures: Sequence[str]) -> tuple[dict[str, dict[str, float]], set[str]]:
    """Values and judged queries of a run, which is then let go: one at a time is in memory where they are files."""
    values = evaluate_queries(run, qrels, measures)
    check_same_collection(run, qrels)
    return values, run.keys() & qrels.keys()


def _check_comparable(rankers: Mapping[str, Any], correction: str) -> None:
    if len(rankers) < 2 or correction not in CORRECTIONS:
        raise ValueError(
            f"Comparing needs at least two runs and a correction out of {', '.join(CORRECTIONS)}; got {len(rankers)} "
            f"and {correction!r}."
        )


def _compare(treatment: Mapping[str, float], control: Mapping[str, float], moved: int, seed: int) -> dict[str, Any]:
    from scipy.stats import bootstrap

    test = paired_t_test(treatment, control)
    by_query = {query_id: value - control[query_id] for query_id, value in treatment.items()}
    differences = np.array([*by_query.values()])
    settings = {"n_resamples": RESAMPLES, "vectorized": True, "batch": 100, "rng": seed}
    interval, p_randomisation, effect_size = [0.0, 0.0], 1.0, 0.0
    if differences.any():
        resampled = bootstrap((differences,), np.mean, method="percentile", **settings)
        interval = [float(bound) for bound in resampled.confidence_interval]
        p_randomisation = _randomisation_test(differences, settings)
        deviation = differences.std(ddof=1)
        effect_size = float(differences.mean() / deviation) if deviation else float("inf")
    signs = np.sign(differences)
    most = sorted(by_query.items(), key=lambda item: (-abs(item[1]), item[0]))[:moved]
    return {
        "difference": test["difference"],
        "interval": interval,
        "p_value": test["p_value"],
        "p_randomisation": p_randomisation,
        "effect_size": effect_size,
        **{name: int((signs == sign).sum()) for name, sign in (("wins", 1), ("ties", 0), ("losses", -1))},
        "moved": [[query_id, difference] for query_id, difference in most if difference],
    }


def _randomisation_test(differences: np.ndarray, settings: Mapping[str, Any]) -> float:
    """The p-value of the mean difference when each query's sign is a coin's; all signs of few queries are tried."""
    from scipy.stats import monte_carlo_test, permutation_test

    if 2 ** len(differences) <= RESAMPLES:
        test = permutation_test((differences,), np.mean, permutation_type="samples", **settings)
        return float(test.pvalue)
    rng = np.random.default_rng(settings["rng"])
    settings = {name: value for name, value in settings.items() if name != "rng"}

    def flipped(size: tuple[int, ...]) -> np.ndarray:
        return differences * (1 - 2 * rng.integers(0, 2, size, dtype=np.int8))

    return float(monte_carlo_test(differences, flipped, np.mean, **settings).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values under Holm's step-down correction (1979): the k-th smallest of m times m - k + 1, never falling."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(steps).clip(max=1)
    return corrected.tolist()


def bonferroni(p_values: Sequence[float]) -> list[float]:
    """p-values times their number, at most 1."""
    return [min(1.0, p_value * len(p_values)) for p_value in p_values]


CORRECTIONS: dict[str, Callable[[Sequence[float]], list[float]]] = {"holm": holm, "bonferroni": bonferroni}


def paired_t_test(treatment: Mapping[str, float], control: Mapping[str, float]) -> dict[str, float]:
    """Paired two-sided t-test over queries (scipy).

    Args:
        treatment: query_id -> value of a measure.
        control: the same queries.

    Returns:
        `difference` (mean of treatment minus control), `p_value` (1.0 where no query differs), `queries`.

    Raises:
        ValueError: if the query sets differ, or there are fewer than two queries.
    """
    from scipy.stats import ttest_rel  # 0.6 s, and only needed here

    if treatment.keys() != control.keys() or len(treatment) < 2:
        raise ValueError(
            f"A paired test needs the same queries on both sides, at least two; got {len(treatment)} and "
            f"{len(control)}, of which {len(treatment.keys() & control.keys())} in common."
        )
    pairs = [(treatment[query_id], control[query_id]) for query_id in treatment]
    differences = [a - b for a, b in pairs]
    p_value = 1.0 if not any(differences) else float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return {"difference": fmean(differences), "p_value": p_value, "queries": len(pairs)}
