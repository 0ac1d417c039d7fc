"""One training step by hand, and what a run logs, evaluates and keeps."""

import copy
import json
import math
import multiprocessing
import re
from collections.abc import Sequence
from functools import partial
from operator import methodcaller
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

import hf_kd_ranking as kd
from hf_kd_ranking.data.collate import split_batch
from hf_kd_ranking.losses import LOSSES
from hf_kd_ranking.training.callbacks import StepStatistics

TWO_MODELS = pytest.mark.parametrize("model", ["bert_cat", "bert_dot-mean-compressed"], indirect=True)


def batch_of(trainer: kd.RankingTrainer, chosen: list[int]) -> dict:
    return trainer.data_collator([trainer.train_dataset[i] for i in chosen])


def margins_of(trainer: kd.RankingTrainer, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Student's and teacher's positive minus each negative, row by row, from the columns and without the collator."""
    ranker, texts = kd.Ranker(trainer.model, trainer.processing_class), trainer.data_collator
    student, teacher = [], []
    for row in (trainer.train_dataset[i] for i in chosen):
        teacher_scores = row["teacher_scores"]
        scores = ranker.score(texts.queries[row["query_id"]], texts.documents[row["doc_ids"]])
        student += [scores[0] - score for score in scores[1:]]
        teacher += [teacher_scores[0] - score for score in teacher_scores[1:]]
    return torch.tensor(np.array(student)), torch.tensor(teacher)


def parameters(trainer: kd.RankingTrainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def logged(trainer: kd.RankingTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("teacher_scale", ["1", "0.25"])
def test_loss_of_a_batch_is_margin_mse_by_hand(student, make_trainer, teacher_scale):
    trainer = make_trainer(student, teacher_scale=teacher_scale)
    batch = batch_of(trainer, [0, 1, 2, 3, 4])
    before = copy.deepcopy(batch)
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    student_margins, teacher_margins = margins_of(trainer, [0, 1, 2, 3, 4])
    wanted = ((student_margins - float(teacher_scale) * teacher_margins) ** 2).sum() / 5
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert outputs.scores.shape == (5, 2)
    as_lists = partial(json.dumps, default=methodcaller("tolist"))
    assert as_lists(batch) == as_lists(before)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_batch_takes_one_forward_pass(student, make_trainer, accumulation):
    calls = []
    student.register_forward_pre_hook(lambda *_: calls.append(1))
    make_trainer(student, max_steps=3, gradient_accumulation_steps=accumulation).train()
    assert len(calls) == 3 * accumulation


# 61 rows: the last group has 5, in batches of 8 or 1, or of 2, 2 and 1.
@TWO_MODELS
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (2, 4)])
def test_accumulated_batches_train_as_one_large_batch(student, make_trainer, batch_size, accumulation):
    ends = []
    for size, steps in ((8, 1), (batch_size, accumulation)):
        trainer = make_trainer(
            copy.deepcopy(student),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            num_train_epochs=1,
            optim="sgd",  # Adam would blow up rounding where a gradient is zero
            max_grad_norm=0.0,  # clipping would hide a wrong scale
        )
        trainer.train_dataset = trainer.train_dataset.select(range(61))
        trainer.train()
        assert trainer.state.global_step == 8
        ends.append((parameters(trainer), logged(trainer, "loss")))
    (large, large_losses), (small, small_losses) = ends
    start = dict(student.named_parameters())
    assert any((large[name] - start[name]).abs().max() > 1e-2 for name in large)
    assert all(torch.allclose(small[name], large[name], rtol=1e-4, atol=1e-5) for name in large)
    assert small_losses == pytest.approx(large_losses, rel=1e-4)


@TWO_MODELS
def test_several_losses_are_weighted_and_each_is_logged(student, make_trainer):
    trainer = make_trainer(student, loss="margin_mse:2,mse:0.5,ranknet", max_steps=1, learning_rate=0.0)
    trainer.train()
    (line,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    batch = batch_of(trainer, list(trainer.train_sampler)[:8])
    batch, targets = split_batch(batch)
    teacher_scores = targets["teacher_scores"]
    with torch.no_grad():
        scores = student.eval()(**batch).scores
    wanted = {"margin_mse": 2.0, "mse": 0.5, "ranknet": 1.0}
    wanted = {name: weight * LOSSES[name].function(scores, teacher_scores).item() for name, weight in wanted.items()}
    assert {name: line[f"loss_{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert line["loss"] == pytest.approx(sum(wanted.values()), rel=1e-4)


def test_a_loss_that_needs_lists_is_refused_before_training(model, make_trainer):
    with pytest.raises(ValueError, match=r"kl_div compares lists, and these rows hold 2 documents"):
        make_trainer(model, loss="kl_div")


def test_training_comes_closer_to_the_teachers_margins(student, make_trainer):
    trainer = make_trainer(student, learning_rate=3e-3, teacher_scale="match", num_train_epochs=12)
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])  # the last epoch and the first


@TWO_MODELS
def test_lists_of_documents_train_on_every_negative(student, make_trainer, tmp_path):
    path = tmp_path / "lists.jsonl"
    lists = [
        {"query_id": 100 + i, "doc_ids": [i, 9, 20, 30 + i], "teacher_scores": [3.0, i, -1, -2]} for i in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in lists))
    trainer = make_trainer(student, {"train_dataset": kd.load_teacher_scores(path)}, max_steps=1)
    student_margins, teacher_margins = margins_of(trainer, range(5))
    wanted = ((student_margins - teacher_margins) ** 2).sum() / (5 * 3)
    trainer.train()  # one step of all five rows; its loss is that of the weights before it
    assert logged(trainer, "loss") == [pytest.approx(wanted.item(), rel=1e-3)]


@TWO_MODELS
def test_ranknet_puts_positives_first_without_the_teacher(student, make_trainer):
    ends = []
    for sign in (1, -1):
        trainer = make_trainer(copy.deepcopy(student), loss="ranknet", learning_rate=5e-3, max_steps=24)
        scores = [[sign * positive, negative] for positive, negative in trainer.train_dataset["teacher_scores"]]
        rows = trainer.train_dataset.remove_columns("teacher_scores").add_column("teacher_scores", scores)
        trainer.train_dataset = rows
        before, _ = margins_of(trainer, range(64))
        trainer.train()
        after, _ = margins_of(trainer, range(64))
        assert torch.nn.functional.softplus(-after).mean() < 0.8 * torch.nn.functional.softplus(-before).mean()
        ends.append(after)
    assert torch.allclose(*ends, atol=1e-4)


def mean_by_row(errors: Tensor, lengths: Sequence[int]) -> float:
    """The mean over rows of the mean over a row's negatives."""
    return torch.stack([part.mean() for part in errors.split([length - 1 for length in lengths])]).mean().item()


@TWO_MODELS
def test_uneven_lists_weigh_every_query_alike(student, make_trainer, uneven):
    trainer = make_trainer(student, {"train_dataset": uneven})
    student_margins, teacher_margins = margins_of(trainer, range(5))
    errors = (student_margins - teacher_margins) ** 2
    loss = trainer.compute_loss(trainer.model.eval(), batch_of(trainer, range(5)))
    assert loss.item() == pytest.approx(mean_by_row(errors, (2, 4, 3, 2, 3)), rel=1e-4)
    by_batch = [trainer.compute_loss(trainer.model, batch_of(trainer, rows)).item() for rows in ((0, 1, 2), (3, 4))]
    assert loss.item() == pytest.approx((3 * by_batch[0] + 2 * by_batch[1]) / 5, rel=1e-4)


@TWO_MODELS
def test_uneven_lists_are_evaluated_by_their_listed_pairs(student, make_trainer, uneven):
    trainer = make_trainer(
        student, {"train_dataset": uneven}, per_device_eval_batch_size=2, max_steps=1, learning_rate=0.0
    )
    student_margins, teacher_margins = margins_of(trainer, range(5))
    agreement = ((student_margins > 0) == (teacher_margins > 0)).float().mean().item()
    metrics = trainer.evaluate(uneven)  # batches of longest lists 4, 3 and 3
    errors = (student_margins - teacher_margins) ** 2
    assert metrics["eval_loss"] == pytest.approx(mean_by_row(errors, (2, 4, 3, 2, 3)), rel=1e-4)
    assert metrics["eval_pairwise_agreement"] == pytest.approx(agreement)
    trainer.train()
    assert logged(trainer, "pairwise_agreement") == [pytest.approx(agreement)]
    assert logged(trainer, "teacher_margin") == [pytest.approx(teacher_margins.mean().item())]


@TWO_MODELS
def test_uneven_lists_give_match_their_listed_margins(student, make_trainer, uneven):
    trainer = make_trainer(student, {"train_dataset": uneven}, teacher_scale="match", max_steps=1)
    student_margins, teacher_margins = margins_of(trainer, range(5))
    trainer.train()
    wanted = math.sqrt((student_margins**2).mean() / (teacher_margins**2).mean())
    assert trainer.teacher_scale == pytest.approx(wanted, rel=1e-4)


@TWO_MODELS
def test_dataloader_workers_do_not_change_the_losses(student, make_trainer):
    losses, before = [], multiprocessing.active_children()
    for workers in (0, 2):
        trainer = make_trainer(copy.deepcopy(student), max_steps=4, dataloader_num_workers=workers)
        trainer.train()
        assert set(multiprocessing.active_children()) <= set(before)  # they end with the training
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_match_is_the_ratio_of_spreads_before_training(model, make_trainer):
    trainer = make_trainer(model, teacher_scale="match", per_device_train_batch_size=4, max_steps=2)  # dropout is on
    student_margins, teacher_margins = margins_of(trainer, list(trainer.train_sampler)[: 8 * 4])
    student_spread, teacher_spread = (math.sqrt((m**2).mean()) for m in (student_margins, teacher_margins))
    trainer.train()
    assert trainer.teacher_scale == pytest.approx(student_spread / teacher_spread, rel=1e-4)
    assert logged(trainer, "teacher_scale") == [trainer.teacher_scale]
    assert logged(trainer, "teacher_spread") == [pytest.approx(teacher_spread, rel=1e-4)]


@TWO_MODELS
def test_a_resumed_run_keeps_the_factor_it_started_with(student, make_trainer, tmp_path):
    settings = {"teacher_scale": "match", "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 2}
    started = make_trainer(copy.deepcopy(student), max_steps=2, **settings)
    started.train()
    resumed = make_trainer(copy.deepcopy(student), max_steps=3, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    remeasured = make_trainer(started.model, max_steps=1, **settings)
    remeasured.train()
    assert resumed.teacher_scale == started.teacher_scale
    assert remeasured.teacher_scale != pytest.approx(started.teacher_scale, rel=0.01), "the test could not tell"


def test_head_learning_rate_is_for_what_the_ranker_adds(student, make_trainer):
    trainer = make_trainer(student, head_learning_rate=0.5, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    rates = [(names[id(parameter)], group["lr"]) for group in groups for parameter in group["params"]]
    assert len(rates) == len(names)  # each once
    pretrained = ("bert_model.", "word_embeddings.", "contextualizer.", "mixer")
    assert dict(rates) == {name: 1e-3 if name.startswith(pretrained) else 0.5 for name in names.values()}
    decayed = {names[id(parameter)] for group in groups for parameter in group["params"] if group["weight_decay"]}
    assert decayed == {name for name in names.values() if not re.search(r"bias$|norm\d?\.weight$", name, re.I)}


def test_logged_statistics_are_of_the_steps_since_the_last(student, make_trainer):
    trainer = make_trainer(
        student, max_steps=4, logging_steps=2, per_device_train_batch_size=4, learning_rate=0.0, teacher_scale="0.5"
    )
    order = list(trainer.train_sampler)
    trainer.train()
    for line, chosen in enumerate((order[:8], order[8:16])):
        student_margins, teacher_margins = margins_of(trainer, chosen)
        masks = [mask for half in (chosen[:4], chosen[4:]) for mask in masks_of(batch_of(trainer, half))]
        wanted = {
            "pairwise_agreement": ((student_margins > 0) == (teacher_margins > 0)).sum() / 8,
            "student_margin": student_margins.mean(),
            "student_margin_std": student_margins.std(correction=0),
            "teacher_margin": 0.5 * teacher_margins.mean(),
            "teacher_margin_std": 0.5 * teacher_margins.std(correction=0),
            "padding_share": 1 - sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks),
        }
        found = {name: logged(trainer, name)[line] for name in wanted}
        assert found == pytest.approx({name: value.item() for name, value in wanted.items()}, rel=1e-4, abs=1e-5)


def masks_of(batch: dict) -> list[Tensor]:
    return [side["attention_mask"] for side in (batch.get("query", batch), batch.get("document")) if side]


def test_tokens_per_second_counts_from_the_last_line(monkeypatch):
    # Batches came at 101 and 110; log lines at 104 and 112; the second clock starts at 108.
    statistics, clock = StepStatistics(), iter([100.0, 101.0, 104.0, 108.0, 110.0, 112.0])
    monkeypatch.setattr("hf_kd_ranking.training.callbacks.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    features = {"attention_mask": torch.tensor([[[1, 1, 1], [1, 1, 0]]])}
    for tokens_per_second, data_wait_share in ((5 / 4, 1 / 4), (5 / 4, 2 / 4)):
        with statistics.waiting():
            pass
        statistics.add(features, torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        logged = statistics.pop(Accelerator(cpu=True))
        assert (logged["tokens_per_second"], logged["data_wait_share"]) == (tokens_per_second, data_wait_share)


def test_the_waits_of_all_batches_of_a_line_are_added(monkeypatch):
    # Waits from 100 to 101 and from 105 to 107; the line at 110.
    statistics, clock = StepStatistics(), iter([100.0, 101.0, 105.0, 107.0, 110.0])
    monkeypatch.setattr("hf_kd_ranking.training.callbacks.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    for _ in range(2):
        with statistics.waiting():
            pass
        features = {"attention_mask": torch.tensor([[[1, 1, 1], [1, 1, 0]]])}
        statistics.add(features, torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    logged = statistics.pop(Accelerator(cpu=True))
    assert (logged["tokens_per_second"], logged["data_wait_share"]) == (1.0, 3 / 10)


@pytest.mark.parametrize(("model", "workers"), [("bert_dot", 0), ("bert_dot", 2)], indirect=["model"])
def test_workers_of_training_stay_for_all_epochs(model, make_trainer, workers):
    trainer = make_trainer(model, dataloader_num_workers=workers)
    trainer.eval_dataset = trainer.train_dataset
    assert trainer.get_train_dataloader().base_dataloader.persistent_workers == (workers > 0)
    # Trainer would evaluate every data set on the first one.
    assert not trainer.get_eval_dataloader().base_dataloader.persistent_workers


def test_eval_loss_is_the_mean_over_rows_not_batches(student, make_trainer):
    trainer = make_trainer(student, per_device_eval_batch_size=4, teacher_scale="0.5")
    metrics = trainer.evaluate(trainer.train_dataset.select(range(9)))  # batches of 4, 4 and 1
    student_margins, teacher_margins = margins_of(trainer, range(9))
    wanted = ((student_margins - 0.5 * teacher_margins) ** 2).mean()
    assert metrics["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)
    agreement = ((student_margins > 0) == (teacher_margins > 0)).float().mean().item()
    assert metrics["eval_pairwise_agreement"] == pytest.approx(agreement)


def test_best_checkpoint_by_ndcg_is_loaded_at_the_end(student, make_trainer, tmp_path):
    figures = iter([0.2, 0.9, 0.5])
    trainer = make_trainer(
        student,
        {"evaluator": lambda ranker: {"nDCG@10": next(figures)}},
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_nDCG@10",
    )
    trainer.train()
    best, last = (load_file(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3))
    assert logged(trainer, "eval_nDCG@10") == [0.2, 0.9, 0.5]
    weights = trainer.model.state_dict()
    assert all(torch.equal(weights[name], best[name]) for name in best)
    assert not all(torch.equal(best[name], last[name]) for name in best)
