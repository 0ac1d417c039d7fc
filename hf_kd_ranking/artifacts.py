"""Everything that is written: complete or absent, described by what it was made from, resumable, and locked.

A folder that was made from known inputs says so in `artifact.json`, see `read_description`.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from .errors import InputError
from .processes import processes

DESCRIPTION = "artifact.json"


# ---- Files and folders that are complete or absent ------------------------------------------------------------------


def existing_file(path: str | os.PathLike, what: str) -> Path:
    """Return the path of a file that must exist and not be empty; messages call it `what`.

    Raises:
        FileNotFoundError: if it does not exist, or is a folder.
        InputError: if it is empty.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"The {what} file {path} {problem}; give the path of the file.")
    if path.stat().st_size == 0:
        raise InputError(f"The {what} file {path} is empty.")
    return path


def refuse_existing(path: str | os.PathLike, overwrite: bool) -> None:
    """Refuse an output that would replace something, before any work is done for it.

    Raises:
        FileExistsError: if the path exists and `overwrite` is False.
        FileNotFoundError: if the folder that would contain it does not exist.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; give another output, or --overwrite (overwrite=True) to replace it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}, the folder of the output {path.name}, does not exist; create it.")


@contextmanager
def writing(path: str | os.PathLike, mode: str = "w") -> Iterator:
    """Open a file ("w": UTF-8 text with line feeds; "wb": bytes) that gets its name when the block ends well."""
    path = Path(path)
    temporary = _temporary(path)
    encoding = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with temporary.open(mode, **encoding) as file:
            yield file
        _put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | os.PathLike, kind: type = dict, what: str = "JSON") -> Any:
    """Read a JSON file that holds an object, or a list if `kind` is list; messages call the file `what`.

    Raises:
        FileNotFoundError: if the file does not exist.
        InputError: if it is empty, damaged, or holds something else.
    """
    path = existing_file(path, what)
    try:
        # An integer that no number of the machine holds becomes a float, infinity, which checks of numbers refuse.
        content = json.loads(path.read_text(encoding="utf-8-sig"), parse_int=_parse_integer)
    except (ValueError, RecursionError) as error:  # also of bytes that are not UTF-8, and of too many brackets
        raise InputError(f"{path} is damaged: it is not valid JSON ({error}).") from None
    if not isinstance(content, kind):
        wanted = "list" if kind is list else "object"
        raise InputError(f"{path} is damaged: it must hold a JSON {wanted}, got {str(content)[:60]!r}.")
    return content


def _parse_integer(text: str) -> int | float:
    return int(text) if len(text) < 19 else float(text)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON into a file that is complete or absent."""
    with writing(path) as file:
        json.dump(content, file, indent=1)


@contextmanager
def building(folder: Path, replaces: bool = False) -> Iterator[Path]:
    """Give a temporary folder that gets its name when the block ends without an error, and is removed otherwise.

    `replaces` replaces a folder of this name; otherwise one that another process has built meanwhile is kept.
    """
    temporary = _temporary(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if replaces and folder.exists():
            remove_folder(folder)
        try:
            _put_in_place(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; a folder that is half removed never has its old name."""
    removed = folder.with_name(f".{folder.name}.removed{os.getpid()}")
    folder.rename(removed)
    shutil.rmtree(removed)


def _temporary(path: Path) -> Path:
    """Return a name beside a path that no other process and no other thread uses."""
    return path.with_name(f"{path.name}.tmp{os.getpid()}-{threading.get_native_id()}")


def _put_in_place(temporary: Path, path: Path) -> None:
    """Give something complete its name; the one place where that happens."""
    temporary.replace(path)


# ---- Digests and descriptions ---------------------------------------------------------------------------------------


def file_digest(path: str | os.PathLike) -> str:
    """Return the sha256 of a file, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: str | os.PathLike) -> str:
    """Return the sha256 of a file, or of the names and digests in a folder; a name on the Hub is returned as it is."""
    path = Path(path)
    if not path.exists():
        return str(path)
    if path.is_file():
        return file_digest(path)
    listing = {}
    for part in sorted(path.rglob("*")):
        if part.is_file():
            listing[str(part.relative_to(path))] = file_digest(part)
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write what a folder was made from."""
    write_json(folder / DESCRIPTION, {**description, "checksum": _checksum(description)})


def read_description(folder: Path) -> dict[str, Any]:
    """Read what a folder was made from.

    Raises:
        FileNotFoundError: if the folder has no description.
        InputError: if the description is damaged.
    """
    path = folder / DESCRIPTION
    description = read_json(path, what="description")
    if description.get("checksum") != _checksum(description):
        raise InputError(f"{path} is damaged: its checksum differs; remove {folder} and build it again.")
    return description


def has_description(folder: Path) -> bool:
    """Return whether a folder says what it was made from."""
    return (folder / DESCRIPTION).is_file()


def changed_names(description: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    """Return the names of the inputs that differ from those in a description."""
    return [name for name in inputs if description.get(name) != inputs[name]]


def _checksum(description: Mapping[str, Any]) -> str:
    content = {name: value for name, value in description.items() if name != "checksum"}
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


# ---- Folders with versions ------------------------------------------------------------------------------------------


@contextmanager
def new_version(folder: Path, description: Mapping[str, Any]) -> Iterator[Path]:
    """Give an empty folder for the next version of an index; it becomes the index when the block ends.

    The description is replaced in one step when the version is complete. Until then, and wherever a process dies, a
    reader opens the old version.

    `description` is what it was built with, including its `kind`.

    Raises:
        InputError: if another process writes the index now.
    """
    with locked(folder):
        number = read_description(folder)["version"] + 1 if has_description(folder) else 1
        data = folder / f"v{number}"
        shutil.rmtree(data, ignore_errors=True)  # left by a process that died
        data.mkdir(parents=True)
        try:
            yield data
            files = {path.name: [path.stat().st_size, _file_checksum(path)] for path in sorted(data.iterdir())}
            write_description(folder, {**description, "version": number, "files": files})
        except BaseException:
            shutil.rmtree(data, ignore_errors=True)
            raise
        for path in folder.iterdir():
            if path != data and re.fullmatch(r"v\d+", path.name):
                shutil.rmtree(path, ignore_errors=True)


def open_version(folder: Path, kind: str, is_verified: bool = True) -> tuple[dict[str, Any], Path]:
    """Return the description of an index and the folder of its files, after their sizes were checked.

    `is_verified` reads every file and compares checksums.

    Raises:
        FileNotFoundError: if the index, or one of its files, is missing.
        InputError: if it is of another kind, or a file is truncated or damaged.
    """
    description = read_description(folder)
    if description.get("kind") != kind:
        raise InputError(f"{folder} is an index of kind {description.get('kind')}, needed {kind}.")
    data = folder / f"v{description['version']}"
    for name, (size, checksum) in description["files"].items():
        path = data / name
        if not path.is_file():
            raise FileNotFoundError(f"The index file {path} does not exist; build the index again.")
        length = path.stat().st_size
        if length != size:
            raise InputError(f"{path} has {length:,} bytes of {size:,}: it is truncated; build the index again.")
        if is_verified and _file_checksum(path) != checksum:
            raise InputError(f"{path} is damaged: its checksum differs; build the index again.")
    return description, data


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


# ---- Long work in blocks --------------------------------------------------------------------------------------------


@contextmanager
def work_folder(output: Path, prepare: Callable[[Path], Mapping[str, Any]]) -> Iterator[Path]:
    """Give the folder `OUTPUT.parts` of long work to all processes of a job; it is removed when the block ends.

    Where the block ends with an error or a kill the folder stays, so that the same call resumes.

    Args:
        output: what the work makes.
        prepare: called by the main process with the folder, before the others enter; writes what they read and
            returns the inputs of the work.

    Raises:
        InputError: if the folder holds work with other inputs, naming them, or another process works in it now.
    """
    state = processes()
    folder = output.with_name(f"{output.name}.parts")
    if not state.is_main_process:
        state.wait_for_everyone()
        yield folder
        state.wait_for_everyone()
        return
    with locked(folder):
        _begin_work(folder, prepare)
        state.wait_for_everyone()
        yield folder
        state.wait_for_everyone()
        shutil.rmtree(folder)


def _begin_work(folder: Path, prepare: Callable[[Path], Mapping[str, Any]]) -> None:
    if has_description(folder):
        changed = " and another ".join(changed_names(read_description(folder), prepare(folder)))
        if changed:
            raise InputError(
                f"{folder} holds the unfinished work of another {changed}; finish that first, or remove the folder."
            )
        return
    shutil.rmtree(folder, ignore_errors=True)  # left by a process that died while it prepared
    folder.mkdir(parents=True)
    try:
        write_description(folder, prepare(folder))
    except BaseException:
        shutil.rmtree(folder)
        raise


def compute_blocks(
    folder: Path,
    rows: int,
    per_block: int,
    compute: Callable[[slice], Mapping[str, np.ndarray]],
    description: str,
    unit: str,
) -> tuple[list[Path], int]:
    """Compute the blocks that are missing in a work folder; the processes of a job share them.

    Args:
        folder: the work folder.
        rows: number of rows of all blocks.
        per_block: rows between two saves, and so the most that a kill loses per process.
        compute: rows of a block -> its arrays by name; must not depend on when or by which process it is called.
        description: title of the progress bar.
        unit: name of a row in the progress bar.

    Returns:
        The .npz files of all blocks in order, and the number of rows that had been computed before.
    """
    state = processes()
    parts, missing, finished = [], [], 0
    for start in range(0, rows, per_block):
        block = slice(start, min(start + per_block, rows))
        parts.append(folder / f"block-{len(parts):06d}.npz")
        if parts[-1].is_file():
            finished += block.stop - block.start
        else:
            missing.append((parts[-1], block))
    state.wait_for_everyone()  # all processes have seen the same files
    is_quiet = not state.is_main_process
    with tqdm(total=rows, initial=finished, desc=description, unit=unit, disable=is_quiet) as progress:
        for part, block in missing[state.process_index :: state.num_processes]:
            arrays = compute(block)
            with writing(part, "wb") as file:
                np.savez(file, **arrays)
            progress.update((block.stop - block.start) * state.num_processes)
    state.wait_for_everyone()
    return parts, finished


def read_blocks(parts: Sequence[Path], name: str) -> list[np.ndarray]:
    """Return an array of every block that `compute_blocks` returned; none of blocks that lack it."""
    arrays = []
    for part in parts:
        with np.load(part) as block:
            if name in block:
                arrays.append(block[name])
    return arrays


# ---- Locks ----------------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time work on a folder; the system releases the lock of a process that dies.

    Raises:
        InputError: naming the process that works on the folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()  # "." has no name
    path = place.with_name(f".{place.name}.lock")
    owner = place.with_name(f".{place.name}.owner")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        process = owner.read_text(encoding="utf-8") if owner.is_file() else "unknown"
        raise InputError(f"{folder} is in use by process {process}; wait until it has ended.") from None
    try:
        owner.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        lock.release()
