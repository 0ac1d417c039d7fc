"""The trainer's promises: one forward a step, exact accumulation, exact resume, the same on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import hf_kd_ranking as kd

SETTINGS = {
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 2,
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
}


@pytest.fixture
def trainer(model, toy, tokenizer, tmp_path):
    def make(rows: int = 60, **settings) -> kd.RankingTrainer:
        torch.manual_seed(5)
        fresh = type(model)(model.config)
        fresh.load_state_dict(model.state_dict())
        args = kd.RankingTrainingArguments(str(tmp_path / "out"), **SETTINGS | settings)
        queries, documents = (kd.TextStore.from_tsv(toy / f"{name}.tsv") for name in ("queries", "collection"))
        candidates, qrels = kd.read_run(toy / "candidates.trec"), kd.read_qrels(toy / "qrels.txt")
        return kd.RankingTrainer(
            fresh,
            args,
            train_dataset=kd.load_teacher_scores(toy / "scores.tsv").select(range(rows)),
            queries=queries,
            documents=documents,
            evaluator=kd.RerankingEvaluator(candidates, qrels, queries, documents),
            processing_class=tokenizer,
        )

    return make


@pytest.fixture(autouse=True)
def no_dropout(model):
    model.config.encoder_config.hidden_dropout_prob = 0.0
    model.config.encoder_config.attention_probs_dropout_prob = 0.0


def parameters(trainer: kd.RankingTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_the_loss_is_margin_mse_of_one_forward_and_the_batch_stays(trainer, monkeypatch):
    trainer = trainer(teacher_scale="0.5")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    keys, calls = set(batch), []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    student = outputs.scores[:, 0] - outputs.scores[:, 1]
    teacher = torch.tensor(
        [trainer.train_dataset[i]["pos_score"] - trainer.train_dataset[i]["neg_score"] for i in range(4)]
    )
    torch.testing.assert_close(loss, (student - 0.5 * teacher).square().mean())
    assert len(calls) == 1 and set(batch) == keys


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), (2, 4), (3, 3)])
def test_accumulation_changes_nothing_though_the_last_group_is_smaller(trainer, batch, accumulation):
    whole = trainer(rows=21, per_device_train_batch_size=batch * accumulation, max_grad_norm=0)
    parts = trainer(
        rows=21, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_grad_norm=0
    )
    losses = []
    for run in (whole, parts):
        run.args.optim, run.args.learning_rate = "sgd", 1e-3  # Adam would blow rounding up
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    torch.testing.assert_close(parameters(whole), parameters(parts), atol=1e-5, rtol=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_save = state.global_step == self.step


@pytest.mark.parametrize("step", [3, 11])  # in the first and in the second of two epochs of 8 steps
def test_a_resumed_run_ends_bitwise_where_an_uninterrupted_one_ends(trainer, step, tmp_path):
    whole = trainer(teacher_scale="match")
    whole.train()
    stopped = trainer(teacher_scale="match")
    stopped.add_callback(StopAt(step))
    stopped.train()
    assert stopped.state.global_step == step
    resumed = trainer(teacher_scale="match")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
    assert resumed.state.global_step == whole.state.global_step == 16
    assert resumed.teacher_scale == whole.teacher_scale
    assert torch.equal(parameters(whole), parameters(resumed))
    assert not torch.equal(parameters(whole), parameters(stopped))


def test_match_gives_teacher_margins_the_spread_of_the_students(trainer):
    trainer = trainer(teacher_scale="match", max_steps=1, rows=24)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(24)])
    teacher = batch.pop("teacher_scores")
    with torch.no_grad():
        student = trainer.model.eval()(**batch).scores
    ratio = torch.stack([(scores[:, 0] - scores[:, 1]).square().mean().sqrt() for scores in (student, teacher)])
    trainer.train()
    assert trainer.teacher_scale == pytest.approx((ratio[0] / ratio[1]).item(), rel=1e-4)
    assert [entry["teacher_scale"] for entry in trainer.state.log_history if "teacher_scale" in entry]


def test_new_layers_learn_at_their_own_rate(trainer):
    trainer = trainer(head_learning_rate=0.5)
    groups = trainer.create_optimizer().param_groups
    head = {id(p) for p in trainer.model.parameters()} - {id(p) for p in trainer.model.bert_model.parameters()}
    assert {id(p) for group in groups if group["lr"] == 0.5 for p in group["params"]} == head
    assert sum(len(group["params"]) for group in groups) == len(list(trainer.model.parameters()))


def test_the_best_checkpoint_by_ndcg_is_loaded_at_the_end(trainer):
    trainer = trainer(
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_nDCG@10",
    )
    trainer.train()
    logged = [entry["eval_nDCG@10"] for entry in trainer.state.log_history if "eval_nDCG@10" in entry]
    assert len(logged) == 8 and len(set(logged)) > 1
    assert trainer.evaluate()["eval_nDCG@10"] == max(logged)


SCRIPT = """
import json, sys
import hf_kd_ranking as kd
from hf_kd_ranking.training.job import TrainingJob
job = TrainingJob(**json.loads(sys.argv[1]))
args = kd.RankingTrainingArguments(**json.loads(sys.argv[2]))
kd.train_ranker(job, args)
"""


def test_two_processes_log_the_evaluation_figures_of_one(encoder, toy, tmp_path):
    job = {"model_name": str(encoder), "architecture": "bert_dot", "max_query_length": 8, "max_document_length": 16}
    files = {"teacher_scores": "scores.tsv", "collection": "collection.tsv", "queries": "queries.tsv"}
    files |= {"candidates": "candidates.trec", "qrels": "qrels.txt"}
    job |= {name: str(toy / file) for name, file in files.items()}
    (tmp_path / "job.py").write_text(SCRIPT)
    results, weights = {}, {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        args = SETTINGS | {"output_dir": str(out), "per_device_train_batch_size": 8 // processes, "optim": "sgd"}
        args |= {
            "learning_rate": 1e-4,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "max_steps": 8,
            "num_train_epochs": 1,
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = command if processes > 1 else [sys.executable]
        environment = os.environ | {"PYTHONPATH": str(Path(kd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(tmp_path / "job.py"), json.dumps(job), json.dumps(args)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        results[processes] = [entry["eval_nDCG@10"] for entry in history if "eval_nDCG@10" in entry]
        weights[processes] = kd.load_ranker(str(out)).state_dict()
    assert len(results[1]) >= 2 and results[1] == pytest.approx(results[2])
