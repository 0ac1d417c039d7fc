"""transformers' EarlyStoppingCallback with the measures of an evaluator: stops, loads the best, and resumes."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

import hf_kd_ranking as kd

pytestmark = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
# Step -> the measure: two evaluations after step 4 are worse, and one that is never reached is better.
VALUES = {2: 0.2, 4: 0.5, 6: 0.4, 8: 0.3, 10: 0.9, 12: 0.9, 14: 0.9, 16: 0.9}
SETTINGS = {
    "num_train_epochs": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "nDCG@10",
}


class ByStep(kd.RerankingEvaluator):
    """Measures what `VALUES` says of the step."""

    def measure(self, run: kd.Run) -> dict[str, float]:
        return {"nDCG@10": VALUES[self.state.global_step]}


class ReadState(TrainerCallback):
    """Give the evaluator the state of the training."""

    def __init__(self, evaluator: ByStep) -> None:
        self.evaluator = evaluator

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.evaluator.state = state


class Killed(BaseException):
    """Ends a run without any handler for errors, as a kill does."""


class KillAfter(TrainerCallback):
    """End the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise Killed


@pytest.fixture
def train(make_trainer, model, toy):
    """train(resume, killed_after): train a copy of the model with a patience of two evaluations."""

    def run(resume: bool | None = None, killed_after: int | None = None, **settings) -> kd.RankingTrainer:
        texts = kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")
        candidates, qrels = kd.read_run(toy / "candidates.trec"), kd.read_qrels(toy / "qrels.txt")
        evaluator = ByStep(candidates, qrels, *texts, measures=("nDCG@10",))
        callbacks = [ReadState(evaluator), EarlyStoppingCallback(2)]
        if killed_after is not None:
            callbacks.append(KillAfter(killed_after))
        parts = {"evaluator": evaluator, "callbacks": callbacks}
        trainer = make_trainer(copy.deepcopy(model), parts, **SETTINGS | settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def evaluated(trainer: kd.RankingTrainer) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if "eval_nDCG@10" in entry]


def test_run_stops_early_and_loads_the_best_checkpoint(train, tmp_path):
    trainer = train()
    assert (trainer.state.global_step, evaluated(trainer)) == (8, [2, 4, 6, 8])
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (4, 0.5)
    weights = trainer.model.state_dict()
    best = load_file(tmp_path / "out" / "checkpoint-4" / "model.safetensors")
    last = load_file(tmp_path / "out" / "checkpoint-8" / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in best.items())
    assert not all(torch.equal(weights[name], value) for name, value in last.items())


@pytest.mark.parametrize("limit", [None, 1])
def test_interrupted_run_keeps_its_patience_and_best_checkpoint(train, tmp_path, limit):
    whole = train(output_dir=str(tmp_path / "whole"))
    with pytest.raises(Killed):
        train(killed_after=7, save_total_limit=limit)
    resumed = train(resume=True, save_total_limit=limit)
    assert (resumed.state.global_step, evaluated(resumed)) == (8, [2, 4, 6, 8])
    assert resumed.state.best_model_checkpoint.endswith("checkpoint-4")
    weights = whole.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in resumed.model.state_dict().items())


def test_run_that_stopped_early_is_not_trained_on_when_it_is_resumed(train):
    first = train()
    again = train(resume=True)
    assert (again.state.global_step, evaluated(again)) == (8, [2, 4, 6, 8])
    weights = first.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in again.model.state_dict().items())
