"""Steps of a long job: each makes one folder, runs once for the same inputs, and resumes after an interruption.

Where a job has more than one process (`accelerate launch`), all walk the same list of steps. The main process runs a
step by itself, except for functions that are marked with `shared`, which all processes call together.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from ..artifacts import (
    DESCRIPTION,
    changed_names,
    file_digest,
    has_description,
    read_description,
    remove_folder,
    write_description,
)
from ..errors import InputError
from ..processes import processes

# Files of a model or a text store; others, such as notes and logs, do not change what it computes.
MODEL_SUFFIXES = {".json", ".safetensors", ".model", ".bin", ".npy"}
VOCABULARIES = {"vocab.txt", "merges.txt"}
LONGEST_INPUT = 500  # characters of an input that a description shows; of a longer one it has the digest


@dataclass(frozen=True)
class Artifact:
    """The folder that a step of a job makes.

    Args:
        path: the folder; it does not exist yet where a job is only planned.
        digest: digest of everything that the folder is made from.
    """

    path: Path  # does not exist yet where a job is only planned
    digest: str  # of everything that the folder is made from


def model_path(model: str | Path | Artifact) -> str | Path:
    """Return the folder of the ranker that a step trained; another model is returned as it is."""
    if isinstance(model, Artifact):
        return model.path / "ranker"
    return model


def shared(function: Callable[..., object]) -> Callable[..., object]:
    """Mark a step that all processes of a job call together, because they share its work."""
    function.is_shared = True
    return function


def is_shared(function: Callable[..., object]) -> bool:
    """Return whether a step is marked as `shared`."""
    return getattr(function, "is_shared", False)


class Workspace:
    """A folder, the output of a job, in which every step leaves an artifact."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, inputs: Mapping[str, Any]) -> None:
        """Write down what the whole job is about, or raise an InputError that names what differs.

        `inputs` are name -> input, see `comparable`.
        """
        described = comparable(inputs)
        state = processes()
        is_new = not has_description(self.folder)
        state.wait_for_everyone()
        if is_new:
            if state.is_main_process:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_description(self.folder, described)
            state.wait_for_everyone()
            return
        changed = " and another ".join(changed_names(read_description(self.folder), described))
        if changed:
            raise InputError(f"{self.folder} was made from another {changed}; give another output folder.")

    def step(self, name: str, function: Callable[..., object], *inputs: Any) -> Artifact:
        """Run a step, unless its artifact exists and was made from the same inputs.

        A step that was interrupted is called again with what it left in its folder. An artifact of other inputs is
        removed first.

        Args:
            name: path of the artifact below the workspace.
            function: called with the folder and the inputs; its name is part of the artifact's identity.
            *inputs: what the result depends on, see `comparable`.

        Raises:
            FileExistsError: if the folder contains files that no step wrote.
        """
        raise_received_signal()
        artifact, state = self.locate(name, function, *inputs), processes()
        is_done = self.is_done(artifact)
        state.wait_for_everyone()  # all processes have seen the same state of the folder
        if is_done:
            return artifact
        folder = artifact.path
        description = {"step": function.__name__, "inputs": _shortened(inputs), "digest": artifact.digest}
        if state.is_main_process:
            self._begin(artifact, {**description, "is_complete": False})
        state.wait_for_everyone()
        start = time.perf_counter()
        if state.is_main_process or is_shared(function):
            function(folder, *inputs)
        state.wait_for_everyone()
        if state.is_main_process:
            seconds = time.perf_counter() - start
            write_description(folder, {**description, "is_complete": True, "seconds": seconds})
        state.wait_for_everyone()
        return artifact

    def steps(self, wanted: Mapping[str, tuple], parallel: int = 1) -> dict[str, Artifact]:
        """Run steps that do not depend on one another, and return name -> artifact.

        Args:
            wanted: name -> function and inputs, see `step`.
            parallel: number of processes of this machine that run them side by side; their inputs are pickled.

        Raises:
            The error of a step, after the steps that run beside it have ended.
        """
        missing = {}
        for name, (function, *inputs) in wanted.items():
            if not self.is_done(self.locate(name, function, *inputs)):
                missing[name] = (function, *inputs)
        if min(parallel, len(missing)) > 1:
            _run_in_parallel(self, missing, min(parallel, len(missing)))
        return {name: self.step(name, *step) for name, step in wanted.items()}

    def _begin(self, artifact: Artifact, description: dict[str, Any]) -> None:
        folder = artifact.path
        if folder.exists() and not self._is_begun(artifact):
            remove_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_description(folder, description)

    def locate(self, name: str, function: Callable[..., object], *inputs: Any) -> Artifact:
        """Return the artifact that a step makes, without making it; errors as `step`."""
        folder = self.folder / name
        if folder.exists() and not has_description(folder):
            # A process that was killed as it began leaves a half-written description.
            if any(not path.name.startswith(DESCRIPTION) for path in folder.iterdir()):
                raise FileExistsError(f"{folder} contains files that no step wrote; give another output folder.")
        return Artifact(folder, inputs_digest([function.__name__, inputs]))

    def is_done(self, artifact: Artifact) -> bool:
        """Return whether an artifact is complete and was made from its inputs."""
        return self._is_begun(artifact) and read_description(artifact.path)["is_complete"]

    def _is_begun(self, artifact: Artifact) -> bool:
        return has_description(artifact.path) and read_description(artifact.path).get("digest") == artifact.digest


# ---- Steps side by side ---------------------------------------------------------------------------------------------


def _run_in_parallel(work: Workspace, steps: Mapping[str, tuple], parallel: int) -> None:
    """Run steps in processes of their own, each on a GPU of its own, or with its share of the CPU's threads."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    threads = max(torch.get_num_threads() // parallel, 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(parallel, spawn, _begin_child, (threads,)) as pool:
        try:
            done = _submit(pool, work, steps, parallel)
        except BaseException:  # SIGTERM or Ctrl-C: trainings save a checkpoint
            for child in multiprocessing.active_children():
                child.terminate()
            raise
        finally:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            if devices is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = devices
    for future in done:
        future.result()


def _submit(pool: ProcessPoolExecutor, work: Workspace, steps: Mapping[str, tuple], parallel: int) -> set[Future]:
    """Submit steps, each once a process is free for it, until all have ended or one has failed; return those."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = devices.split(",") if devices else list(map(str, range(torch.cuda.device_count())))
    pending, running, done = list(steps.items()), set(), set()
    used: dict[Future, str] = {}
    while (pending or running) and not any(future.exception() for future in done):
        while pending and len(running) < parallel:
            counts = Counter(used[future] for future in running)
            gpu = min(gpus, key=lambda name: counts[name], default="")
            if len(gpus) > 1:  # the process that this call starts reads it
                os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            name, step = pending.pop(0)
            future = pool.submit(work.step, name, *step)
            used[future] = gpu
            running.add(future)
        done, running = wait(running, return_when=FIRST_COMPLETED)
    return done


def _begin_child(threads: int) -> None:
    """Prepare a process that runs steps: it ends with its parent, which passes on Ctrl-C as SIGTERM."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


# The signal that should have ended the job. Python discards an exception that a signal raises within a finaliser or
# the callback of a weak reference, so that the next step raises it again.
_received: list[int] = []


def _stop(number: int, _: Any) -> None:
    _received.append(number)
    raise_received_signal()


def raise_received_signal() -> None:
    """Raise KeyboardInterrupt or SystemExit if the job has received a signal to end."""
    if signal.SIGINT in _received:
        raise KeyboardInterrupt
    if _received:
        raise SystemExit("Stopped by SIGTERM; the same command resumes.")


@contextmanager
def stopping_at_signals() -> Iterator[None]:
    """End at once at SIGTERM, with a message, and at Ctrl-C; at SIGTERM a training first saves a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _received.clear()


# ---- Identity of inputs ---------------------------------------------------------------------------------------------


def inputs_digest(inputs: Any) -> str:
    """Return the sha256 of inputs, see `comparable`."""
    return hashlib.sha256(json.dumps(comparable(inputs), sort_keys=True).encode()).hexdigest()


def comparable(value: Any) -> Any:
    """Return a value as JSON that is equal only for equal content.

    It is JSON, a `Path` (see `path_identity`), an `Artifact`, a dataclass, a named tuple, an object with a method
    `fingerprint`, or lists and dictionaries of these.
    """
    if isinstance(value, Artifact):
        return value.digest
    if isinstance(value, Path):
        return path_identity(value)
    if is_dataclass(value):
        return {field.name: comparable(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): comparable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return value.fingerprint()


def path_identity(path: Path) -> str:
    """Return what identifies a file (its content), a folder (its files but notes), or a model on the Hub.

    A note beside a model changes nothing; another revision of a model on the Hub is another model.
    """
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        states = []
        for file in sorted(path.rglob("*")):
            if file.is_file() and (file.suffix in MODEL_SUFFIXES or file.name in VOCABULARIES):
                states.append((file.relative_to(path), file.stat().st_size, file.stat().st_mtime_ns))
        return _folder_digest(path, tuple(states))
    try:
        cached = try_to_load_from_cache(str(path), "config.json")
    except HFValidationError:  # not a name on the Hub
        cached = None
    return f"{path} {Path(cached).parent.name}" if isinstance(cached, str) else str(path)


@lru_cache
def _folder_digest(path: Path, states: tuple) -> str:
    """Return the digest of files of a folder, which many steps of a job ask for; `states` change if a file does."""
    digests = {str(name): file_digest(path / name) for name, *_ in states}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _shortened(inputs: Any) -> list:
    """Return inputs as a description shows them."""
    shown = []
    for value in comparable(inputs):
        text = json.dumps(value)
        shown.append(value if len(text) <= LONGEST_INPUT else hashlib.sha256(text.encode()).hexdigest())
    return shown
