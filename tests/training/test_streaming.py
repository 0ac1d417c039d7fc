"""Training on a stream of teacher rows: the same rows in their own order, again where it ends, and after a resume."""

import copy

import datasets
import numpy as np
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.data.rows import write_teacher_scores
from hf_kd_ranking.training.job import TrainingJob, train_ranker

pytestmark = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)


def losses_of(trainer: kd.RankingTrainer, resume: str | None = None) -> list[float]:
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def in_order(dataset: datasets.Dataset, steps: int) -> datasets.Dataset:
    """The first `steps` batches of 8 of the rows, read again and again."""
    return dataset.select([row % len(dataset) for row in range(8 * steps)])


@pytest.mark.parametrize(("kind", "workers"), [("tsv", 0), ("tsv", 2), ("jsonl", 0), ("parquet", 0)])
def test_a_stream_trains_as_its_rows_do_in_their_order(student, make_trainer, toy, tmp_path, kind, workers):
    rows = kd.load_teacher_scores(toy / "scores.tsv").select(range(20))  # 10 steps of 8 read them four times
    if kind == "jsonl":
        lists = [
            {"query_id": r["query_id"], "doc_ids": [r["pos_id"], r["neg_id"]], "teacher_scores": [r["pos_score"], 0.5]}
            for r in rows
        ]
        rows = datasets.Dataset.from_list(lists)
    path = tmp_path / f"rows.{kind}"

    write_teacher_scores(rows, path)
    streamed = make_trainer(
        copy.deepcopy(student),
        {"train_dataset": kd.load_teacher_scores(path, streaming=True)},
        max_steps=10,
        dataloader_num_workers=workers,
    )
    reference = make_trainer(student, {"train_dataset": in_order(rows, 10)}, max_steps=10)
    reference._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(reference.train_dataset)
    assert losses_of(streamed) == pytest.approx(losses_of(reference), rel=1e-5)


# Within the first reading of the 64 rows, and in the second.
@pytest.mark.parametrize("step", [3, 11])
def test_a_resumed_stream_goes_on_where_it_was(student, make_trainer, toy, tmp_path, step):
    def trainer(steps: int = 14) -> kd.RankingTrainer:
        stream = kd.load_teacher_scores(toy / "scores.tsv", streaming=True).shuffle(7, buffer_size=16)
        settings = {"save_strategy": "steps", "save_steps": step, "lr_scheduler_type": "constant"}
        return make_trainer(copy.deepcopy(student), {"train_dataset": stream}, max_steps=steps, **settings)

    whole, stopped = trainer(), trainer(step)
    losses, first_losses = losses_of(whole), losses_of(stopped)
    resumed = trainer()
    assert losses_of(resumed, str(tmp_path / "out" / f"checkpoint-{step}")) == losses
    assert first_losses == losses[:step]
    weights = resumed.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in whole.model.state_dict().items())


def test_what_a_stream_cannot_do_is_said_before_training(model, make_trainer, toy, tmp_path):
    def stream(text: str | None = None, name: str = "rows.tsv") -> datasets.IterableDataset:
        if text is None:
            return kd.load_teacher_scores(toy / "scores.tsv", streaming=True)
        (tmp_path / name).write_text(text)
        return kd.load_teacher_scores(tmp_path / name, streaming=True)

    with pytest.raises(ValueError, match=r"max_steps has to be specified"):
        make_trainer(model, {"train_dataset": stream()})
    with pytest.raises(ValueError, match=r"'match' needs rows that can be read twice, got a stream; give a number"):
        make_trainer(model, {"train_dataset": stream()}, max_steps=2, teacher_scale="match")
    with pytest.raises(ValueError, match=r"one topic need all rows at hand, got a stream; leave query_clusters out"):
        make_trainer(model, {"train_dataset": stream(), "query_clusters": np.zeros(16, dtype=int)}, max_steps=2)
    other = datasets.Dataset.from_dict({"query": ["a"]}).to_iterable_dataset()
    with pytest.raises(
        ValueError, match=r"has the columns query; teacher rows need pos_score, .* or query_id, doc_ids"
    ):
        make_trainer(model, {"train_dataset": other}, max_steps=2)
    with pytest.raises(ValueError, match=r"rows\.tsv line 1: needed 5 tab-separated columns"):
        make_trainer(model, {"train_dataset": stream("1\t2\t100\t1\n")}, max_steps=2)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl does not exist"):
        kd.load_teacher_scores("nowhere.jsonl", streaming=True)


def test_an_unknown_id_is_named_at_its_batch(model, make_trainer, toy, tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text((toy / "scores.tsv").read_text() + "1\t2\t100\t1\t777\n")
    trainer = make_trainer(model, {"train_dataset": kd.load_teacher_scores(path, streaming=True)}, max_steps=9)
    with pytest.raises(KeyError, match=r"1 of 16 ids are not among the 40 texts of .*collection\.tsv: '777'"):
        trainer.train()
    assert trainer.state.global_step == 7  # batches are made one ahead


def test_a_name_that_is_no_file_is_a_data_set_of_the_hub(model, make_trainer, monkeypatch):
    rows = datasets.Dataset.from_dict(
        {"query_id": ["100"], "pos_id": ["1"], "neg_id": ["2"], "pos_score": [3.0], "neg_score": [1.0]}
    )
    asked = []

    def load_dataset(name, **settings) -> datasets.IterableDataset:
        asked.append((name, settings))
        return rows.to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    stream = kd.load_teacher_scores("somebody/scores-v1.5", streaming=True)
    assert asked == [("somebody/scores-v1.5", {"split": "train", "streaming": True})]
    assert len(losses_of(make_trainer(model, {"train_dataset": stream}, max_steps=2))) == 2


def test_a_job_may_stream_and_its_card_counts_the_rows_read(model, encoder, toy, tmp_path):
    def run(seed: int) -> tuple[float, dict, str]:
        output = tmp_path / f"out{seed}"
        job = TrainingJob(
            model_name=str(encoder),
            architecture="bert_dot",
            max_query_length=8,
            max_document_length=16,
            teacher_scores=str(toy / "scores.tsv"),
            collection=str(toy / "collection.tsv"),
            queries=str(toy / "queries.tsv"),
            streaming=True,
        )
        arguments = {"per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        results = train_ranker(job, kd.RankingTrainingArguments(str(output), max_steps=5, data_seed=seed, **arguments))
        return results["training"]["train_loss"], results["job"], (output / "README.md").read_text()

    (loss, job, card), (other_loss, _, _) = run(1), run(2)
    assert loss != other_loss, "shuffled by data_seed"
    assert job["streaming"] is True and "Trained on 20 teacher rows" in card
