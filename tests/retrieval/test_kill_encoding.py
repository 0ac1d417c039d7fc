"""An encoding killed with SIGKILL at any moment and started again ends with the bytes of an undisturbed one."""

import multiprocessing
import os
import random
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval import encode
from hf_kd_ranking.retrieval.versions import FACTS

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
KILLS = int(os.environ.get("HF_KD_RANKING_KILLS", "3"))


def index(model: Path, texts: Path, output: Path, rank: int, processes: int, port: int) -> None:
    """What a process does; exits with status 0 at the end alone."""
    log = os.open(output.with_name(f"{output.name}.log{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name in LAUNCHED]:
        del os.environ[name]  # of another test
    if processes > 1:
        values = (rank, rank, processes, "127.0.0.1", port)
        os.environ |= {name: str(value) for name, value in zip(LAUNCHED, values, strict=True)}
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate takes more, which hang in a forked process
    torch.set_num_threads(1)
    assert PartialState(cpu=True).num_processes == processes
    encode.DOCUMENTS_PER_BLOCK = 10
    ranker = kd.Ranker.from_pretrained(model, device="cpu", batch_size=5)
    kd.VectorStore.build(ranker, kd.TextStore.open(texts), output, "int8")
    os._exit(0)  # the process group is not taken down, as it is not by users' programs: under load that has hung


def blocks(output: Path) -> int:
    return len(list(output.with_name(f"{output.name}.parts").glob("block-*.npz")))


def run(model: Path, texts: Path, output: Path, processes: int, kill_at: int | None = None) -> bool:
    """Start an encoding, kill it when so many blocks are there (None: never), and say whether it got to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("forkserver")  # not from this process, whose threads a fork would not have
    fork.set_forkserver_preload(["hf_kd_ranking.retrieval.vector_store"])
    started = [fork.Process(target=index, args=(model, texts, output, i, processes, port)) for i in range(processes)]
    for process in started:
        process.start()
    deadline = time.monotonic() + 120
    while any(process.is_alive() for process in started) and time.monotonic() < deadline:
        if kill_at is not None and blocks(output) >= kill_at:
            break
        time.sleep(0.001)
    statuses = {process.exitcode for process in started}
    for process in started:
        process.kill()
        process.join()
    text = "".join(path.read_text()[-2000:] for path in output.parent.glob(f"{output.name}.log*"))
    assert statuses <= {None, 0}, f"not killed, and ended with {statuses}: {text}"
    assert kill_at is not None or statuses == {0}, f"too slow: {text}"
    return statuses == {0}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("model", "processes"), [("bert_dot", 1), ("colbert", 2)], indirect=["model"])
def test_a_killed_encoding_ends_with_the_same_bytes(model, tokenizer, toy, tmp_path, processes):
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "model")
    lines = (toy / "collection.tsv").read_text().splitlines()
    (tmp_path / "texts.tsv").write_text("".join(f"{i} {line}\n" for i in range(5) for line in lines))
    kd.TextStore.from_tsv(tmp_path / "texts.tsv", tmp_path / "texts")
    arguments, rng, last = (tmp_path / "model", tmp_path / "texts"), random.Random(0), len(lines) // 2
    run(*arguments, tmp_path / "whole", 1)
    wanted = files(tmp_path / "whole")
    output, kill_at, killed = tmp_path / "killed", 0, 0
    while killed < KILLS:
        kill_at = rng.randrange(kill_at, last) if kill_at < last - 1 else 0
        if kill_at == 0 or run(*arguments, output, processes, kill_at):
            run(*arguments, output, processes)
            assert files(output) == wanted
            shutil.rmtree(output)
        else:
            killed += 1
            assert blocks(output) >= kill_at or (output / FACTS).is_file()
    run(*arguments, output, processes)
    assert files(output) == wanted
