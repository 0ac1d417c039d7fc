"""Training on a stream of lists, again where it ends, and what a stream cannot do."""

import copy

import datasets
import numpy as np
import pytest
import torch

import hf_kd_ranking as kd

pytestmark = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)


def train(trainer: kd.RankingTrainer, checkpoint: str | None = None) -> list[float]:
    trainer.train(resume_from_checkpoint=checkpoint)
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


def test_stream_begins_again_and_is_resumed_in_any_reading(student, make_trainer, toy, tmp_path):
    rows = kd.load_teacher_scores(toy / "scores.tsv").rows.select(range(20))

    def resumable(steps: int) -> kd.RankingTrainer:
        settings = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
        stream = {"train_dataset": rows.to_iterable_dataset()}
        return make_trainer(copy.deepcopy(student), stream, max_steps=steps, **settings)

    whole = train(resumable(7))
    train(resumable(4))  # in the second reading of 20 rows, by batches of 8
    assert train(resumable(7), str(tmp_path / "out" / "checkpoint-4")) == whole


def test_stream_is_refused_for_what_needs_all_rows(model, make_trainer, toy):
    stream = {"train_dataset": kd.load_teacher_scores(toy / "scores.tsv").rows.to_iterable_dataset()}
    with pytest.raises(ValueError, match=r"max_steps has to be specified"):
        make_trainer(model, stream)
    with pytest.raises(ValueError, match=r"'match' needs rows that can be read twice, got a stream; give a number"):
        make_trainer(model, stream, max_steps=2, teacher_scale="match").train()
    with pytest.raises(ValueError, match=r"one topic need all rows at once, got a stream"):
        make_trainer(model, stream | {"query_clusters": np.zeros(16, dtype=int)}, max_steps=2)
    pairs = datasets.Dataset.from_dict({"query_id": [100], "pos_id": [1], "neg_id": [2]}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"needs the columns query_id, doc_ids, teacher_scores, got query_id, pos_id"):
        make_trainer(model, {"train_dataset": pairs}, max_steps=2)
    with pytest.raises(TypeError, match=r"IterableDataset"):
        make_trainer(model, {"eval_dataset": stream["train_dataset"]})
