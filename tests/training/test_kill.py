"""A run killed with SIGKILL at any moment and started again ends bit by bit where an undisturbed run ends.

A killed process is forked from a server where everything is imported: a start takes a tenth of a second.
"""

import multiprocessing
import os
import random
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

import hf_kd_ranking as kd

KILLS = int(os.environ.get("HF_KD_RANKING_KILLS", "2"))  # of each architecture; 20 take three minutes
# 64 rows in batches of 4, two batches a step (one a process, where there are two): 8 steps an epoch, the end within
# the third one.
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
TIMINGS = (
    "tokens_per_second",
    "data_wait_share",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
)


def train(model: Path, toy: Path, output: Path, rank: int, processes: int, port: int, on_topics: bool) -> None:
    """What a process of a run does; exits with status 0 at the end of training alone."""
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate takes more, which hang in a forked process
    torch.set_num_threads(1)
    # Only files say what happened; a pipe of a killed process would not.
    log = os.open(output.with_suffix(f".log{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    queries, documents = kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")
    args = kd.RankingTrainingArguments(str(output), gradient_accumulation_steps=2 // processes, **SETTINGS)
    trainer = kd.RankingTrainer(
        kd.load_ranker(model),
        args,
        train_dataset=kd.load_teacher_scores(toy / "scores.tsv"),
        queries=queries,
        documents=documents,
        processing_class=AutoTokenizer.from_pretrained(model),
        query_clusters=np.arange(16) % 2 if on_topics else None,
    )
    trainer.train(resume_from_checkpoint=args.checkpoint_to_resume())
    trainer.save_model()
    trainer.save_state()
    os._exit(0)  # the process group is not taken down, as it is not by users' programs: under load that has hung


def run(model: Path, toy: Path, output: Path, processes: int, on_topics: bool, seconds: float | None = None) -> bool:
    """Start a run, kill all its processes after some seconds (None: never), and say whether it got to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("forkserver")  # not from this process, whose threads a fork would not have
    fork.set_forkserver_preload(["hf_kd_ranking.training.trainer"])
    arguments = (processes, port, on_topics)
    started = [fork.Process(target=train, args=(model, toy, output, i, *arguments)) for i in range(processes)]
    for process in started:
        process.start()
    deadline = time.monotonic() + (240 if seconds is None else seconds)
    for process in started:
        process.join(max(deadline - time.monotonic(), 0))
    statuses = [process.exitcode for process in started]
    for process in started:
        process.kill()
        process.join()
    text = "".join(path.read_text()[-2000:] for path in output.parent.glob(f"{output.name}.log*"))
    assert set(statuses) <= {None, 0}, f"not killed, and ended with {statuses}: {text}"
    assert seconds is not None or set(statuses) == {0}, f"too slow: {text}"
    return set(statuses) == {0}


def outcome(output: Path) -> tuple[dict, list]:
    """The parameters at the end, and what was logged, without times."""
    history = TrainerState.load_from_json(str(output / TRAINER_STATE_NAME)).log_history
    steps = [{name: value for name, value in entry.items() if name not in TIMINGS} for entry in history]
    return load_file(output / "model.safetensors"), [entry for entry in steps if "loss" in entry]


def check_kills(model, tokenizer, toy: Path, folder: Path, processes: int, on_topics: bool, kills: int) -> None:
    """Train undisturbed, then killed some times at random moments, and compare the ends."""
    kd.Ranker(model, tokenizer).save_pretrained(folder / "model")
    arguments, rng = (folder / "model", toy), random.Random(0)
    run(*arguments, folder / "whole", processes, on_topics)
    begin = time.monotonic()
    run(*arguments, folder / "again", processes, on_topics)  # the first one filled the caches
    seconds, killed, ended = time.monotonic() - begin, 0, [folder / "again"]
    while killed < kills:
        output = folder / f"killed{len(ended)}"
        if run(*arguments, output, processes, on_topics, rng.uniform(0.1, 1.0) * seconds):
            ended.append(output)  # it came to its end: the next kills hit another one
        else:
            killed += 1
    ended.append(folder / f"killed{len(ended)}")
    run(*arguments, ended[-1], processes, on_topics)
    wanted = outcome(folder / "whole")
    assert [entry["step"] for entry in wanted[1]] == [step for step in range(1, 21) if step % 2 == 0 or step % 3 == 0]
    for output in ended:
        weights, history = outcome(output)
        assert history == wanted[1]
        assert weights.keys() == wanted[0].keys()
        assert all(torch.equal(weights[name], wanted[0][name]) for name in weights), "other parameters"
    print(f"{type(model).__name__}: {killed} kills, {len(ended)} runs of {seconds:.1f} s")


@pytest.mark.parametrize(("processes", "on_topics"), [(1, True), (2, False)])
@pytest.mark.parametrize("model", ["bert_dot-mean-compressed"], indirect=True)
def test_a_killed_run_ends_where_an_undisturbed_one_does(model, tokenizer, toy, tmp_path, processes, on_topics):
    check_kills(model, tokenizer, toy, tmp_path, processes, on_topics, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert_cat", "bert_dot", "colbert", "prettr", "tk"], indirect=True)
def test_every_architecture_survives_kills(model, tokenizer, toy, tmp_path):
    check_kills(model, tokenizer, toy, tmp_path, 1, False, kills=KILLS)
