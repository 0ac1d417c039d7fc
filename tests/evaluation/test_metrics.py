"""Measures against hand-computed values (ties, gaps, unjudged documents), and against trec_eval on TREC-DL."""

import os
import re
from math import log2
from pathlib import Path

import numpy as np
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.errors import InputError
from hf_kd_ranking.evaluation.metrics import DEFAULT_MEASURES, deepest, evaluate_queries
from hf_kd_ranking.retrieval.fusion import fuse_runs

QRELS = {"q": {"a": 3, "b": 1, "c": 2, "zero": 0}}


def ranked(*doc_ids: str, query_id: str = "q") -> kd.Run:
    """A run of one query with descending scores."""
    return kd.Run({query_id: [(doc_id, 10.0 - rank) for rank, doc_id in enumerate(doc_ids)]})


# ---- By hand --------------------------------------------------------------------------------------------------------

IDEAL = 3 + 2 / log2(3) + 1 / log2(4)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (ranked("a", "c", "b"), 1.0),
        (ranked("b", "zero", "a"), (1 + 3 / log2(4)) / IDEAL),
        (ranked("b", "unjudged", "a"), (1 + 3 / log2(4)) / IDEAL),
        (ranked("c"), 2 / IDEAL),
        (ranked("zero", "unjudged"), 0.0),
        (ranked(*"0123456789", "a"), 0.0),  # rank 11
        (ranked(*"012345678", "a"), 3 / log2(11) / IDEAL),  # rank 10
    ],
)
def test_ndcg_matches_hand_computed_values(run, expected):
    assert kd.evaluate_run(run, QRELS, ["nDCG@10"])["nDCG@10"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("measure", "run", "expected"),
    [
        ("RR@10", ranked("zero", "b", "a"), 1 / 2),
        ("RR(rel=2)@10", ranked("zero", "b", "a"), 1 / 3),
        ("RR@10", ranked("unjudged", "x", "zero"), 0.0),
        ("RR@10", ranked(*"012345678", "b"), 1 / 10),
        ("RR@10", ranked(*"0123456789", "b"), 0.0),
        ("R@1000", ranked("a", "zero"), 1 / 3),
        ("R(rel=2)@2", ranked("b", "a", "c"), 1 / 2),
        ("AP", ranked("a", "x", "b"), (1 / 1 + 2 / 3) / 3),
        ("P@5", ranked("a", "x", "b"), 2 / 5),
    ],
)
def test_binary_measures_match_hand_computed_values(measure, run, expected):
    assert kd.evaluate_run(run, QRELS, [measure]) == {measure: pytest.approx(expected)}


def test_negative_grade_is_not_relevant():
    run, qrels = ranked("spam", "a"), {"q": {"a": 1, "spam": -2}}
    assert kd.evaluate_run(run, qrels) == pytest.approx({"nDCG@10": 1 / log2(3), "RR@10": 1 / 2})


def test_default_measures_are_those_of_the_paper():
    assert DEFAULT_MEASURES == ("nDCG@10", "RR@10")
    assert list(kd.evaluate_run(ranked("a"), QRELS)) == ["nDCG@10", "RR@10"]


# ---- Means over queries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [{}, {"q2": []}, {"q2": [("x", 1.0)]}])
def test_query_without_results_counts_as_zero(gap):
    qrels = {"q1": {"a": 1}, "q2": {"b": 1}, "q3": {"c": 0}}  # q3 has nothing to find
    run = kd.Run(ranked("x", "a", query_id="q1") | gap)
    values = evaluate_queries(run, qrels)
    assert values["RR@10"] == {"q1": 0.5, "q2": 0.0, "q3": 0.0}
    assert kd.evaluate_run(run, qrels)["RR@10"] == pytest.approx(0.5 / 3)
    assert kd.evaluate_run(run, qrels)["nDCG@10"] == pytest.approx(1 / log2(3) / 3)


def test_query_without_judgments_does_not_count():
    run = kd.Run(ranked("a") | ranked("x", query_id="unjudged"))
    assert evaluate_queries(run, QRELS, ["RR@10"]) == {"RR@10": {"q": 1.0}}


def test_ties_are_ranked_by_descending_id_by_every_measure():
    qrels = {"q1": {"a": 1}, "q2": {"b": 2}}
    tied = [("a", 1.0), ("b", 1.0), ("c", 1.0)]
    values = kd.evaluate_run(kd.Run({"q1": tied, "q2": tied}), qrels, ["nDCG@10", "AP", "RR@10"])
    reversed_run = kd.Run({"q2": tied[::-1], "q1": tied[::-1]})
    assert kd.evaluate_run(reversed_run, qrels, ["nDCG@10", "AP", "RR@10"]) == values
    assert values["AP"] == pytest.approx((1 / 3 + 1 / 2) / 2)  # the order of trec_eval: c, b, a
    assert values["RR@10"] == pytest.approx(values["AP"])  # one relevant document: the same by definition


@pytest.mark.parametrize(
    ("relevant", "other", "expected"),
    [
        (100000.001, 100000.002, 1.0),  # one float32: "z" is before "a"
        (100000.001, 100000.02, 0.5),
        (1e39, 2e39, 1.0),  # both are infinite as float32
    ],
)
def test_scores_tie_as_float32_as_in_trec_eval(relevant, other, expected):
    run = kd.Run({"q": [("a", other), ("z", relevant)]})
    assert kd.evaluate_run(run, {"q": {"z": 1}}, ["RR@10"]) == {"RR@10": expected}


def test_a_run_of_dictionaries_is_evaluated_and_written_as_one_of_lists(tmp_path):
    dictionaries = {"q": {"zero": 0.5, "b": 2, "a": np.float32(-1)}}
    lists = kd.Run({"q": [("b", 2.0), ("zero", 0.5), ("a", -1.0)]})
    measures = ["nDCG@10", "RR(rel=2)@10"]
    assert kd.evaluate_run(dictionaries, QRELS, measures) == kd.evaluate_run(lists, QRELS, measures)
    assert fuse_runs([dictionaries]) == fuse_runs([lists])
    kd.write_run(dictionaries, tmp_path / "run.trec")
    assert kd.read_run(tmp_path / "run.trec") == lists


@pytest.mark.parametrize(
    "measures",
    [
        ["nDCG@10", "RR(rel=2)@10", "RR@10", "nDCG@5"],
        ["RR@10", "MRR@10"],
        ["RR(rel=1)@10", "RR@10"],
    ],
)
def test_measures_together_equal_each_separately(measures):
    run = ranked("zero", "b", "a")
    together = kd.evaluate_run(run, QRELS, measures)
    assert list(together) == measures
    assert together == {measure: kd.evaluate_run(run, QRELS, [measure])[measure] for measure in measures}


# ---- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grade", [1.0, "1", None, np.float64(1)])
def test_a_grade_that_is_not_an_integer_is_named(grade):
    with pytest.raises(InputError, match=re.escape(f"Query 'q', document 'b': a grade is an integer, got {grade!r}")):
        kd.evaluate_run(ranked("a"), {"q": {"a": np.int64(1), "b": grade}})


@pytest.mark.parametrize(
    ("ranking", "message"),
    [
        ([("a", 1.0), ("b", float("nan"))], "document 'b': the score is not a finite number: nan"),
        ({"a": "1.0"}, "document 'a': the score is not a finite number: '1.0'"),
        ([("a", None)], "document 'a': the score is not a finite number: None"),
        (["a", "b"], "a ranking is {doc_id: score} or [(doc_id, score)], got list ['a', 'b']"),
        ("ab", "a ranking is {doc_id: score} or [(doc_id, score)], got str ab"),
        ([("a", 1.0), ("b", 0.5), ("a", 0.1)], "document 'a' appears twice in the ranking"),
    ],
)
def test_a_ranking_that_is_not_one_is_named_by_its_query(ranking, message):
    with pytest.raises(InputError, match="^Query 'q'.*" + re.escape(message)):
        kd.evaluate_run({"q": ranking}, QRELS)


@pytest.mark.parametrize(
    "measure",
    ["mrr-at-ten", "NDCG10", "nDCG@ten", "nDCG@", "", "nDCG(foo=1)@10", "P"],
)
def test_unknown_measure_is_refused_by_name(measure):
    with pytest.raises(ValueError) as error:
        kd.evaluate_run(ranked("a"), QRELS, ["RR@10", measure])
    assert str(error.value).startswith(f"Unknown measure in RR@10, {measure}: ")
    assert str(error.value).endswith("; write them as nDCG@10, RR@10.")
    with pytest.raises(ValueError, match="At least one measure"):
        kd.evaluate_run(ranked("a"), QRELS, [])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (ranked("a", query_id="7"), r"Run \(1 queries, first '7'\) and qrels \(1 queries, first 'q'\) have no query"),
        (kd.Run(), r"Run \(0 queries, first None\) and qrels \(1 queries, first 'q'\) have no query"),
        (ranked("x", "y"), r"Run \(first document 'x'\) and qrels \(first 'a'\) have no document in common"),
    ],
)
def test_run_and_qrels_with_nothing_in_common_are_refused(run, message):
    with pytest.raises(ValueError, match=message):
        kd.evaluate_run(run, QRELS)


def test_judged_share_counts_every_grade():
    assert kd.evaluate_run(ranked("a", "zero", "x", "y"), QRELS, ["Judged@2", "Judged@4"]) == {
        "Judged@2": 1.0,
        "Judged@4": 0.5,
    }


def test_documents_below_deepest_cutoff_change_nothing():
    rng = np.random.default_rng(0)
    docs = [str(i) for i in range(50)]
    run = kd.Run({str(q): [(doc, float(rng.integers(9))) for doc in docs] for q in range(9)})
    qrels = {str(q): {doc: int(rng.integers(-1, 4)) for doc in docs[::3]} for q in range(9)}
    measures = ["nDCG@10", "RR(rel=2)@3", "R@20", "Judged@10", "P@5"]
    assert deepest(measures) == 20
    assert deepest([*measures, "AP"]) is None
    cut = evaluate_queries(run, qrels, measures)
    whole = evaluate_queries(run, qrels, [*measures, "AP"])
    assert cut == {measure: whole[measure] for measure in measures}


# ---- trec_eval on TREC-DL -------------------------------------------------------------------------------------------

# By trec_eval 9.0.4; the binary measures of TREC-DL count grades from 2 on as relevant.
MEASURES = ("nDCG@10", "RR(rel=2)@10", "R(rel=2)@100")
FIGURES = [
    ("dl20", "BM25", (0.4796, 0.6533, 0.5599)),
    ("dl20", "BM25_RM3", (0.4896, 0.6164, 0.6182)),
    ("dl20", "D_BERT_KD_TASB", (0.6854, 0.8323, 0.7135)),
    ("dl20", "OPEN_AI_ADA2", (0.6759, 0.8398, 0.7237)),
    ("dl20", "SPLADE_P_P_ENSEMBLE_DISTIL", (0.7197, 0.8422, 0.7653)),
    ("dl20", "REP_LLAMA", (0.7195, 0.8716, 0.7309)),  # scores with two decimals: every ranking has ties
    ("dl21", "BM25", (0.4458,)),
    ("dl21", "BM25_RM3", (0.4455,)),
    ("dl21", "SPLADE_P_P_ENSEMBLE_DISTIL", (0.6846,)),
]


@pytest.mark.data
@pytest.mark.skipif("HF_KD_RANKING_DATA" not in os.environ, reason="needs the folder that HF_KD_RANKING_DATA names")
@pytest.mark.parametrize(("year", "system", "figures"), FIGURES)
def test_trec_dl_runs_score_as_by_trec_eval(year, system, figures):
    folder = Path(os.environ["HF_KD_RANKING_DATA"]) / "trec-dl"
    run = kd.read_run(folder / "runs" / f"{system}.{year}.top100.trec")
    qrels = kd.read_qrels(folder / f"qrels.{year}-passage.txt")
    values = kd.evaluate_run(run, qrels, MEASURES[: len(figures)])
    assert tuple(round(value, 4) for value in values.values()) == figures
