"""The paper's training code's measures: its own numbers on rankings with gaps, ties, grades and duplicates."""

import json
from pathlib import Path

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.evaluation import matchmaker

CASES = json.loads((Path(__file__).parents[1] / "golden" / "matchmaker_metrics.json").read_text())


def as_run(ranking: dict[str, list[str]]) -> kd.Run:
    """With equal scores: the order given is the ranking."""
    return kd.Run({query_id: [(doc_id, 0.0) for doc_id in doc_ids] for query_id, doc_ids in ranking.items()})


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_measures_are_those_of_the_training_code(case):
    expected = case["expected"]
    found = kd.evaluate_run(as_run(case["ranking"]), case["qrels"], list(expected), dialect="matchmaker")
    assert found == pytest.approx(expected)


def test_queries_without_a_ranking_or_a_relevant_document_do_not_count():
    qrels = {"q1": {"a": 1}, "q2": {"a": 0}, "q3": {"a": -1}, "q4": {"a": 1}}
    run = as_run({"q1": ["x", "a"], "q2": ["a"], "q3": ["a"], "unjudged": ["a"]})
    assert kd.evaluate_run(run, qrels, ["RR@10"], dialect="matchmaker") == {"RR@10": 0.5}
    assert kd.evaluate_run(run, qrels, ["RR@10"]) == {"RR@10": 0.5 / 4}


def test_run_files_are_read_in_the_order_of_their_lines(tmp_path):
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


@pytest.mark.parametrize("measure", ["P@10", "AP"])
def test_what_the_training_code_does_not_compute_is_refused(measure):
    with pytest.raises(ValueError, match=r"has nDCG, RR, R, AP, each with a cutoff \(AP\(rel=2\)@1000\); got"):
        kd.evaluate_run(as_run({"q": ["a"]}), {"q": {"a": 1}}, [measure], dialect="matchmaker")


def test_nothing_to_evaluate_and_an_unknown_dialect_are_refused():
    with pytest.raises(ValueError, match="No query of the run has a document graded above 0"):
        kd.evaluate_run(as_run({"q": ["a"]}), {"q": {"a": 0}}, dialect="matchmaker")
    with pytest.raises(ValueError, match="one of trec_eval, matchmaker, got 'ours'"):
        kd.evaluate_run(as_run({"q": ["a"]}), {"q": {"a": 1}}, dialect="ours")
