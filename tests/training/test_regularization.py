"""Penalties on sparse vectors: by hand, in training, and what is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.losses import Regularizer, get_losses, get_regularizers
from hf_kd_ranking.models import RankingOutput
from hf_kd_ranking.training.regularization import SparsityStatistics, regularization_losses

SPLADE = pytest.mark.parametrize("model", ["splade"], indirect=True)
ONE_PROCESS = SimpleNamespace(num_processes=1, is_main_process=True, reduce=lambda counts, _: counts)
QUERIES = torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, -1.0]])
DOCUMENTS = torch.tensor([[[2.0, 0.0, 0.0], [4.0, 2.0, 0.0]], [[0.0, 1.0, 0.0], [9.0, 9.0, 9.0]]])
LISTED = torch.tensor([[True, True], [True, False]])


def penalties(text: str, step: int, mask=LISTED) -> dict[str, float]:
    outputs = RankingOutput(scores=torch.zeros(2, 2), query_vectors=QUERIES, document_vectors=DOCUMENTS)
    state = SimpleNamespace(global_step=step, max_steps=10)
    trainer = SimpleNamespace(state=state, regularizers=get_regularizers(text), accelerator=ONE_PROCESS)
    return {name: value.item() for name, value in regularization_losses(trainer, outputs, mask).items()}


def test_penalties_match_hand_computed_values():
    # Mean weights: queries (.5, 0, 2), listed documents (2, 1, 0), all documents (3.75, 3, 2.25).
    text = "margin_mse:1,flops(query=2,document=3),l1(document=0.5)"
    flops, l1 = 2 * (0.5**2 + 2**2) + 3 * (2**2 + 1), 0.5 * (2 + 1)
    assert penalties(text, 0) == pytest.approx({"flops": flops, "l1": l1})
    assert penalties("margin_mse,l1(query=1,document=1)", 0, None) == pytest.approx({"l1": 2.5 + 3.75 + 3 + 2.25})
    at_step = [penalties("margin_mse,l1(query=4,warmup=0.5)", step)["l1"] for step in (0, 1, 2, 5, 9)]
    assert at_step == pytest.approx([0, 10 * 0.04, 10 * 0.16, 10, 10])


def test_sparsity_statistics_match_hand_computed_values():
    statistics = SparsityStatistics()
    assert statistics.pop(ONE_PROCESS, "margin_mse") == {}
    for _ in range(2):
        statistics.add(RankingOutput(query_vectors=QUERIES, document_vectors=DOCUMENTS), LISTED)
    # Words that queries have: 1/2, 0, 1; documents: 2/3, 2/3, 0.
    found = statistics.pop(ONE_PROCESS, "margin_mse")
    assert found == pytest.approx({"active_query": 1.5, "active_document": 4 / 3, "operations": 1 / 3})
    assert statistics.pop(ONE_PROCESS, "margin_mse") == {}


def test_penalties_are_read_beside_losses():
    text = "margin_mse:2, flops(query=0.3,document=0.1,warmup=0.3),in_batch_info_nce(temperature=0.5)"
    assert get_losses(text) == {"margin_mse": 2.0, "in_batch_info_nce(temperature=0.5)": 1.0}
    assert get_regularizers(text) == {"flops": Regularizer("flops", 0.3, 0.1, 0.3)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flops(query=1)", "A penalty is added to a loss, and 'flops.query=1.' has none"),
        ("margin_mse,flops", r"weights of flops are its settings, flops\(query=0.3,document=0.1\), got 'flops'"),
        ("margin_mse,flops(query=1):2", r"weights of flops are its settings, .* got 'flops\(query=1\):2'"),
        ("margin_mse,flops(warmup=0.3)", "flops needs a weight, query= or document="),
        ("margin_mse,l1(query=1,warmup=3)", "a warmup of at most 1"),
        ("margin_mse,l1(query=0)", "The query of l1 must be a positive number, got '0'"),
        ("margin_mse,l1(queries=1)", "l1 has no setting 'queries'; it has query, document, warmup"),
        ("margin_mse,l1(query=1),l1(document=1)", "The penalty l1 is given twice"),
        ("margin_mse,flop(query=1)", r"Unknown loss 'flop'; did you mean 'flops'\?"),
    ],
)
def test_bad_penalties_are_refused(text, message, tmp_path):
    with pytest.raises(kd.InputError, match=message):
        kd.RankingTrainingArguments(output_dir=str(tmp_path), loss=text, use_cpu=True)


@pytest.mark.parametrize("model", ["bert_dot", "bert_cat"], indirect=True)
def test_penalties_are_refused_for_other_rankers(model, make_trainer):
    with pytest.raises(ValueError, match=r"flops is a penalty on sparse vectors, which a BERT_(Dot|Cat) does"):
        make_trainer(model, loss="margin_mse,flops(document=1)")


@SPLADE
def test_training_with_a_penalty_logs_and_lowers_the_weights(student, make_trainer):
    active = {}
    for loss in ("margin_mse:1e-9", "margin_mse:1e-9,l1(query=1,document=1),flops(document=1,warmup=0.5)"):
        trainer = make_trainer(copy.deepcopy(student), loss=loss, max_steps=12, learning_rate=3e-2)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "active_document" in entry]
        assert logs[0]["operations"] <= min(logs[0]["active_query"], logs[0]["active_document"])
        active[loss] = logs[-1]["active_document"]
        ranker = trainer.ranker
        counted = ranker.encode_documents(["apple bread", "moon"])
        assert counted.nnz <= 2 * 39
    plain, penalised = active.values()
    assert penalised < plain / 2
    assert {"loss_l1", "loss_flops"} <= logs[-1].keys()


@SPLADE
def test_training_warns_once_when_no_weights_are_left(student, make_trainer, caplog):
    loss = "margin_mse:1e-9,l1(document=100)"
    trainer = make_trainer(student, loss=loss, max_steps=20, learning_rate=0.3, logging_steps=2)
    trainer.train()
    active = [entry["active_document"] for entry in trainer.state.log_history if "active_document" in entry]
    assert active.count(0) > 1  # of several log lines
    [message] = [record.getMessage() for record in caplog.records if "has a word with a weight" in record.message]
    assert f"the loss {loss!r} is too strong: divide its weights by 10" in message
    assert message.startswith("No query and no document has")
