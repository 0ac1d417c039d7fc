"""Faults while training runs: losses that are not numbers, full disks, SIGTERM, checkpoints of other runs."""

import copy
import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback, TrainerControl

import hf_kd_ranking as kd
from hf_kd_ranking.data.rows import TeacherRows
from hf_kd_ranking.training.callbacks import StopOnTermination
from hf_kd_ranking.training.checkpoints import RUN_FILE, last_complete

pytestmark = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)


class At(TrainerCallback):
    """Do something at the end of a step."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.action()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


# ---- Losses that are not numbers ------------------------------------------------------------------------------------


@pytest.fixture
def infinite(tmp_path) -> TeacherRows:
    """Rows of which one has scores beyond float32's square root, so that the square of a margin overflows."""
    rows = [f"{3e38 if i == 40 else 1}\t0\t{100 + i % 12}\t{i % 40}\t{(i + 7) % 40}\n" for i in range(64)]
    (tmp_path / "rows.tsv").write_text("".join(rows))
    return kd.load_teacher_scores(tmp_path / "rows.tsv")


def test_infinite_loss_stops_before_the_weights_change(model, make_trainer, infinite, tmp_path):
    settings = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(model, {"train_dataset": infinite}, **settings)
    step = list(trainer.train_sampler).index(40) // 4 + 1
    with pytest.raises(FloatingPointError, match=rf"The loss of step {step} is inf; .* documents .*104: 0, 7"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert last_complete(tmp_path / "out") == (str(tmp_path / "out" / f"checkpoint-{step - 1}") if step > 1 else None)


@pytest.mark.parametrize("when", ["save", "log", "step", "end"])
def test_infinite_loss_is_found_a_step_late_on_a_gpu(model, make_trainer, infinite, tmp_path, when):
    settings = {"per_device_train_batch_size": 4, "logging_steps": 1 if when == "log" else 1000}
    if when == "save":
        settings |= {"save_strategy": "steps", "save_steps": 1}
    step = list(make_trainer(model, {"train_dataset": infinite}, **settings).train_sampler).index(40) // 4 + 1
    if when == "end":
        settings["max_steps"] = step
    trainer = make_trainer(model, {"train_dataset": infinite}, **settings)
    trainer.finite_losses.is_late = True
    with pytest.raises(FloatingPointError, match=rf"step {step} is inf; the weights were changed .*104: 0, 7"):
        trainer.train()
    assert trainer.state.global_step == step  # the next one did not change the weights any more
    assert checkpoints(tmp_path / "out") == ([f"checkpoint-{i}" for i in range(1, step)] if when == "save" else [])


def test_nan_weights_are_not_saved(model, make_trainer, tmp_path):
    def spoil() -> None:
        model.bert_model.embeddings.word_embeddings.weight.data[3, 3] = torch.nan

    trainer = make_trainer(model, {"callbacks": [At(3, spoil)]}, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=r"step 3: the weights of .*word_embeddings.weight are not finite"):
        trainer.train()
    assert checkpoints(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]


# ---- Full disks and half checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [20_000, 60_000], ids=["weights", "optimizer"])
def test_a_full_disk_leaves_the_last_checkpoint_loadable(model, make_trainer, tmp_path, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)  # files cannot grow beyond it, as on a full disk

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trainer = make_trainer(model, {"callbacks": [At(3, fill)]}, **settings)
    try:
        with pytest.raises(
            OSError, match=r"checkpoint-4 could not be written .* last complete one is .*checkpoint-2\. "
        ):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints(tmp_path / "out") == ["checkpoint-2"]
    assert trainer.args.save_total_limit == 1
    resumed = make_trainer(model, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 24


def test_last_checkpoint_stays_until_the_next_is_complete(model, make_trainer, tmp_path, monkeypatch):
    written = []

    def put_in_place(temporary: Path, path: Path) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError("disk full")
        temporary.replace(path)

    monkeypatch.setattr("hf_kd_ranking.artifacts._put_in_place", put_in_place)
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written .* last complete one is .*checkpoint-2\. "):
        make_trainer(model, save_strategy="steps", save_steps=2, save_total_limit=1, token_cache=False).train()
    assert [str(path.relative_to(tmp_path / "out")) for path in written] == [
        "checkpoint-2/run.json",
        "checkpoint-4/run.json",
    ]
    assert checkpoints(tmp_path / "out") == ["checkpoint-2"]


def test_half_written_checkpoint_is_skipped(model, make_trainer, tmp_path):
    make_trainer(model, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    folder = tmp_path / "out"
    assert checkpoints(folder) == ["checkpoint-3", "checkpoint-4"]
    (folder / "checkpoint-4" / RUN_FILE).unlink()  # written last
    (folder / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    args = kd.RankingTrainingArguments(str(folder), resume_from_checkpoint="true", use_cpu=True)
    assert args.checkpoint_to_resume() == last_complete(folder) == str(folder / "checkpoint-3")
    shutil.rmtree(folder / "checkpoint-3")
    assert args.checkpoint_to_resume() is None
    assert last_complete(tmp_path / "nowhere") is None


# ---- Other runs -----------------------------------------------------------------------------------------------------


def test_checkpoint_of_another_run_is_refused(model, make_trainer, encoder, toy, tmp_path):
    make_trainer(model, max_steps=1, save_strategy="steps", save_steps=1).train()
    rows = kd.load_teacher_scores(toy / "scores.tsv")
    lines = (toy / "scores.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "other.tsv").write_text("".join([f"7{lines[0]}", *lines[1:]]))
    other_rows = kd.load_teacher_scores(tmp_path / "other.tsv")
    compressed = kd.BertDot.from_encoder(encoder, max_query_length=8, max_document_length=16, compression_dim=4)
    colbert = kd.ColBERT.from_encoder(encoder, max_query_length=8, max_document_length=16)
    for trainer, message in (
        (make_trainer(compressed), r"config: compression_dim is None there and 4 here"),
        (make_trainer(colbert), r"config: .*model_type is 'BERT_Dot' there and 'ColBERT' here"),
        (make_trainer(model, {"train_dataset": rows.select(range(60))}), r"data: .*rows is 64 there and 60 here"),
        (make_trainer(model, {"train_dataset": other_rows}), r"data: content is '\w+' there and '\w+' here"),
    ):
        with pytest.raises(ValueError, match=rf"checkpoint-1 belongs to another run \(.*{message}"):
            trainer.train(resume_from_checkpoint=True)


def test_another_order_of_rows_is_a_warning(model, make_trainer, tmp_path):
    make_trainer(model, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.warns(UserWarning, match=r"another order \(seed is 42 there and 7 here\)"):
        make_trainer(model, max_steps=2, seed=7, learning_rate=1e-5).train(resume_from_checkpoint=True)
    (tmp_path / "out" / "checkpoint-1" / RUN_FILE).unlink()
    with pytest.warns(UserWarning, match="does not say to which run it belongs"):
        make_trainer(model, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_a_finished_run_resumed_trains_no_further_step(model, make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10}  # within the second epoch
    make_trainer(model, **settings).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = make_trainer(model, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 10
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_resuming_without_a_complete_checkpoint_is_refused(model, make_trainer, tmp_path):
    with pytest.raises(ValueError, match="out holds no complete checkpoint to resume; start afresh"):
        make_trainer(model, max_steps=1).train(resume_from_checkpoint=True)


def test_tokenizer_with_more_special_tokens_resumes(model, make_trainer, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.bos_token, other.eos_token = "[CLS]", "[SEP]"
    for steps in (1, 2):
        trainer = make_trainer(copy.deepcopy(model), max_steps=steps, save_strategy="steps", save_steps=1)
        trainer.processing_class = other
        trainer.train(resume_from_checkpoint=steps == 2)
    assert trainer.state.global_step == 2


# ---- SIGTERM --------------------------------------------------------------------------------------------------------


def test_sigterm_finishes_the_step_saves_and_stops(model, make_trainer, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(model, {"callbacks": [At(5, terminate)]})
    trainer.train()
    assert trainer.termination.is_asked
    assert 5 <= trainer.state.global_step <= 6
    assert last_complete(tmp_path / "out").endswith(f"checkpoint-{trainer.state.global_step}")
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = make_trainer(model)
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.termination.is_asked, resumed.state.global_step) == (False, 24)


def test_sigterm_checkpoint_outlives_a_better_one(model, make_trainer, toy, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 10}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    callback = At(7, terminate)
    rows = kd.load_teacher_scores(toy / "scores.tsv")
    trainer = make_trainer(model, {"callbacks": [callback], "eval_dataset": rows}, save_total_limit=1, **settings)
    trainer.train()
    assert last_complete(tmp_path / "out").endswith(f"checkpoint-{trainer.state.global_step}")


def test_dataloader_workers_survive_sigterm_to_the_group(model, make_trainer, tmp_path):
    child = os.fork()
    if child == 0:  # a process group of its own, which the signal goes to
        os.setsid()
        status = 1
        try:
            torch.set_num_threads(1)  # a forked process has no other threads
            ready = At(5, lambda: ((tmp_path / "ready").touch(), time.sleep(2)))
            trainer = make_trainer(model, {"callbacks": [ready]}, dataloader_num_workers=2, max_steps=20)
            trainer.train()
            step = trainer.state.global_step
            status = 0 if step < 9 and last_complete(tmp_path / "out").endswith(f"checkpoint-{step}") else 2
        finally:
            os._exit(status)
    while not (tmp_path / "ready").exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.05)
    os.killpg(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_sigterm_of_a_job_leaves_no_results_and_resumes(model, toy, encoder, tmp_path, monkeypatch):
    files = {"teacher_scores": "scores.tsv", "collection": "collection.tsv", "queries": "queries.tsv"}
    job = kd.TrainingJob(str(encoder), "bert_dot", max_query_length=8, max_document_length=16)
    for name, file in files.items():
        setattr(job, name, str(toy / file))
    settings = {"use_cpu": True, "disable_tqdm": True, "resume_from_checkpoint": "true", "num_train_epochs": 1}
    args = kd.RankingTrainingArguments(str(tmp_path / "out"), per_device_train_batch_size=4, **settings)
    compute_loss, calls = kd.RankingTrainer.compute_loss, []

    def terminate_third(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            terminate()
        return compute_loss(self, *arguments, **named)

    monkeypatch.setattr(kd.RankingTrainer, "compute_loss", terminate_third)
    with pytest.raises(SystemExit, match=r"Stopped by SIGTERM at step 3 .* --resume-from-checkpoint true resumes"):
        kd.train_ranker(job, args)
    assert not (tmp_path / "out" / "results.json").exists()
    kd.train_ranker(job, args)
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 16
    assert len(calls) == 16


def test_processes_agree_to_stop_about_every_five_seconds(model, monkeypatch):
    clock, agreed, step = [0.0], [], [0]

    def reduce(mine, reduction):  # the other process: as fast, and signalled after 15 steps
        agreed.append(step[0])
        return mine + torch.tensor([float(step[0] > 15), mine[1]])

    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"), reduce=reduce)
    monkeypatch.setattr("hf_kd_ranking.training.callbacks.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    termination, control = StopOnTermination(accelerator), TrainerControl()
    with termination.listening():
        while not control.should_training_stop and step[0] < 40:
            step[0] += 1
            clock[0] += 0.5
            termination.on_step_end(None, None, control)
    assert agreed == [1, 11, 21]
    assert termination.is_asked and control.should_save


def test_processes_agree_at_the_last_step(model):
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"), reduce=lambda mine, _: mine * 2)
    termination = StopOnTermination(accelerator)
    with termination.listening():
        termination.on_step_end(None, None, TrainerControl())
        terminate()
        termination.on_step_end(None, None, TrainerControl())
        assert not termination.is_asked, "the second step is not one at which they agree"
        termination.on_step_end(None, None, TrainerControl(should_training_stop=True))
        assert termination.is_asked


def test_training_in_another_thread_leaves_signals_alone(model, make_trainer):
    trainer = make_trainer(model, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1
