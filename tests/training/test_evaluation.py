"""Evaluation and prediction in Trainer's own loop: what its hooks get, and what is measured."""

import copy
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from torch import Tensor
from transformers import EvalPrediction

import hf_kd_ranking as kd
from hf_kd_ranking.training.evaluation import FILLED_IN

BERT_DOT = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)


def by_hand(trainer: kd.RankingTrainer, rows: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the student and the teacher, (N, n), filled up to the longest list."""
    ranker, texts = kd.Ranker(trainer.model, trainer.processing_class), trainer.data_collator
    n = max(len(row["doc_ids"]) for row in rows)
    student, teacher = np.full((2, len(rows), n), FILLED_IN, dtype=np.float32)
    for place, row in enumerate(rows):
        scores = ranker.score(texts.queries[row["query_id"]], texts.documents[row["doc_ids"]])
        student[place, : len(scores)] = scores
        teacher[place, : len(scores)] = row["teacher_scores"]
    return student, teacher


def joined(arrays: np.ndarray | list[np.ndarray], n: int = 4) -> np.ndarray:
    """One array of the arrays of batches, filled up."""
    if isinstance(arrays, np.ndarray):
        return arrays
    return np.concatenate(
        [np.pad(part, ((0, 0), (0, n - part.shape[1])), constant_values=FILLED_IN) for part in arrays]
    )


@pytest.mark.parametrize("model", ["bert_cat", "bert_dot", "colbert"], indirect=True)
def test_predictions_are_scores_only_unless_more_is_asked_for(model, make_trainer, uneven):
    trainer = make_trainer(model, per_device_eval_batch_size=2, dataloader_drop_last=True)
    student, teacher = by_hand(trainer, uneven)
    output = trainer.predict(uneven)
    np.testing.assert_allclose(output.predictions, student, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(output.label_ids, teacher)
    assert output.metrics["test_loss"] == pytest.approx(trainer.evaluate(uneven)["eval_loss"], rel=1e-5)
    without_scores = trainer.predict(uneven.select([0, 3]).remove_columns("teacher_scores"))
    np.testing.assert_allclose(without_scores.predictions, student[[0, 3], :2], rtol=1e-4, atol=1e-4)
    assert without_scores.label_ids is None
    everything = trainer.predict(uneven.select([0, 3]), ignore_keys=[]).predictions
    assert isinstance(everything, tuple) and len(everything) > 1


@BERT_DOT
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eval_do_concat_batches": False},
        {"eval_accumulation_steps": 1},
        {"eval_use_gather_object": True},
        {"bf16": True},
    ],
    ids=str,
)
def test_compute_metrics_gets_the_scores_of_student_and_teacher(model, make_trainer, uneven, settings):
    seen = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append((joined(prediction.predictions), joined(prediction.label_ids), prediction.losses))
        return {"answer": 42.0}

    parts = {"compute_metrics": compute_metrics, "eval_dataset": uneven}
    trainer = make_trainer(model, parts, per_device_eval_batch_size=2, include_for_metrics=["loss"], **settings)
    student, teacher = by_hand(trainer, uneven)
    metrics = trainer.evaluate()
    ((predictions, labels, losses),) = seen
    np.testing.assert_allclose(predictions, student, rtol=0.05 if "bf16" in settings else 1e-4, atol=0.2)
    np.testing.assert_array_equal(labels, teacher)
    assert metrics["eval_answer"] == 42.0 and {"eval_loss", "eval_pairwise_agreement"} <= metrics.keys()
    assert len(np.hstack(losses)) == 5  # one per row


@BERT_DOT
def test_batch_eval_metrics_counts_batch_by_batch(model, make_trainer, uneven):
    calls = []

    def compute_metrics(prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        calls.append((len(prediction.predictions), compute_result))
        return {"rows": float(sum(rows for rows, _ in calls))}

    parts = {"compute_metrics": compute_metrics, "eval_dataset": uneven}
    trainer = make_trainer(model, parts, per_device_eval_batch_size=2, batch_eval_metrics=True)
    assert trainer.evaluate()["eval_rows"] == 5.0
    assert calls == [(2, False), (2, False), (1, True)]


@BERT_DOT
def test_logits_are_preprocessed_before_metrics(model, make_trainer, uneven):
    parts = {
        "compute_metrics": lambda prediction: {"best": float(prediction.predictions.sum())},
        "preprocess_logits_for_metrics": lambda scores, labels: scores.argmax(-1) + 10 * (labels == 3.0).any(-1),
        "eval_dataset": uneven,
    }
    trainer = make_trainer(model, parts, per_device_eval_batch_size=2)
    student, _ = by_hand(trainer, uneven)
    assert trainer.evaluate()["eval_best"] == student.argmax(1).sum() + 10 * 5


@BERT_DOT
def test_several_evaluation_sets_are_measured_by_name(model, make_trainer, toy):
    rows = kd.load_teacher_scores(toy / "scores.tsv")
    data_sets = {"first": rows.select(range(5)), "rest": rows.select(range(5, 20)).rows}
    evaluator = SimpleNamespace(calls=0)

    def measure(ranker: kd.Ranker) -> dict[str, float]:
        evaluator.calls += 1
        return {"nDCG@10": 0.5}

    parts = {"eval_dataset": data_sets, "evaluator": measure}
    settings = {"metric_for_best_model": "eval_rest_loss", "save_strategy": "best"}
    trainer = make_trainer(model, parts, max_steps=1, eval_strategy="steps", eval_steps=1, **settings)
    trainer.train()
    metrics = trainer.evaluate()
    assert evaluator.calls == 2  # once per evaluation
    for name, part in data_sets.items():
        alone = trainer.evaluate(part)
        for measure_name in ("loss", "pairwise_agreement"):
            assert metrics[f"eval_{name}_{measure_name}"] == pytest.approx(alone[f"eval_{measure_name}"], rel=1e-5)
    assert metrics["eval_nDCG@10"] == 0.5
    assert trainer.state.best_metric == pytest.approx(metrics["eval_rest_loss"], rel=1e-5)
    assert trainer.evaluate(data_sets).keys() == metrics.keys()


@BERT_DOT
def test_evaluation_in_bf16_is_the_same_before_and_after_training(model, make_trainer, toy):
    rows = kd.load_teacher_scores(toy / "scores.tsv").select(range(20))
    seen = []

    def measure(ranker: kd.Ranker) -> dict[str, float]:
        seen.append(ranker.score(["apple bread", "moon"], ["queen of the river", "fire glass house iron"]))
        return {}

    parts = {"eval_dataset": rows, "evaluator": measure}
    in_float32 = make_trainer(copy.deepcopy(model), {"eval_dataset": rows}).evaluate()
    trainer = make_trainer(model, parts, max_steps=1, learning_rate=0.0, bf16=True)
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate() | {"epoch": 0} == before
    assert np.array_equal(*seen)
    assert in_float32["eval_loss"] != before["eval_loss"]


@BERT_DOT
def test_memory_and_predictions_may_be_switched(model, make_trainer, uneven):
    parts = {"eval_dataset": uneven, "compute_metrics": lambda prediction: {"answer": 1.0}}
    trainer = make_trainer(model, parts, prediction_loss_only=True, skip_memory_metrics=False)
    metrics = trainer.evaluate()
    assert "eval_answer" not in metrics and "eval_loss" in metrics
    assert "eval_mem_cpu_alloc_delta" in metrics


@BERT_DOT
def test_card_has_whatever_the_evaluator_measures(model, make_trainer, toy, tmp_path):
    values = iter([0.125, 0.25])
    parts = {
        "eval_dataset": kd.load_teacher_scores(toy / "scores.tsv").select(range(4)),
        "evaluator": lambda ranker: {"AP": next(values), "found by people": 0.75},
    }
    trainer = make_trainer(model, parts)
    trainer.evaluate()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    rows = [line.split("|")[2:4] for line in card.splitlines() if line.startswith("| held-out queries")]
    assert [[cell.strip() for cell in row] for row in rows] == [["AP", "0.25"], ["found by people", "0.75"]]


@BERT_DOT
@pytest.mark.parametrize("accumulation", [1, 2])
def test_compute_loss_func_takes_the_place_of_the_loss(student, make_trainer, uneven, accumulation):
    def absolute(outputs: object, labels: Tensor, num_items_in_batch: int) -> Tensor:
        is_listed = labels != FILLED_IN
        errors = ((outputs.scores - labels).abs() * is_listed).sum(1) / is_listed.sum(1)
        return errors.sum() / num_items_in_batch

    settings = {"per_device_train_batch_size": 6 // accumulation, "gradient_accumulation_steps": accumulation}
    parts = {"train_dataset": uneven, "eval_dataset": uneven, "compute_loss_func": absolute}
    trainer = make_trainer(student, parts, max_steps=1, teacher_scale="0.5", per_device_eval_batch_size=5, **settings)
    scores, teacher = by_hand(trainer, uneven)
    is_listed = teacher != FILLED_IN
    wanted = ((np.abs(scores - 0.5 * teacher) * is_listed).sum(1) / is_listed.sum(1)).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-4)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [pytest.approx(wanted, rel=1e-4)]
