"""Training on a stream of lists, which transformers' Trainer reads by itself, and what a stream cannot do."""

import copy

import pytest
import torch

import hf_kd_ranking as kd

pytestmark = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)


def train(trainer: kd.RankingTrainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_trains_as_its_rows_do_in_their_order(student, make_trainer, toy, workers):
    rows = kd.load_teacher_scores(toy / "scores.tsv").rows.select(range(40))
    streamed = make_trainer(
        copy.deepcopy(student),
        {"train_dataset": rows.to_iterable_dataset()},
        max_steps=5,
        dataloader_num_workers=workers,
    )
    in_memory = make_trainer(student, {"train_dataset": rows}, max_steps=5)
    in_memory._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    assert train(streamed) == pytest.approx(train(in_memory), rel=1e-5)
    assert streamed._training_rows() == 40  # for the card


def test_stream_is_refused_for_what_needs_all_rows(model, make_trainer, toy):
    stream = {"train_dataset": kd.load_teacher_scores(toy / "scores.tsv").rows.to_iterable_dataset()}
    with pytest.raises(ValueError, match=r"max_steps has to be specified"):
        make_trainer(model, stream)
    with pytest.raises(ValueError, match=r"'match' needs rows that can be read twice, got a stream; give a number"):
        make_trainer(model, stream, max_steps=2, teacher_scale="match").train()
