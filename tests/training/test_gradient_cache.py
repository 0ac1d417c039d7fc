"""A gradient cache: parts of a batch, run twice, have the gradients of the whole batch run once."""

import json

import pytest
import torch
from torch import Tensor

import hf_kd_ranking as kd
from hf_kd_ranking.data.rows import TeacherRows
from hf_kd_ranking.models import parts

STORABLE = pytest.mark.parametrize("model", ["bert_dot", "colbert", "prettr", "tk"], indirect=True)
BERT_DOT = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
LOSS = "margin_mse:1,in_batch_info_nce(temperature=4):0.2"


@pytest.fixture
def lists(tmp_path) -> TeacherRows:
    """Eight rows of two to four documents."""
    lines = []
    for place in range(8):
        doc_ids = list(range(4 * place, 4 * place + 2 + place % 3))
        scores = [float(3 * score % 5) for score in doc_ids]
        lines.append(json.dumps({"query_id": 100 + place, "doc_ids": doc_ids, "teacher_scores": scores}))
    (tmp_path / "lists.jsonl").write_text("\n".join(lines) + "\n")
    return kd.load_teacher_scores(tmp_path / "lists.jsonl")


def gradients(trainer: kd.RankingTrainer) -> dict[str, Tensor]:
    """Return the loss and the gradients of a step over the first eight rows, from the same random numbers."""
    trainer.model.train()
    trainer.model.zero_grad()
    torch.manual_seed(3)
    rows = [trainer.train_dataset[row] for row in range(8)]
    loss = trainer.training_step(trainer.model, trainer.data_collator(rows), num_items_in_batch=8)
    found = {name: value.grad.clone() for name, value in trainer.model.named_parameters() if value.grad is not None}
    return {"loss": loss, **found}


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        difference = (got[name] - value).abs().max().item()
        assert difference <= tolerance * max(1, value.abs().max().item()), name


@STORABLE
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 0.02)])
def test_parts_have_the_gradients_of_the_whole_batch(student, make_trainer, lists, bf16, tolerance):
    data = {"train_dataset": lists}
    wanted = gradients(make_trainer(student, data, loss=LOSS, bf16=bf16))
    trainer = make_trainer(student, data, loss=LOSS, bf16=bf16, gradient_cache=3)  # parts of 3, 3 and 2 rows
    assert_equal(gradients(trainer), wanted, tolerance)


@STORABLE
def test_second_run_of_a_part_has_the_dropout_of_the_first(model, make_trainer, monkeypatch):
    trainer = make_trainer(model, loss=LOSS, gradient_cache=3)
    got = gradients(trainer)
    monkeypatch.setattr(
        parts, "checkpoint", lambda run, *sides, use_reentrant: run(*sides)
    )  # all activations are kept
    assert_equal(got, gradients(trainer), 1e-5)


@BERT_DOT
def test_no_more_rows_run_at_once_and_each_runs_twice(model, make_trainer):
    trainer = make_trainer(model, loss=LOSS, gradient_cache=3)
    sizes, encode = [], model.encode

    def recorded(inputs: dict[str, Tensor], side: str) -> tuple[Tensor, None]:
        if side == "document":
            sizes.append(len(inputs["input_ids"]))
        return encode(inputs, side)

    model.encode = recorded
    gradients(trainer)
    assert sizes == [3, 3, 2, 2, 3, 3]  # the backward pass begins at the last part
    sizes.clear()
    trainer.evaluate(trainer.train_dataset.select(range(8)))
    assert sizes == [8]


@BERT_DOT
def test_teacher_and_accumulation_leave_the_weights_equal(student, make_trainer, encoder, tokenizer):
    torch.manual_seed(7)
    lengths = {"max_query_length": 8, "max_document_length": 16}
    teacher = kd.Ranker(kd.ColBERT.from_encoder(encoder, compression_dim=4, **lengths), tokenizer)
    start = {name: value.clone() for name, value in student.state_dict().items()}
    ends = []
    for size in (None, 2):
        student.load_state_dict(start)
        trainer = make_trainer(
            student,
            {"in_batch_teacher": teacher},
            loss="margin_mse:1,in_batch_margin_mse:0.5",
            gradient_accumulation_steps=2,
            max_steps=3,
            optim="sgd",
            learning_rate=1e-2,
            gradient_cache=size,
        )
        trainer.train()
        ends.append({name: value.clone() for name, value in student.state_dict().items()})
    assert_equal(ends[1], ends[0], 1e-5)
    assert any((ends[0][name] - value).abs().max() > 1e-3 for name, value in start.items())


@BERT_DOT
def test_own_loss_function_over_the_batch_has_a_cache(student, make_trainer):
    def all_pairs(outputs: object, labels: Tensor, num_items_in_batch: int) -> Tensor:
        return (outputs.query_vectors @ outputs.document_vectors.flatten(0, 1).T).square().mean()

    own = {"compute_loss_func": all_pairs}
    wanted = gradients(make_trainer(student, own))
    assert_equal(gradients(make_trainer(student, own, gradient_cache=3)), wanted, 1e-5)


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        ("bert_cat", "margin_mse", "and a BERT_Cat reads each document with its query: give a smaller per_device"),
        ("prettr-query_length", "margin_mse", "and a PreTTR reads each document with its query"),
        ("colbert", "margin_mse:1,kl_div:2", "and margin_mse and kl_div compare only the documents of one row"),
    ],
    indirect=["model"],
)
def test_cache_without_a_use_is_refused(model, make_trainer, lists, loss, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model, {"train_dataset": lists}, loss=loss, gradient_cache=3)


def test_cache_of_no_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient_cache must be at least 1 query, got 0"):
        kd.RankingTrainingArguments(str(tmp_path), gradient_cache=0)
