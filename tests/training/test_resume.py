"""A run that was stopped, crashed or died while it saved ends, resumed, bit by bit where an uninterrupted one ends."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_kd_ranking.training.checkpoints import RUN_FILE

pytestmark = pytest.mark.parametrize("model", ["bert_cat", "bert_dot-mean-compressed"], indirect=True)
# 64 rows in batches of 4, two of them per step: 8 steps per epoch.
SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 3,
}
SAVED = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "logging_steps": 3}
ON_TOPICS = {"query_clusters": np.arange(16) % 2}


class StopAfter(TrainerCallback):
    """Stop with a checkpoint after a step, as a machine that is taken away would with `save_steps`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_save = control.should_training_stop = state.global_step == self.step


class Killed(BaseException):
    """Ends a run without any handler for errors, as a kill does."""


class KillAfter(TrainerCallback):
    """End the run after a step, before a checkpoint of it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise Killed


def train(make_trainer, model, callbacks=(), resume: str | bool | None = None, parts=None, **settings) -> dict:
    """Train a copy of the model; its parameters, and what was logged."""
    model = copy.deepcopy(model)
    trainer = make_trainer(model, {"callbacks": list(callbacks)} | (parts or {}), **SETTINGS | settings)
    trainer.train(resume_from_checkpoint=resume)
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return {"weights": model.state_dict(), "losses": losses, "steps": trainer.state.global_step}


def is_equal(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# Within the first epoch, between the epochs, and within the second one.
@pytest.mark.parametrize("step", [3, 8, 11])
def test_resumed_run_equals_an_uninterrupted_one(model, make_trainer, tmp_path, step):
    # Dropout is on: the state of the random generators is resumed as well.
    whole = train(make_trainer, model)
    stopped = train(make_trainer, model, [StopAfter(step)])
    resumed = train(make_trainer, model, resume=str(tmp_path / "out" / f"checkpoint-{step}"))
    assert (whole["steps"], stopped["steps"], resumed["steps"]) == (16, step, 16)
    assert resumed["losses"] == whole["losses"]
    assert is_equal(resumed["weights"], whole["weights"])
    assert not is_equal(stopped["weights"], whole["weights"])


@pytest.mark.parametrize("parts", [{}, ON_TOPICS], ids=["shuffled", "on topics"])
def test_run_killed_twice_between_checkpoints_resumes(model, make_trainer, tmp_path, parts):
    whole = train(make_trainer, model, parts=parts, **SAVED | {"output_dir": str(tmp_path / "whole")})
    with pytest.raises(Killed):
        train(make_trainer, model, [KillAfter(5)], parts=parts, **SAVED)
    with pytest.raises(Killed):
        train(make_trainer, model, [KillAfter(11)], resume=True, parts=parts, **SAVED)
    resumed = train(make_trainer, model, resume=True, parts=parts, **SAVED)
    assert resumed["losses"] == whole["losses"]
    assert is_equal(resumed["weights"], whole["weights"])


def test_run_killed_while_it_saves_resumes(model, make_trainer, tmp_path, monkeypatch):
    whole = train(make_trainer, model, **SAVED | {"output_dir": str(tmp_path / "whole")})
    writes = []

    def put_in_place(temporary: Path, path: Path) -> None:
        writes.append(path)
        if len(writes) == 3:
            raise Killed
        temporary.replace(path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("hf_kd_ranking.artifacts._put_in_place", put_in_place)
        train(make_trainer, model, **SAVED)
    left = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert [(path.name, (path / RUN_FILE).is_file()) for path in left] == [
        ("checkpoint-4", True),
        ("checkpoint-6", False),
    ]
    resumed = train(make_trainer, model, resume=True, **SAVED)
    assert resumed["losses"] == whole["losses"]
    assert is_equal(resumed["weights"], whole["weights"])


def test_resumed_run_keeps_workers_head_rate_and_matched_scale(model, make_trainer, tmp_path):
    settings = {"teacher_scale": "match", "head_learning_rate": 3e-2, "dataloader_num_workers": 2}
    whole = train(make_trainer, model, **settings)
    train(make_trainer, model, [StopAfter(11)], **settings)
    resumed = train(make_trainer, model, resume=str(tmp_path / "out" / "checkpoint-11"), **settings)
    assert resumed["losses"] == whole["losses"]
    assert is_equal(resumed["weights"], whole["weights"])


def test_each_epoch_and_each_seed_has_its_own_order(student, make_trainer):
    runs = []
    for seed in (1, 2):
        losses = train(make_trainer, student, learning_rate=0.0, num_train_epochs=2, data_seed=seed)["losses"]
        # Without learning, losses differ only by the rows of their steps.
        runs.append(([loss for _, loss in losses[:8]], [loss for _, loss in losses[8:]]))
    (first, second), (other, _) = runs
    assert sum(first) == pytest.approx(sum(second), rel=1e-4)  # the same rows
    assert first != pytest.approx(second, rel=1e-3)
    assert first != pytest.approx(other, rel=1e-3)
