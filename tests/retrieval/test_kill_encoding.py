"""An encoding whose processes are killed with SIGKILL and started again ends with the bytes of an undisturbed one."""

import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from warm_processes import start_server

import hf_kd_ranking as kd
from hf_kd_ranking import artifacts
from hf_kd_ranking.retrieval import vector_store

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def encode_texts(folder: Path, output: Path, stop_at: str | None, rank: int, processes: int, port: int) -> None:
    """Run one process of the job; it kills itself before a file whose path begins with `stop_at` gets its name."""
    log = os.open(output.with_name(f"{output.name}.log{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name in list(os.environ):
        if name.startswith("ACCELERATE_") or name in LAUNCHED:
            del os.environ[name]  # set by another test
    if processes > 1:
        values = (rank, rank, processes, "127.0.0.1", port)
        os.environ |= dict(zip(LAUNCHED, map(str, values), strict=True))
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate takes more, which hang in a forked process
    torch.set_num_threads(1)
    assert PartialState(cpu=True).num_processes == processes
    vector_store.DOCUMENTS_PER_BLOCK = 10

    def put(temporary: Path, path: Path) -> None:
        if stop_at is not None and str(path).startswith(stop_at):
            os.kill(os.getpid(), signal.SIGKILL)
        temporary.replace(path)

    artifacts._put_in_place = put
    ranker = kd.Ranker.from_pretrained(folder / "model", device="cpu", batch_size=5)
    kd.VectorStore.build(ranker, kd.TextStore.open(folder / "texts"), output, "int8")
    os._exit(0)  # the process group is not taken down, as users' programs do not either: under load that has hung


def run(folder: Path, output: Path, processes: int, stop_at: str | None = None) -> list[int]:
    """Run a job whose first process kills itself at a write, and return the exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = start_server()
    started = []
    for rank in range(processes):
        arguments = (folder, output, stop_at if rank == 0 else None, rank, processes, port)
        started.append(fork.Process(target=encode_texts, args=arguments))
        started[-1].start()
    started[0].join(120)
    for process in started:
        if started[0].exitcode != 0:
            process.kill()
        process.join(60)
    return [process.exitcode for process in started]


def files(folder: Path) -> dict[str, bytes]:
    """Return the files of a store; a process that is killed leaves temporary ones beside them."""
    names = [path for path in folder.rglob("*") if path.is_file() and ".tmp" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_killed_encoding_ends_with_the_same_bytes(model, tokenizer, toy, tmp_path):
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "model")
    kd.TextStore.from_tsv(toy / "collection.tsv", tmp_path / "texts")
    assert run(tmp_path, tmp_path / "whole", 1) == [0]
    output = tmp_path / "killed"
    # The first process writes the description of the work, then its share of the blocks, then that of the store.
    for stop_at in ("killed.parts/artifact.json", "killed.parts/block", "killed/artifact.json"):
        assert run(tmp_path, output, 2, str(tmp_path / stop_at))[0] == -signal.SIGKILL
        assert not (output / "artifact.json").exists()
    assert run(tmp_path, output, 2) == [0, 0]
    assert files(output) == files(tmp_path / "whole")
    assert not (tmp_path / "killed.parts").exists()
