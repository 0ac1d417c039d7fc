"""Orders of listwise teachers as scores: the methods by hand, RankLLM's files, the command line, and training."""

import json
import math
from itertools import combinations

import datasets
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import kendalltau

import hf_kd_ranking as kd
from hf_kd_ranking.errors import InputError
from hf_kd_ranking.teachers.orders import PRIOR, agreement, borda, bradley_terry, read_orders, reciprocal_rank

RANKS = np.array([[1.0, 2.0, 3.0, np.nan], [2.0, 1.0, np.nan, 3.0]])  # two orders of four documents
WEIGHTS = np.array([1.0, 3.0])


def result(query_id, *doc_ids):
    """A result as RankLLM writes it; its scores are those of the first stage, and say nothing about the order."""
    candidates = []
    for place, doc_id in enumerate(doc_ids):
        candidates.append({"docid": doc_id, "score": float(place), "doc": {"contents": f"text {doc_id}"}})
    return {"query": {"text": f"query {query_id}", "qid": query_id}, "candidates": candidates}


@pytest.fixture
def results(tmp_path):
    """Two files: JSON with one order per query, JSON lines with two orders of the first query."""
    (tmp_path / "a.json").write_text(json.dumps([result(7, 3, 1, 2), result("q8", "x", "y")]))
    lines = [result(7, 1, 3, 2), result(7, 3, 2, 4), result("q9", "z")]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_reciprocal_rank_and_borda_match_hand_computed_values():
    wanted = [1 / 61 + 3 / 62, 1 / 62 + 3 / 61, 1 / 63, 3 / 63]
    assert reciprocal_rank(RANKS, WEIGHTS) == pytest.approx(np.array(wanted) / 4)
    # The first order leaves place 4 to the last document, the second place 4 to the third.
    wanted = [3 + 3 * 2, 2 + 3 * 3, 1 + 3 * 0, 0 + 3 * 1]
    assert borda(RANKS, WEIGHTS) == pytest.approx(np.array(wanted) / 3 / 4)
    alone = np.array([[2.0, 1.0, np.nan, np.nan]])  # the others share the places 3 and 4
    assert borda(alone, np.ones(1)) == pytest.approx([2 / 3, 1, 0.5 / 3, 0.5 / 3])


def test_bradley_terry_is_the_maximum_likelihood():
    rng = np.random.default_rng(0)
    ranks = np.stack([rng.permutation(6) + 1.0 for _ in range(5)])
    ranks[0, ranks[0] == 6] = np.nan

    def loss(strengths):
        total = PRIOR * (np.logaddexp(0, -strengths) + np.logaddexp(0, strengths)).sum()
        for order in ranks:
            for i, j in combinations(range(6), 2):
                if not math.isnan(order[i] + order[j]):
                    sign = 1 if order[i] < order[j] else -1
                    total += np.logaddexp(0, -sign * (strengths[i] - strengths[j]))
        return total

    wanted = minimize(loss, np.zeros(6), tol=1e-12).x
    assert bradley_terry(ranks, np.ones(5)) == pytest.approx(wanted, abs=1e-4)
    unanimous = bradley_terry(np.array([[1.0, 2.0, 3.0]]), np.ones(1))
    assert np.isfinite(unanimous).all() and (np.diff(unanimous) < 0).all()


def test_agreement_is_kendalls_tau_over_shared_documents():
    rng = np.random.default_rng(1)
    for _ in range(20):
        first, second = rng.permutation(12).tolist(), rng.permutation(15)[:9].tolist()
        shared = [doc for doc in first if doc in second]
        wanted = kendalltau(range(len(shared)), [second.index(doc) for doc in shared]).statistic
        tau, inversions = agreement(first, second)
        assert tau == pytest.approx(wanted) and inversions == pytest.approx((1 - wanted) / 2)
    assert agreement("abc", "abc") == (1, 0) and agreement("abc", "cba") == (-1, 1)
    assert agreement("abc", "cde") is None


def test_files_of_rank_llm_and_runs_give_the_order_and_not_the_scores(results):
    assert read_orders(results / "a.json") == [("7", ["3", "1", "2"]), ("q8", ["x", "y"])]
    assert read_orders(results / "b.jsonl")[:2] == [("7", ["1", "3", "2"]), ("7", ["3", "2", "4"])]
    (results / "run.trec").write_text("7 Q0 5 1 0 llm\n7 Q0 3 2 0 llm\n")  # all scores are equal
    assert read_orders(results / "run.trec") == [("7", ["5", "3"])]


def test_orders_become_rows_and_a_run(results, call):
    files = f"--scores {results / 'a.json'} {results / 'b.jsonl'}"
    status, printed, error = call(f"teacher ensemble {files} --method borda --output {results / 'rows.jsonl'} --json")
    assert status == 0, error
    counts = json.loads(printed)
    # Pairs of orders of query 7: (3 1 2, 1 3 2) inverts one of three pairs, the others none of the one they share.
    assert counts | {"output": ""} == {
        "output": "", "queries": 2, "orders": 5, "dropped": 1,
        "kendall_tau": pytest.approx((1 / 3 + 1 + 1) / 3), "inversions": pytest.approx(1 / 9),
    }  # fmt: skip
    rows = kd.load_teacher_scores(results / "rows.jsonl")
    assert rows[0]["query_id"] == "7" and rows[0]["doc_ids"] == ["3", "1", "2", "4"]
    assert rows[0]["teacher_scores"] == pytest.approx([(1 + 2 / 3 + 1) / 3, (2 / 3 + 1) / 3, 4 / 9, 1 / 9], abs=1e-6)
    status, _, error = call(
        f"teacher ensemble {files} --method bradley_terry --weights 2 1 --output {results / 'orders.trec'}"
    )
    assert status == 0, error
    assert kd.read_run(results / "orders.trec")["7"][0][0] == "3"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "a.json is damaged: it is not valid JSON"),
        ("a.json", "[]", "a.json is empty; needed at least one order"),
        ("a.json", "[3]", "a.json result 1: needed an object with query and candidates, got 3"),
        ("a.jsonl", json.dumps({"query": {"qid": 1}}), "a.jsonl line 1: needed an object with query and candidates"),
        ("a.jsonl", json.dumps(result(1)), "a.jsonl line 1: query 1 has no candidates"),
        ("a.jsonl", json.dumps(result(1, 2, 3, 2)), "line 1: document '2' appears twice in the order of query 1"),
        ("a.jsonl", json.dumps(result(1, 2, None)), "a.jsonl line 1: docid must be a string or an integer, got None"),
        ("a.jsonl", json.dumps(result("", 2, 3)), "a.jsonl line 1: qid must be a string or an integer, got ''"),
        ("a.jsonl", json.dumps(result(1, 2)), "No query of"),
    ],
)  # fmt: skip
def test_bad_orders_are_refused_with_their_place(name, content, message, tmp_path, call):
    (tmp_path / name).write_text(content + "\n")
    output = tmp_path / "rows.jsonl"
    status, _, error = call(f"teacher ensemble --scores {tmp_path / name} --method borda --output {output}")
    assert status == 2 and message in error and not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method borda --on-missing drop", "--on-missing is for scores"),
        ("--method borda --weights 1 2 3", "Needed a weight above 0 for each of the 2 files, got [1.0, 2.0, 3.0]"),
        ("--method borda --weights 1 0", "Needed a weight above 0"),
        ("--method median_rank", "Unknown method 'median_rank'; choose one of mean"),
    ],
)
def test_bad_settings_are_refused(results, call, options, message):
    files = f"--scores {results / 'a.json'} {results / 'b.jsonl'}"
    status, _, error = call(f"teacher ensemble {files} {options} --output {results / 'rows.jsonl'}")
    assert status == 2 and message in error


def test_diagnosis_compares_the_orders_of_lists(results, call):
    rows = [
        [{"query_id": "q1", "doc_ids": list("abc"), "teacher_scores": [3, 2, 1]}],
        [{"query_id": "q1", "doc_ids": list("bac"), "teacher_scores": [3, 2, 1]}],
    ]
    for name, lists in zip(("a", "b"), rows, strict=True):
        (results / f"{name}.rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    status, printed, error = call(
        f"teacher diagnose --scores {results / 'a.rows.jsonl'} {results / 'b.rows.jsonl'} --json"
    )
    assert status == 0, error
    (comparison,) = json.loads(printed)["comparisons"]
    assert comparison["kendall_tau"] == pytest.approx(1 / 3) and comparison["inversions"] == pytest.approx(1 / 3)


@pytest.fixture
def student(encoder):
    """A BERT_DOT without dropout."""
    student = kd.load_ranker(encoder, "bert_dot", max_query_length=8, max_document_length=16)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return student


@pytest.mark.parametrize("loss", ["order_ranknet", "list_mle", "adr_mse(temperature=0.5)"])
def test_students_learn_from_orders(loss, make_trainer, student, recwarn):
    rows = [{"query_id": "100", "doc_ids": ["0", "1", "2"], "teacher_scores": [0.5, 1.0, 0.0]}] * 8
    parts = {"train_dataset": kd.load_teacher_scores(datasets.Dataset.from_list(rows))}
    trainer = make_trainer(student, parts, loss=loss, max_steps=8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not any("look like sigmoid" in str(warning.message) for warning in recwarn)  # an order has any scale


def test_data_without_an_order_are_refused(make_trainer, student):
    rows = [{"query_id": "100", "doc_ids": ["0", "1", "2"], "teacher_scores": [1.0, 1.0, 1.0]}] * 8
    tied = kd.load_teacher_scores(datasets.Dataset.from_list(rows))
    with pytest.raises(InputError, match="All teacher margins are 0"):
        make_trainer(student, {"train_dataset": tied}, loss="list_mle")
