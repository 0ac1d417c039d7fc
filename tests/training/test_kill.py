"""Two processes of a run, one of them killed with SIGKILL: started again, the run ends bit by bit as undisturbed."""

import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback, TrainerState
from warm_processes import start_server

import hf_kd_ranking as kd

# 64 rows in batches of 4, one per process: 8 steps per epoch, the end within the third one.
SETTINGS = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 3,
    "max_steps": 20,
    "logging_steps": 3,  # and with every checkpoint, so that the sums of a line never span a kill
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "resume_from_checkpoint": "true",
    "use_cpu": True,
    "disable_tqdm": True,
}
TIMINGS = ("tokens_per_second", "data_wait_share")


class KillAfter(TrainerCallback):
    """Kill the process after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(model: Path, toy: Path, output: Path, rank: int, port: int, kill_after: int | None) -> None:
    """Train in one process of a run; exit with status 0 only at the end of training."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate takes more otherwise, which hang in a forked process
    torch.set_num_threads(1)
    args = kd.RankingTrainingArguments(str(output), **SETTINGS)
    trainer = kd.RankingTrainer(
        kd.load_ranker(model),
        args,
        train_dataset=kd.load_teacher_scores(toy / "scores.tsv"),
        queries=kd.TextStore.from_tsv(toy / "queries.tsv"),
        documents=kd.TextStore.from_tsv(toy / "collection.tsv"),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[KillAfter(kill_after)] if kill_after is not None and rank == 1 else None,
    )
    trainer.train(resume_from_checkpoint=args.checkpoint_to_resume())
    trainer.save_model()
    trainer.save_state()
    os._exit(0)  # the process group is not taken down, as it is not by users' programs: under load that has hung


def run(model: Path, toy: Path, output: Path, kill_after: int | None = None) -> None:
    """Start a run, and kill the other process when one was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = start_server()
    processes = [context.Process(target=train, args=(model, toy, output, rank, port, kill_after)) for rank in (0, 1)]
    for process in processes:
        process.start()
    processes[1].join(240)
    if kill_after is not None:
        processes[0].kill()
    processes[0].join(240)
    wanted = 0 if kill_after is None else -signal.SIGKILL
    assert processes[1].exitcode == wanted
    assert kill_after is not None or processes[0].exitcode == 0


def outcome(output: Path) -> tuple[dict, list]:
    """The parameters at the end, and what was logged, without times."""
    lines = []
    for entry in TrainerState.load_from_json(str(output / "trainer_state.json")).log_history:
        if "loss" in entry:
            lines.append({name: value for name, value in entry.items() if name not in TIMINGS})
    return load_file(output / "model.safetensors"), lines


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert_dot-mean-compressed"], indirect=True)
def test_run_of_two_processes_killed_twice_ends_as_undisturbed(model, tokenizer, toy, tmp_path):
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "model")
    run(tmp_path / "model", toy, tmp_path / "whole")
    for step in (5, 12):
        run(tmp_path / "model", toy, tmp_path / "killed", kill_after=step)
    run(tmp_path / "model", toy, tmp_path / "killed")
    (weights, lines), (wanted_weights, wanted_lines) = outcome(tmp_path / "killed"), outcome(tmp_path / "whole")
    assert lines == wanted_lines
    assert weights.keys() == wanted_weights.keys()
    assert all(torch.equal(weights[name], wanted_weights[name]) for name in weights)
