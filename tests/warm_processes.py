"""Processes that begin with the libraries imported: they are forked from a server, where `python` imports for seconds.

A server is a process of its own without threads, which this one has. What a fork shares with its siblings, and a fresh
interpreter does not, is the seed of `hash`: a test of equal outcomes starts one of its processes with `python`.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

PRELOADED = (
    "hf_kd_ranking.cli hf_kd_ranking.distillation.pipeline hf_kd_ranking.training.job hf_kd_ranking.retrieval.bm25 "
    "transformers.models.bert.modeling_bert transformers.models.bert.tokenization_bert torch.distributed.fsdp "
    "ir_measures bm25s scipy.stats"
).split()
SETTINGS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # read by imports


def start_server() -> multiprocessing.context.ForkServerContext:
    """Return the context whose processes are forked from the server, which is started if it is not running."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, SETTINGS):
        forkserver.ensure_running()
    return context


class Warm:
    """A process that does what `python ARGUMENTS` does, in a session of its own, with the interface of `Popen`.

    It writes into files: a pipe that nobody reads would stop it when it is full.

    Args:
        arguments: `-m` and a module, or a script; then what it reads from `sys.argv`.
        name: the files of its output, without their suffixes.
        environment: variables beside those of this process.
    """

    def __init__(self, arguments: list[object], name: Path, environment: dict[str, str]) -> None:
        self.paths = [Path(f"{name}.stdout"), Path(f"{name}.stderr")]
        values = dict(os.environ) | SETTINGS | environment
        self._process = start_server().Process(target=_run, args=([*map(str, arguments)], self.paths, values))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """Wait for the end, and return `returncode`."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.paths[0]), timeout)
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end, and return what was printed, and printed as errors."""
        self.wait(timeout)
        return self.paths[0].read_text(), self.paths[1].read_text()

    def terminate(self) -> None:
        """Send SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)


def start_ranks(arguments: list[object], name: Path, environment: dict[str, str], count: int = 2) -> list[Warm]:
    """Start processes of one job, with the variables that torchrun gives to them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(Warm(arguments, Path(f"{name}-{rank}"), environment | job | own))
    return started


def run_ranks(arguments: list[object], name: Path, environment: dict[str, str], count: int = 2) -> list[str]:
    """Run processes of one job to their end, and return what each printed."""
    started = start_ranks(arguments, name, environment, count)
    printed = []
    for process in started:
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        printed.append(out)
    return printed


def _run(arguments: list[str], paths: list[Path], environment: dict[str, str]) -> None:
    """Become the program, within the new process."""
    os.setsid()
    for descriptor, path in enumerate(paths, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # read TMPDIR again
    if "datasets" in sys.modules and "HF_DATASETS_CACHE" in environment:
        sys.modules["datasets"].config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
    sys.modules["torch"].set_num_threads(1)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
