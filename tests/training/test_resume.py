"""A run that was stopped and resumed ends bit by bit where an uninterrupted one ends."""

import copy

import pytest
import torch
from transformers import TrainerCallback

pytestmark = pytest.mark.parametrize("model", ["bert_cat", "bert_dot-mean-compressed"], indirect=True)
# 64 rows in batches of 4, two of them a step: 8 steps an epoch.
SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 3,
}


class StopAfter(TrainerCallback):
    """Stop with a checkpoint after a step, as a machine that is taken away would with `save_steps`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_save = control.should_training_stop = state.global_step == self.step


def train(make_trainer, model, callbacks=(), resume: str | None = None, **settings) -> dict:
    """Train a copy of the model; its parameters, and what was logged."""
    model = copy.deepcopy(model)
    trainer = make_trainer(model, {"callbacks": list(callbacks)}, **SETTINGS | settings)
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


def test_resumed_run_with_workers_head_rate_and_matched_scale_equals_an_uninterrupted_one(
    model, make_trainer, tmp_path
):
    settings = {"teacher_scale": "match", "head_learning_rate": 3e-2, "dataloader_num_workers": 2}
    whole = train(make_trainer, model, **settings)
    train(make_trainer, model, [StopAfter(11)], **settings)
    resumed = train(make_trainer, model, resume=str(tmp_path / "out" / "checkpoint-11"), **settings)
    assert resumed["losses"] == whole["losses"]
    assert is_equal(resumed["weights"], whole["weights"])


def test_each_epoch_has_its_own_order_and_another_seed_another_one(student, make_trainer):
    runs = [
        train(make_trainer, student, learning_rate=0.0, num_train_epochs=2, data_seed=seed)["losses"]
        for seed in (1, 2)
    ]
    # Without learning, losses differ by the rows of their steps alone.
    (first, second), (other, _) = (([loss for _, loss in run[:8]], [loss for _, loss in run[8:]]) for run in runs)
    assert sum(first) == pytest.approx(sum(second), rel=1e-4)  # the same rows
    assert first != pytest.approx(second, rel=1e-3)
    assert first != pytest.approx(other, rel=1e-3)
