"""Measures of the paper's training code: its own numbers on rankings with gaps, ties, grades and duplicates."""

import json
from pathlib import Path

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.evaluation import matchmaker

CASES = json.loads((Path(__file__).parents[1] / "golden" / "matchmaker_metrics.json").read_text())


def as_run(ranking: dict[str, list[str]]) -> kd.Run:
    """A run with equal scores, in the given order."""
    return kd.Run({query_id: [(doc_id, 0.0) for doc_id in doc_ids] for query_id, doc_ids in ranking.items()})


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matchmaker_measures_equal_training_code(case):
    expected = case["expected"]
    values = kd.evaluate_run(as_run(case["ranking"]), case["qrels"], list(expected), dialect="matchmaker")
    assert values == pytest.approx(expected)


def test_matchmaker_means_leave_out_empty_queries():
    qrels = {"q1": {"a": 1}, "q2": {"a": 0}, "q3": {"a": -1}, "q4": {"a": 1}}
    run = as_run({"q1": ["x", "a"], "q2": ["a"], "q3": ["a"], "unjudged": ["a"]})
    assert kd.evaluate_run(run, qrels, ["RR@10"], dialect="matchmaker") == {"RR@10": 0.5}
    assert kd.evaluate_run(run, qrels, ["RR@10"]) == {"RR@10": 0.5 / 4}


def test_read_ranking_keeps_order_of_lines(tmp_path):
    path = tmp_path / "run"
    for content in (
        "1 d2 2\n1 d1 1\n2 d9 1\n",
        "1 d2 2 0.1\n1 d1 1 9\n2 d9 1 0\n",
        "1 Q0 d2 2 1 t\n1 Q0 d1 1 9 t\n2 Q0 d9 1 1 t\n",
    ):
        path.write_text(content)
        run = matchmaker.read_ranking(path)
        assert {query: [doc for doc, _ in ranking] for query, ranking in run.items()} == {
            "1": ["d2", "d1"],
            "2": ["d9"],
        }
    path.write_text("1 d1 1\n1 d2\n")
    with pytest.raises(ValueError, match="run line 2: needed 3, 4 or 6 columns, got 2: '1 d2'"):
        matchmaker.read_ranking(path)


@pytest.mark.parametrize(
    ("measure", "dialect", "grade", "message"),
    [
        ("P@10", "matchmaker", 1, r"has nDCG, RR, R, AP, each with a cutoff \(AP\(rel=2\)@1000\); got"),
        ("AP", "matchmaker", 1, r"has nDCG, RR, R, AP, each with a cutoff \(AP\(rel=2\)@1000\); got"),
        ("RR@10", "matchmaker", 0, "No query of the run has a document graded above 0"),
        ("RR@10", "ours", 1, "one of trec_eval, matchmaker, got 'ours'"),
    ],
)
def test_matchmaker_refuses_bad_input(measure, dialect, grade, message):
    with pytest.raises(ValueError, match=message):
        kd.evaluate_run(as_run({"q": ["a"]}), {"q": {"a": grade}}, [measure], dialect)
