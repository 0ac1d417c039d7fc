"""An encoding killed with SIGKILL at any moment and started again ends with the bytes of an undisturbed one."""

import multiprocessing
import os
import random
import socket
import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval import encode

KILLS = int(os.environ.get("HF_KD_RANKING_KILLS", "4"))


def index(model: Path, texts: Path, output: Path, rank: int, processes: int, port: int) -> None:
    """What a process does; exits with status 0 at the end alone."""
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate takes more, which hang in a forked process
    torch.set_num_threads(1)
    assert PartialState(cpu=True).num_processes == processes
    log = os.open(output.with_suffix(f".log{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    encode.DOCUMENTS_PER_BLOCK = 10
    ranker = kd.Ranker.from_pretrained(model, device="cpu", batch_size=5)
    kd.VectorStore.build(ranker, kd.TextStore.open(texts), output, "int8")
    if processes > 1:
        torch.distributed.destroy_process_group()


def run(model: Path, texts: Path, output: Path, processes: int, seconds: float | None = None) -> bool:
    """Start an encoding, kill its processes after some seconds (None: never), and say whether it got to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("forkserver")  # not from this process, whose threads a fork would not have
    fork.set_forkserver_preload(["hf_kd_ranking.retrieval.vectors"])
    started = [fork.Process(target=index, args=(model, texts, output, i, processes, port)) for i in range(processes)]
    for process in started:
        process.start()
    deadline = time.monotonic() + (120 if seconds is None else seconds)
    for process in started:
        process.join(max(deadline - time.monotonic(), 0))
    statuses = {process.exitcode for process in started}
    for process in started:
        process.kill()
        process.join()
    text = "".join(path.read_text()[-2000:] for path in output.parent.glob(f"{output.name}.log*"))
    assert statuses <= {None, 0}, f"not killed, and ended with {statuses}: {text}"
    assert seconds is not None or statuses == {0}, f"too slow: {text}"
    return statuses == {0}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("model", "processes"), [("bert_dot", 1), ("colbert", 2)], indirect=["model"])
def test_a_killed_encoding_ends_with_the_same_bytes(model, tokenizer, toy, tmp_path, processes):
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "model")
    lines = (toy / "collection.tsv").read_text().splitlines()
    (tmp_path / "texts.tsv").write_text("".join(f"{i} {line}\n" for i in range(5) for line in lines))
    kd.TextStore.from_tsv(tmp_path / "texts.tsv", tmp_path / "texts")
    arguments, rng = (tmp_path / "model", tmp_path / "texts"), random.Random(0)
    run(*arguments, tmp_path / "whole", 1)
    begin = time.monotonic()
    run(*arguments, tmp_path / "again", processes)
    seconds, killed, resumed = time.monotonic() - begin, 0, 0
    wanted = files(tmp_path / "whole")
    assert files(tmp_path / "again") == wanted  # whatever the processes
    while killed < KILLS:
        output = tmp_path / f"killed{killed}"
        while not run(*arguments, output, processes, rng.uniform(0.3, 1.0) * seconds):
            killed += 1
            resumed += any(output.with_name(f"{output.name}.parts").glob("block-*.npz"))
            if killed >= KILLS:
                run(*arguments, output, processes)
                break
        assert files(output) == wanted
        killed += 1
    assert resumed or KILLS < 4
