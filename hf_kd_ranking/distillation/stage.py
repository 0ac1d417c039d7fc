"""A stage of a long job: a folder that is made once, and again only when what it was made from changes.

`stage.json` holds the digest of the inputs, among them the digests of the stages before, whether the stage is done,
and the seconds that its last call took. One that was interrupted is called again in its folder, where its work goes
on; one of other inputs is removed.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..artifacts import writing

FILE = "stage.json"


def run_stage(
    folder: Path, inputs: Mapping[str, Any], work: Callable[[Path], object], is_replaced: bool = True
) -> str:
    """Do a stage's work in its folder, unless it is done from the same inputs.

    Args:
        inputs: what the result depends on, as JSON: options, digests of files, what earlier stages returned.
        work: called with the folder, which may hold what an interrupted call left.
        is_replaced: False refuses a folder that was made from other inputs.

    Returns:
        The digest of the inputs, an input of later stages.

    Raises:
        ValueError: naming the inputs that differ, if it may not be replaced; if the folder holds something that no
            stage made.
    """
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    state = read_state(folder)
    if state.get("digest") == digest and state["is_done"]:
        return digest
    if state and state["digest"] != digest and not is_replaced:
        changed = sorted(name for name in inputs if state["inputs"].get(name) != inputs[name])
        raise ValueError(f"{folder.parent} was made from another {' and '.join(changed)}; take another output folder.")
    if state.get("digest") != digest:
        _remove(folder, state)
        folder.mkdir(parents=True)
        _write_state(folder, digest, inputs, is_done=False)
    start = time.perf_counter()
    work(folder)
    _write_state(folder, digest, inputs, is_done=True, seconds=time.perf_counter() - start)
    return digest


def _remove(folder: Path, state: Mapping[str, Any]) -> None:
    if not folder.exists():
        return
    if not state and any(not part.name.startswith(FILE) for part in folder.iterdir()):
        raise ValueError(f"{folder} holds something that no stage made; take another output folder.")
    old = folder.with_name(f".{folder.name}.removed")  # renamed first: what is half removed must not look done
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)


def read_state(folder: Path) -> dict[str, Any]:
    """`digest`, `inputs`, `is_done` and `seconds` of a stage; empty where it has not begun."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_state(folder: Path, digest: str, inputs: Mapping[str, Any], **state: Any) -> None:
    with writing(folder / FILE) as file:
        json.dump({"digest": digest, "inputs": inputs} | state, file, indent=1)
