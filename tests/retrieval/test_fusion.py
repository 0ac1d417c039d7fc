"""Fused scores are those computed by hand."""

import re

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval.fusion import fuse_runs, mix_runs

RUNS = [
    kd.Run({"1": [("a", 9.0), ("b", 5.0), ("c", 1.0)], "2": [("x", 1.0)]}),
    kd.Run({"1": [("c", 0.3), ("d", 0.1)], "3": [("y", 7.0), ("z", 7.0)]}),
]


def test_reciprocal_ranks_match_hand_computed_values():
    fused = fuse_runs(RUNS)
    wanted = {"c": (1 / 63 + 1 / 61) / 2, "a": 1 / 122, "b": 1 / 124, "d": 1 / 124}
    assert [doc_id for doc_id, _ in fused["1"]] == list(wanted)  # b and d are tied: the first run's comes first
    assert dict(fused["1"]) == pytest.approx(wanted)
    assert (list(fused), fused["2"][0][0]) == (["1", "2", "3"], "x")


def test_weighted_sums_match_hand_computed_values():
    fused = fuse_runs(RUNS, "weighted_sum", weights=[1, 2])
    assert fused["1"] == [("c", 2.0), ("a", 1.0), ("b", 0.5), ("d", 0.0)]
    assert fused["3"] == [("y", 2.0), ("z", 2.0)]


def test_standardized_scores_match_hand_computed_values():
    first = kd.Run({"1": [("a", 13.0), ("b", 11.0)], "2": [("x", 3.0), ("y", 1.0)]})  # mean 7, deviations 1 in queries
    second = kd.Run({"2": [("y", 6.0), ("z", 2.0)], "1": [("b", 6.0), ("c", 2.0)]})  # mean 4, deviations 2
    fused = fuse_runs([first, second], "standardized", weights=[1, 2])
    assert fused["1"] == [("b", 4.0 + 2 * 1), ("a", 6.0 - 2 * 1), ("c", 4.0 - 2 * 1)]
    assert fused["2"] == [("y", -6.0 + 2 * 1), ("x", -4.0 - 2 * 1), ("z", -6.0 - 2 * 1)]


def test_offsets_of_queries_do_not_change_the_unit_of_standardized_scores():
    first = kd.Run({"1": [("a", 3.0), ("b", 1.0)], "2": [("x", 3.0), ("y", 1.0)]})
    offset = kd.Run({"1": first["1"], "2": [(doc_id, score + 50) for doc_id, score in first["2"]]})
    for run in (first, offset):
        for ranking in fuse_runs([run], "standardized").values():
            assert ranking[0][1] - ranking[1][1] == pytest.approx(2)
    assert fuse_runs([kd.Run({"1": [("a", 3.0), ("b", 3.0)], "2": []})], "standardized")["1"] == [("a", 0), ("b", 0)]


def test_standardized_runs_must_have_the_same_queries():
    for lacking in (kd.Run({"1": RUNS[1]["1"]}), kd.Run({"1": RUNS[1]["1"], "2": []})):
        with pytest.raises(KeyError, match="Run 2 of 2 has no document for query '2', which another has"):
            fuse_runs([RUNS[0], lacking], "standardized")


def test_neither_scale_nor_shift_of_a_run_changes_the_result():
    other = kd.Run({query: [(doc, 3 * score - 8) for doc, score in ranking] for query, ranking in RUNS[0].items()})
    for method in ("reciprocal_rank", "weighted_sum"):
        wanted = fuse_runs(RUNS, method)
        for query_id, ranking in fuse_runs([other, RUNS[1]], method).items():
            assert dict(ranking) == pytest.approx(dict(wanted[query_id]))
    assert dict(fuse_runs([other], "standardized")["1"]) == pytest.approx(
        dict(fuse_runs(RUNS[:1], "standardized")["1"])
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": []}, "at least one run and a weight for each, got 0 and 0"),
        ({"runs": RUNS, "weights": [1.0]}, "got 2 and 1"),
        ({"runs": RUNS, "method": "max"}, "by reciprocal_rank or weighted_sum or standardized, got 'max'"),
    ],
)
def test_what_cannot_be_fused_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fuse_runs(**options)


def test_mixed_runs_have_their_shares_spread_over_the_ranks():
    mixed = mix_runs([kd.Run({"1": [(doc, 1.0) for doc in "abcdef"]}), RUNS[1]], [0.5, 0.5], 4)
    assert mixed["1"] == [("a", 0.0), ("d", -1.0), ("c", -2.0)]  # d of the second run is there already
    assert mixed["3"] == [("y", 0.0), ("z", -1.0)]
    whole = mix_runs(RUNS, [0.34, 0.66])  # the longest ranking of query 1 has 3 documents: 1 and 2 of them
    assert [doc_id for doc_id, _ in whole["1"]] == ["a", "c", "d"]


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.4], [1.5, -0.5]])
def test_shares_that_do_not_fit_are_refused(shares):
    with pytest.raises(ValueError, match=re.escape(f"with the sum 1, got {shares}")):
        mix_runs(RUNS, shares)
