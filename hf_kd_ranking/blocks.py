"""Long work in blocks of rows: it survives an interruption, and the processes of an `accelerate` job share it.

Beside the output stands a work folder, `OUTPUT.parts`: what the work is (`parts.json`), and the arrays of every
finished block. The same call goes on from there, and the result is the same as without an interruption: a block's
content does not depend on when or by which process it is computed.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .data.tables import writing
from .inference import processes

FACTS = "parts.json"


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """The work folder of an output, new or that of unfinished work, for the main process to `begin` in; others wait.

    Where it does not begin, the folder is gone again.
    """
    state, folder = processes(), output.with_name(f"{output.name}.parts")
    with state.main_process_first():
        if state.is_main_process and not (folder / FACTS).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            if state.is_main_process and not (folder / FACTS).is_file():
                shutil.rmtree(folder)


def begin(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write into a work folder what the work is, or see that what was begun there is the same.

    Raises:
        ValueError: naming the facts that differ.
    """
    path = folder / FACTS
    if not path.is_file():
        with writing(path) as file:
            json.dump(facts, file)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if other := [name for name in facts if found.get(name) != facts[name]]:
        raise ValueError(
            f"{folder} holds the unfinished work of another {' and other '.join(other)}; finish that first, or remove "
            "the folder."
        )


def compute_blocks(
    folder: Path,
    rows: int,
    per_block: int,
    compute: Callable[[slice], Mapping[str, np.ndarray]],
    description: str,
    unit: str,
) -> tuple[list[Path], int]:
    """Compute the blocks that a work folder lacks; all processes must make the same call.

    Args:
        rows: of all blocks.
        per_block: rows computed between two saves, and so lost at most.
        compute: of a block's rows its arrays by name.
        description: of the progress bar.
        unit: what a row is.

    Returns:
        The .npz files of all blocks in order, and how many rows were finished before.
    """
    state = processes()
    parts = [folder / f"block-{block:06d}.npz" for block in range(-(-rows // per_block))]
    chosen = [slice(start, min(start + per_block, rows)) for start in range(0, rows, per_block)]
    todo = [(part, block) for part, block in zip(parts, chosen, strict=True) if not part.is_file()]
    state.wait_for_everyone()  # all have seen the same
    finished = rows - sum(block.stop - block.start for _, block in todo)
    is_quiet = not state.is_main_process
    with tqdm(total=rows, initial=finished, desc=description, unit=unit, disable=is_quiet) as progress:
        for part, block in todo[state.process_index :: state.num_processes]:
            arrays = compute(block)
            with writing(part, "wb") as file:
                np.savez(file, **arrays)
            progress.update((block.stop - block.start) * state.num_processes)
    state.wait_for_everyone()
    return parts, finished
