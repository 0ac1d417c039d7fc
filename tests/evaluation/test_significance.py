"""The paired t-test against a t computed by hand, and its p-value in closed form."""

import math

import pytest
from scipy import stats

from hf_kd_ranking.evaluation.significance import paired_t_test

CONTROL = {"q1": 0.5, "q2": 0.25, "q3": 0.0}
TREATMENT = {"q3": 0.3, "q1": 0.6, "q2": 0.45}  # differences 0.1, 0.2, 0.3 in another order of queries


def test_difference_and_p_value_match_hand_computed_values():
    t = 0.2 / (0.1 / math.sqrt(3))  # mean difference over its standard error; 2 degrees of freedom
    result = paired_t_test(TREATMENT, CONTROL)
    assert result.keys() == {"difference", "p_value", "queries"}
    assert result["difference"] == pytest.approx(0.2)
    assert result["queries"] == 3
    assert result["p_value"] == pytest.approx(1 - t / math.sqrt(2 + t**2))  # two-sided, closed form for 2 degrees
    assert result["p_value"] == pytest.approx(2 * stats.t.sf(t, df=2))


def test_a_worse_treatment_has_a_negative_difference_and_the_same_p_value():
    better, worse = paired_t_test(TREATMENT, CONTROL), paired_t_test(CONTROL, TREATMENT)
    assert worse["difference"] == pytest.approx(-better["difference"])
    assert worse["p_value"] == pytest.approx(better["p_value"])


def test_pairing_is_by_query_and_not_by_order():
    shuffled = dict(sorted(TREATMENT.items(), reverse=True))
    assert paired_t_test(shuffled, CONTROL) == pytest.approx(paired_t_test(TREATMENT, CONTROL))


def test_pairing_makes_small_steady_gains_significant_that_an_unpaired_test_does_not_see():
    control = {f"q{i}": i / 20 for i in range(20)}
    treatment = {query: value + 0.02 + 0.001 * (-1) ** i for i, (query, value) in enumerate(control.items())}
    assert paired_t_test(treatment, control)["p_value"] < 1e-10
    assert stats.ttest_ind([*treatment.values()], [*control.values()]).pvalue > 0.5


def test_identical_values_differ_with_p_value_one():
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
def test_other_queries_and_fewer_than_two_are_refused_with_counts(treatment, control, counts):
    with pytest.raises(ValueError, match=f"the same queries on both sides, at least two; {counts}"):
        paired_t_test(treatment, control)
