"""Losses over the batch: by hand, against a loop over single pairs, and what cannot have them."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hf_kd_ranking as kd
from hf_kd_ranking.data.passages import split_documents
from hf_kd_ranking.losses import LOSSES
from hf_kd_ranking.training.in_batch import can_be_live

STORABLE = pytest.mark.parametrize(
    "model", ["bert_dot", "bert_dot-mean-compressed", "colbert", "prettr", "splade", "tk", "tkl"], indirect=True
)
BERT_DOT = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
CHOSEN = [0, 1, 2, 3]


@pytest.fixture
def teacher(encoder, tokenizer) -> kd.Ranker:
    """A ColBERT with other weights than the students'."""
    torch.manual_seed(7)
    model = kd.ColBERT.from_encoder(encoder, max_query_length=8, max_document_length=16, compression_dim=4)
    return kd.Ranker(model, tokenizer)


def all_scores(ranker: kd.Ranker, trainer: kd.RankingTrainer, chosen: list[int]) -> Tensor:
    """Each query with all documents of the rows, pair by pair; own documents first."""
    rows = [trainer.train_dataset[i] for i in chosen]
    texts = trainer.data_collator
    documents = texts.documents[[doc_id for row in rows for doc_id in row["doc_ids"]]]
    scores = []
    for place, row in enumerate(rows):
        own_first = documents[2 * place :] + documents[: 2 * place]
        scores.append(torch.from_numpy(ranker.score(texts.queries[row["query_id"]], own_first)))
    return torch.stack(scores)


def loss_of(trainer: kd.RankingTrainer, chosen: list[int]) -> Tensor:
    return trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in chosen]))


@STORABLE
@pytest.mark.parametrize("name", ["margin_mse", "kl_div", "mse"])
def test_in_batch_loss_is_that_of_all_pairs_one_by_one(model, teacher, make_trainer, tokenizer, name):
    loss = f"margin_mse:1,in_batch_{name}:0.75"
    trainer = make_trainer(model, {"in_batch_teacher": teacher}, loss=loss, teacher_scale="0.5")
    student_scores = all_scores(kd.Ranker(model, tokenizer), trainer, CHOSEN)
    teacher_scores = all_scores(teacher, trainer, CHOSEN)
    rows = [trainer.train_dataset[i] for i in CHOSEN]
    own = torch.tensor([row["teacher_scores"] for row in rows])
    wanted = LOSSES["margin_mse"].function(student_scores[:, :2], 0.5 * own)
    wanted += 0.75 * LOSSES[name].function(student_scores, 0.5 * teacher_scores)
    assert loss_of(trainer, CHOSEN).item() == pytest.approx(wanted.item(), rel=1e-4)


@STORABLE
def test_in_batch_info_nce_leaves_out_other_positives(model, make_trainer, tokenizer, tmp_path):
    # Rows 0 and 1 are of one query, whose positives 1 and 2 stand in columns 0 and 2; column 5 is document 1 again.
    (tmp_path / "rows.tsv").write_text("1\t0\t100\t1\t8\n1\t0\t100\t2\t9\n1\t0\t101\t3\t1\n")
    rows, columns = kd.load_teacher_scores(tmp_path / "rows.tsv"), [[0, 1, 3, 4], [2, 3, 4, 1], [4, 5, 0, 1, 2, 3]]
    trainer = make_trainer(model, {"train_dataset": rows}, loss="in_batch_info_nce")
    ranker, texts, losses = kd.Ranker(model, tokenizer), trainer.data_collator, []
    documents = texts.documents[[1, 8, 2, 9, 3, 1]]
    for row, chosen in zip(rows, columns, strict=True):
        scores = torch.from_numpy(ranker.score(texts.queries[row["query_id"]], [documents[i] for i in chosen]))
        losses.append(-scores.log_softmax(0)[0])
    assert loss_of(trainer, [0, 1, 2]).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


@BERT_DOT
def test_in_batch_info_nce_leaves_out_other_passages_of_positives(model, make_trainer, tokenizer, tmp_path):
    # Columns are a#0, c, a#1, d, c, b: the positives of rows 0 and 1 are passages of one document.
    (tmp_path / "whole.tsv").write_text("a\tapple bread cat dog\nb\tmoon\nc\tking\nd\triver\n")
    whole = kd.TextStore.from_tsv(tmp_path / "whole.tsv")
    split = split_documents(whole, tokenizer, "2/2", tmp_path / "split")
    (tmp_path / "rows.tsv").write_text("1\t0\t100\ta#0\tc\n1\t0\t101\ta#1\td\n1\t0\t102\tc\tb\n")
    rows, columns = kd.load_teacher_scores(tmp_path / "rows.tsv"), [[0, 1, 3, 4, 5], [2, 3, 4, 5, 1], [4, 5, 0, 2, 3]]
    trainer = make_trainer(model, {"train_dataset": rows, "documents": split}, loss="in_batch_info_nce")
    ranker, texts, losses = kd.Ranker(model, tokenizer), trainer.data_collator, []
    documents = split[["a#0", "c", "a#1", "d", "c", "b"]]
    for row, chosen in zip(rows, columns, strict=True):
        scores = torch.from_numpy(ranker.score(texts.queries[row["query_id"]], [documents[i] for i in chosen]))
        losses.append(-scores.log_softmax(0)[0])
    assert loss_of(trainer, [0, 1, 2]).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


@BERT_DOT
def test_in_batch_losses_train_and_leave_the_teacher_alone(teacher, make_trainer, model):
    before = copy.deepcopy(teacher.model.state_dict())
    trainer = make_trainer(
        model,
        {"in_batch_teacher": teacher},
        loss="margin_mse:1,in_batch_margin_mse:0.75",
        num_train_epochs=6,
    )
    trainer.train()
    losses = [entry["loss_in_batch_margin_mse"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert all(torch.equal(before[name], value) for name, value in teacher.model.state_dict().items())


@STORABLE
def test_live_teacher_runs_in_bf16_and_scores_in_float32(model, teacher, make_trainer, monkeypatch):
    dtypes = []
    for ranker in (model, teacher.model):

        def recorded(*arguments: object, all_pairs: Callable = ranker.score_all_pairs) -> Tensor:
            scores = all_pairs(*arguments)
            dtypes.append(scores.dtype)
            return scores

        monkeypatch.setattr(ranker, "score_all_pairs", recorded)
    teacher.model.compressor.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    trainer = make_trainer(model, {"in_batch_teacher": teacher}, loss="in_batch_margin_mse", bf16=True)
    loss = loss_of(trainer, CHOSEN)
    assert loss.isfinite() and loss.dtype == torch.float32
    # The student's scores, the teacher's queries and documents, its scores.
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]


@BERT_DOT
def test_gradients_reach_documents_through_other_queries(model, make_trainer, teacher):
    trainer = make_trainer(model, {"in_batch_teacher": teacher}, loss="in_batch_mse")
    outputs = {}
    trainer.model.register_forward_hook(lambda _, __, output: outputs.update(output=output))
    loss = loss_of(trainer, CHOSEN)
    vectors = outputs["output"].document_vectors
    (gradient,) = torch.autograd.grad(loss, vectors)
    scores, wanted = outputs["output"].query_vectors @ vectors.flatten(0, 1).T, all_scores(teacher, trainer, CHOSEN)
    wanted = torch.stack([wanted[i].roll(2 * i) for i in range(4)])
    by_hand = 2 * (scores - wanted).T @ outputs["output"].query_vectors / scores.numel()
    torch.testing.assert_close(gradient.flatten(0, 1), by_hand, rtol=1e-3, atol=1e-3 * by_hand.abs().max().item())


@pytest.mark.parametrize(
    ("model", "loss", "with_teacher", "message"),
    [
        ("bert_dot", "in_batch_margin_mse", False, "in_batch_margin_mse needs a live teacher"),
        ("bert_dot", "margin_mse,in_batch_info_nce", True, "in_batch_teacher is read only by losses over the batch"),
        ("bert_cat", "in_batch_info_nce", False, "The student, a BERT_Cat, reads each document with its query"),
        ("prettr-query_length", "in_batch_info_nce", False, "The student, a PreTTR, reads each document"),
    ],
    indirect=["model"],
)
def test_in_batch_losses_refuse_students_and_missing_teachers(
    model, make_trainer, teacher, loss, with_teacher, message
):
    parts = {"in_batch_teacher": teacher} if with_teacher else {}
    with pytest.raises(ValueError, match=message):
        make_trainer(model, parts, loss=loss)


@pytest.mark.parametrize("loss", ["info_nce", "margin_mse:1,in_batch_info_nce:0.2"])
def test_info_nce_over_cosines_needs_a_temperature(encoder, make_trainer, loss):
    lengths = {"max_query_length": 8, "max_document_length": 16}
    cosines = kd.BertDot.from_encoder(encoder, normalize=True, **lengths)
    with pytest.raises(ValueError, match=r"info_nce takes a softmax .* cosines .*info_nce\(temperature=0.05\)"):
        make_trainer(cosines, loss=loss)
    make_trainer(cosines, loss=loss.replace("info_nce", "info_nce(temperature=0.05)"))
    make_trainer(kd.BertDot.from_encoder(encoder, **lengths), loss=loss)


@BERT_DOT
def test_temperature_divides_the_scores_of_all_pairs(model, make_trainer, tokenizer):
    trainer = make_trainer(model, loss="margin_mse:1,in_batch_info_nce(temperature=4):0.2", max_steps=1)
    of_query = {query_id: row for row, query_id in enumerate(trainer.train_dataset["query_id"])}
    chosen = list(of_query.values())[:4]  # of different queries, whose other positives would be left out
    scores = all_scores(kd.Ranker(model, tokenizer), trainer, chosen)
    own = torch.tensor([trainer.train_dataset[i]["teacher_scores"] for i in chosen])
    wanted = LOSSES["margin_mse"].function(scores[:, :2], own) - 0.2 * (scores / 4).log_softmax(1)[:, 0].mean()
    assert loss_of(trainer, chosen).item() == pytest.approx(wanted.item(), rel=1e-4)
    trainer.train()
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert "loss_in_batch_info_nce(temperature=4)" in line


def test_rankers_that_encode_documents_separately_can_be_live(model):
    is_joint = model.config.joins_texts or getattr(model.config, "document_position_offset", 0) == "query_length"
    assert can_be_live(model.config) is not is_joint


@BERT_DOT
def test_in_batch_teacher_that_joins_texts_is_refused(model, encoder, make_trainer, tokenizer):
    teacher = kd.Ranker(kd.BertCat.from_encoder(encoder, max_query_length=8, max_document_length=16), tokenizer)
    message = r"in_batch_teacher, a BERT_Cat, reads each document with its query; .*\(can_be_live\)"
    with pytest.raises(ValueError, match=message):
        make_trainer(model, {"in_batch_teacher": teacher}, loss="in_batch_margin_mse")


@BERT_DOT
def test_documents_that_fill_up_shorter_lists_count_nothing(model, teacher, make_trainer, tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"query_id": 100, "doc_ids": [1, 2], "teacher_scores": [1.0, 0.0]}\n'
        '{"query_id": 101, "doc_ids": [3, 4, 5], "teacher_scores": [1.0, 0.0, 0.0]}\n'
    )
    rows = kd.load_teacher_scores(tmp_path / "rows.jsonl")
    more = {"train_dataset": rows, "in_batch_teacher": teacher}
    trainer = make_trainer(model, more, loss="in_batch_margin_mse")
    texts = trainer.data_collator
    errors = []
    for query_id, doc_ids in ((100, [1, 2, 3, 4, 5]), (101, [3, 4, 5, 1, 2])):
        query, documents = texts.queries[query_id], texts.documents[doc_ids]
        student, taught = (ranker.score(query, documents) for ranker in (kd.Ranker(model, tokenizer), teacher))
        errors.append((((student[0] - student[1:]) - (taught[0] - taught[1:])) ** 2).mean())
    assert loss_of(trainer, [0, 1]).item() == pytest.approx(sum(errors) / 2, rel=1e-4)
