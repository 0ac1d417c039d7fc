"""The metric of the `evaluate` library: by hand, against a run, combined, and in a Trainer's form."""

from math import log2

import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

import hf_kd_ranking as kd

SCORES = [[0.1, 3.0, 2.0], [5.0, 4.0]]
GRADES = [[1, 0, 2], [0, 1]]


@pytest.fixture
def metric(tmp_path) -> kd.RankingMetric:
    return kd.RankingMetric(cache_dir=str(tmp_path))


def test_metric_matches_hand_computed_values(metric):
    # Ranked grades are 0 2 1 and 0 1.
    first = (2 / log2(3) + 1 / 2) / (2 + 1 / log2(3))
    values = metric.compute(predictions=SCORES, references=GRADES)
    assert values == pytest.approx({"nDCG@10": (first + 1 / log2(3)) / 2, "RR@10": 1 / 2})
    assert metric.compute(predictions=SCORES, references=GRADES, measures=["RR(rel=2)@10"]) == {
        "RR(rel=2)@10": pytest.approx(1 / 4)
    }


def test_metric_agrees_with_evaluate_run(metric):
    rng = np.random.default_rng(0)
    scores, grades = rng.normal(size=(7, 30)), rng.integers(0, 4, (7, 30))
    run = kd.Run.from_scores(np.repeat(range(7), 30), [*range(30)] * 7, scores.flatten())
    qrels = {str(q): {str(d): int(grade) for d, grade in enumerate(row)} for q, row in enumerate(grades)}
    measures = ["nDCG@10", "AP(rel=2)", "R@5", "P@3"]
    values = metric.compute(predictions=scores, references=grades, measures=measures)
    assert values == pytest.approx(kd.evaluate_run(run, qrels, measures))


def test_metric_ranks_equal_scores_worst_first(metric):
    assert metric.compute(predictions=[[1.0] * 4], references=[[2, 0, 1, 0]])["RR@10"] == pytest.approx(1 / 3)


def test_metric_works_in_batches_combined_and_in_trainer(metric, tmp_path):
    whole = metric.compute(predictions=SCORES, references=GRADES)
    for scores, grades in zip(SCORES, GRADES, strict=True):
        metric.add_batch(predictions=[scores], references=[grades])
    assert metric.compute() == whole
    recall = kd.RankingMetric(["R@1"], cache_dir=str(tmp_path), experiment_id="recall")
    together = evaluate.combine([metric, recall]).compute(predictions=SCORES, references=GRADES)
    assert together == whole | {"R@1": 0.0}
    prediction = EvalPrediction(np.array([[2.0, 1.0]]), np.array([[0, 1]]))
    assert metric.compute(predictions=prediction.predictions, references=prediction.label_ids)["RR@10"] == 0.5


@pytest.mark.parametrize(
    ("scores", "grades", "message"),
    [
        ([[1.0, 2.0]], [[1]], "Query 0 needs a grade for each of its scores, .* got 2 scores .* and 1 grades"),
        ([[1.0], [float("nan")]], [[1], [0]], "Query 1 needs a grade for each of its scores, which must be finite"),
    ],
)
def test_metric_refuses_missing_grades_and_nan_scores(metric, scores, grades, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=scores, references=grades)
