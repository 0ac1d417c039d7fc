"""The paired t-test against a t computed by hand; several runs against scipy, all sign flips and hand computation."""

import json
import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

import hf_kd_ranking as kd
from hf_kd_ranking.evaluation.metrics import evaluate_run
from hf_kd_ranking.evaluation.significance import (
    bonferroni,
    compare_runs,
    compare_seeds,
    compare_values,
    compare_with_first_stage,
    comparison_text,
    holm,
    paired_t_test,
)

CONTROL = {"q1": 0.5, "q2": 0.25, "q3": 0.0}
TREATMENT = {"q3": 0.3, "q1": 0.6, "q2": 0.45}  # differences 0.1, 0.2, 0.3 in another order of queries


def test_t_test_matches_hand_computed_values():
    t = 0.2 / (0.1 / math.sqrt(3))  # mean difference over its standard error; 2 degrees of freedom
    result = paired_t_test(TREATMENT, CONTROL)
    assert result.keys() == {"difference", "p_value", "queries"}
    assert result["difference"] == pytest.approx(0.2)
    assert result["queries"] == 3
    assert result["p_value"] == pytest.approx(1 - t / math.sqrt(2 + t**2))  # two-sided, closed form for 2 degrees
    assert result["p_value"] == pytest.approx(2 * stats.t.sf(t, df=2))


def test_t_test_is_symmetric_and_pairs_by_query():
    better, worse = paired_t_test(TREATMENT, CONTROL), paired_t_test(CONTROL, TREATMENT)
    assert worse["difference"] == pytest.approx(-better["difference"])
    assert worse["p_value"] == pytest.approx(better["p_value"])
    shuffled = dict(sorted(TREATMENT.items(), reverse=True))
    assert paired_t_test(shuffled, CONTROL) == pytest.approx(better)


def test_compare_with_first_stage_returns_means_and_tests():
    comparison = compare_with_first_stage({"RR@10": TREATMENT}, {"RR@10": CONTROL})
    assert comparison["first_stage"]["RR@10"] == pytest.approx(0.25)
    assert comparison["after"]["RR@10"] == pytest.approx(0.45)
    assert comparison["tests"]["RR@10"]["difference"] == pytest.approx(0.2)


def test_t_test_finds_small_steady_gains():
    control = {f"q{i}": i / 20 for i in range(20)}
    treatment = {query: value + 0.02 + 0.001 * (-1) ** i for i, (query, value) in enumerate(control.items())}
    assert paired_t_test(treatment, control)["p_value"] < 1e-10
    assert stats.ttest_ind([*treatment.values()], [*control.values()]).pvalue > 0.5


def test_t_test_of_identical_values_has_p_value_one():
    assert paired_t_test(CONTROL, dict(CONTROL)) == {"difference": 0.0, "p_value": 1.0, "queries": 3}


@pytest.mark.parametrize(
    ("treatment", "control", "counts"),
    [
        ({"q1": 1.0, "q2": 0.0}, {"q1": 1.0, "q3": 0.0}, "got 2 and 2, of which 1 in common"),
        ({"q1": 1.0, "q2": 0.0}, {"q1": 1.0, "q2": 0.0, "q3": 0.0}, "got 2 and 3, of which 2 in common"),
        ({"q1": 1.0}, {"q1": 0.5}, "got 1 and 1, of which 1 in common"),
        ({}, {}, "got 0 and 0, of which 0 in common"),
    ],
)
def test_t_test_refuses_different_or_too_few_queries(treatment, control, counts):
    with pytest.raises(ValueError, match=f"the same queries on both sides, at least two; {counts}"):
        paired_t_test(treatment, control)


# ---- Several runs ---------------------------------------------------------------------------------------------------

QRELS = {f"q{i}": {"good": 1} for i in range(12)}


def run_with(ranks: list[int]) -> kd.Run:
    """A run whose i-th query has its good document at the i-th rank given."""
    return kd.Run(
        {
            f"q{i}": [("good" if place == rank else f"d{place}", -place) for place in range(1, 11)]
            for i, rank in enumerate(ranks)
        }
    )


RUNS = {
    "first": run_with([1, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1]),
    "second": run_with([2, 4, 2, 2, 5, 2, 1, 2, 4, 1, 2, 10]),
    "third": run_with([1, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1]),
}


def test_compare_runs_equals_scipy_on_all_pairs():
    result = compare_runs(RUNS, QRELS, ["RR@10"])
    assert [(pair["control"], pair["treatment"]) for pair in result["pairs"]] == [
        ("first", "second"), ("first", "third"), ("second", "third"),
    ]  # fmt: skip
    pair = result["pairs"][0]
    first = np.array([1, 1, 1, 1 / 2, 1, 1, 1, 1, 1, 1 / 2, 1, 1])
    second = np.array([1 / 2, 1 / 4, 1 / 2, 1 / 2, 1 / 5, 1 / 2, 1, 1 / 2, 1 / 4, 1, 1 / 2, 1 / 10])
    differences = second - first
    assert result["means"]["second"]["RR@10"] == pytest.approx(second.mean())
    assert pair["difference"] == pytest.approx(differences.mean())
    assert pair["p_value"] == pytest.approx(stats.ttest_rel(second, first).pvalue)
    assert pair["effect_size"] == pytest.approx(differences.mean() / differences.std(ddof=1))
    assert (pair["wins"], pair["ties"], pair["losses"]) == (1, 2, 9)
    assert pair["moved"][0] == ["q11", pytest.approx(-0.9)]
    assert [query for query, _ in pair["moved"]] == ["q11", "q4", "q1", "q8", "q0"]
    # All 2^12 sign flips, one by one.
    signs = np.array(np.meshgrid(*[[-1, 1]] * 12)).reshape(12, -1)
    exact = (np.abs(differences @ signs) >= abs(differences.sum()) - 1e-12).mean()
    assert pair["p_randomisation"] == pytest.approx(exact)
    low, high = pair["interval"]
    assert low < differences.mean() < high < 0
    error = differences.std(ddof=1) / math.sqrt(12)
    assert (high - low) == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_random_signs_approximate_all_signs():
    differences = np.random.default_rng(0).normal(0.25, 1, 14)  # 2 ** 14 signs are more than are tried
    signs = np.array(list(product((1, -1), repeat=14)))
    means = (signs * differences).mean(1)
    wanted = 2 * min((means >= differences.mean()).mean(), (means <= differences.mean()).mean())
    values = {str(i): value for i, value in enumerate(differences)}
    pair = compare_values({"a": {"m": dict.fromkeys(values, 0.0)}, "b": {"m": values}})["pairs"][0]
    assert 0.05 < wanted < 0.95
    assert pair["p_randomisation"] == pytest.approx(wanted, abs=0.02)


def test_compare_runs_of_equal_runs_finds_no_difference():
    pair = compare_runs(RUNS, QRELS, ["RR@10"])["pairs"][1]
    assert (pair["difference"], pair["p_value"], pair["p_randomisation"], pair["effect_size"]) == (0, 1, 1, 0)
    assert (pair["interval"], pair["wins"], pair["ties"], pair["losses"], pair["moved"]) == ([0, 0], 0, 12, 0, [])


@pytest.mark.parametrize(
    ("correction", "wanted"), [(holm, [0.03, 0.06, 0.06, 0.02]), (bonferroni, [0.04, 0.12, 0.16, 0.02])]
)
def test_corrections_match_hand_computed_values(correction, wanted):
    # Holm: .005 * 4, .01 * 3 (not below .02), .03 * 2, .04 * 1 (not below .06).
    assert correction([0.01, 0.03, 0.04, 0.005]) == pytest.approx(wanted)
    assert correction([0.9, 0.8]) == [1.0, 1.0]


def test_compare_runs_corrects_within_each_measure():
    for name, correction in (("holm", holm), ("bonferroni", bonferroni)):
        result = compare_runs(RUNS, QRELS, ["RR@10", "nDCG@10"], correction=name)
        for measure in ("RR@10", "nDCG@10"):
            pairs = [pair for pair in result["pairs"] if pair["measure"] == measure]
            assert [pair["p_corrected"] for pair in pairs] == correction([pair["p_value"] for pair in pairs])
    json.dumps(result)


def test_compare_runs_counts_missing_query_as_zero():
    qrels = QRELS | {"nobody": {"d": 1}}
    result = compare_runs(RUNS, qrels, ["RR@10"])
    assert result["queries"] == len(qrels)
    for name, run in RUNS.items():
        assert result["means"][name] == pytest.approx(evaluate_run(run, qrels, ["RR@10"]))


def test_compare_runs_refuses_or_intersects_queries():
    fewer = kd.Run({query: ranking for query, ranking in RUNS["second"].items() if query not in ("q3", "q7")})
    runs = {"first": RUNS["first"], "fewer": fewer}
    with pytest.raises(ValueError, match=r"\(first 12, fewer 10; 10 in common, not in all: q3, q7\)"):
        compare_runs(runs, QRELS)
    assert compare_runs(runs, QRELS, intersect=True)["queries"] == 10


@pytest.mark.parametrize(
    ("runs", "settings", "message"),
    [
        ({"one": RUNS["first"]}, {}, "at least two runs and a correction, one of holm, bonferroni; got 1 and 'holm'"),
        (RUNS, {"correction": "none"}, "got 3 and 'none'"),
        ({"a": kd.Run({"q1": [("good", 1.0)]}), "b": kd.Run({"q1": [("good", 1.0)]})}, {}, "two judged queries"),
    ],
)
def test_compare_runs_refuses_bad_input(runs, settings, message):
    with pytest.raises(ValueError, match=message):
        compare_runs(runs, QRELS, **settings)


@pytest.mark.parametrize("queries", [2, 4, 14])
@pytest.mark.parametrize("sign", [1, -1])
def test_constant_differences_have_the_p_value_of_all_sign_flips(queries, sign):
    control = {f"q{i}": 0.1 * (i % 5) for i in range(queries)}
    treatment = {query_id: value + sign * 0.1 for query_id, value in control.items()}  # but for rounding
    result = compare_values({"a": {"RR@10": control}, "b": {"RR@10": treatment}})
    (pair,) = result["pairs"]
    # Of 2^n combinations of signs two have so large a mean: all the same.
    assert pair["p_value"] == pair["p_randomisation"] == 2 / 2**queries
    assert paired_t_test(treatment, control)["p_value"] == 2 / 2**queries
    assert pair["effect_size"] is None
    assert "Infinity" not in json.dumps(result)
    assert "| - |" in comparison_text(result)


def test_fewer_than_30_queries_are_warned_of(caplog):
    rng = np.random.default_rng(0)
    for queries, warnings in ((29, 1), (30, 0)):
        caplog.clear()
        compare_values({name: {"RR@10": by_query(rng.uniform(0, 1, queries))} for name in "ab"})
        assert [record.levelname for record in caplog.records] == ["WARNING"] * warnings
        assert caplog.text.count("29 queries are few for a comparison") == warnings


# ---- Several training seeds -----------------------------------------------------------------------------------------


def by_query(values: np.ndarray) -> dict[str, float]:
    return {f"q{i}": float(value) for i, value in enumerate(values)}


def test_compare_seeds_with_one_seed_is_the_t_test_with_a_bootstrap_interval():
    result = compare_seeds([TREATMENT], [CONTROL])
    assert result["p_value"] == paired_t_test(TREATMENT, CONTROL)["p_value"]
    assert (result["queries"], result["seeds"]) == (3, [1, 1])
    assert result["difference"] == pytest.approx(0.2)
    # 1 of 27 resamples takes 0.1 three times (and 0.3): more than 2.5 % of them.
    assert result["interval"] == pytest.approx([0.1, 0.3])
    json.dumps(result)


def test_compare_seeds_resamples_the_seeds_of_both_sides():
    flat = np.zeros(5)
    # Queries are all equal: a treatment seed is 0 or 3, a control seed 0 or 1. Means of two drawn ones have the shares
    # 1/4, 1/2, 1/4; differences of at most 0 need treatment 0 (all controls: 1/4): p = 2 * 1/4.
    result = compare_seeds([by_query(flat), by_query(flat + 3)], [by_query(flat), by_query(flat + 1)])
    assert result["difference"] == pytest.approx(1.0)
    assert result["p_value"] == pytest.approx(0.5, abs=0.03)
    assert result["interval"] == pytest.approx([-1.0, 3.0])  # 1/16 of the resamples each
    assert result["seeds"] == [2, 2]


def test_compare_seeds_pairs_sides_by_query():
    queries = np.random.default_rng(0).uniform(0, 1, 50)
    sides = [[by_query(queries + gain) for _ in range(3)] for gain in (0.01, 0.0)]
    result = compare_seeds(*sides)
    assert result["interval"] == pytest.approx([0.01, 0.01])  # however much queries differ
    assert result["p_value"] == pytest.approx(2 / 10_001)
    shuffled = [dict(reversed(values.items())) for values in sides[1]]
    assert compare_seeds(sides[0], shuffled)["p_value"] == result["p_value"]


def test_compare_seeds_of_equal_sides_finds_nothing():
    values = [by_query(np.random.default_rng(0).uniform(0, 1, 50))] * 3
    result = compare_seeds(values, values)
    assert (result["difference"], result["interval"], result["p_value"]) == (0, [0, 0], 1)


def test_compare_seeds_is_symmetric_and_reproducible():
    rng = np.random.default_rng(1)
    first, second = ([by_query(rng.normal(mean, 1, 200)) for _ in range(3)] for mean in (0.15, 0.0))
    forth, back = compare_seeds(first, second), compare_seeds(second, first)
    assert forth == compare_seeds(first, second)
    assert back["difference"] == pytest.approx(-forth["difference"])
    assert back["p_value"] == pytest.approx(forth["p_value"], abs=0.02)
    assert 0.01 < forth["p_value"] < 0.5
    assert compare_seeds(first, second[:1])["seeds"] == [3, 1]


@pytest.mark.parametrize(
    ("treatment", "control", "counts"),
    [
        ([], [CONTROL], "0 and 1 seeds with 3 queries"),
        ([], [], "0 and 0 seeds with no queries"),
        ([TREATMENT, {"q1": 1.0, "q2": 0.0}], [CONTROL], "2 and 1 seeds with 3, 2, 3 queries"),
        ([{"q1": 1.0}], [{"q1": 1.0}], "1 and 1 seeds with 1, 1 queries"),
    ],
)
def test_compare_seeds_refuses_different_or_too_few_queries(treatment, control, counts):
    with pytest.raises(ValueError, match=f"the same queries for all seeds, at least two; got {counts}"):
        compare_seeds(treatment, control)
