"""Checkpoints to rely on: a complete one says so, and of which run it is; written last, under its final name."""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash
from safetensors import SafetensorError
from transformers.trainer_utils import sort_checkpoints

from ..artifacts import writing

# In every complete checkpoint; nothing is written after it.
RUN_FILE = "run.json"
# What a full disk is to Python, to torch.save and to safetensors.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
# What a run is of: resumed with another value it would go on with another model or other data.
IDENTITY = ("config", "data")
# Config fields that follow from where and with what a model was saved.
VOLATILE = frozenset({"transformers_version", "_name_or_path", "name_or_path", "architectures", "auto_map", "dtype"})


def last_complete(folder: Path) -> str | None:
    """The complete checkpoint of the highest step in an output folder, None where there is none."""
    if not folder.is_dir():
        return None
    checkpoints = [Path(path) for path in sort_checkpoints(str(folder))]
    return next((str(path) for path in reversed(checkpoints) if (path / RUN_FILE).is_file()), None)


@contextmanager
def written_whole(checkpoint: Path, is_main: bool) -> Iterator[None]:
    """A block that writes a checkpoint; what it wrote is removed again if it cannot end.

    Raises:
        OSError: if it cannot be written, for example as the disk is full; names it and the last complete one.
    """
    if is_main:
        (checkpoint / RUN_FILE).unlink(missing_ok=True)  # it is not complete while it is written again
    try:
        yield
    except WRITE_ERRORS as error:
        shutil.rmtree(checkpoint, ignore_errors=True)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"The checkpoint {checkpoint} could not be written ({reason}) and was removed; the last complete one is "
            f"{last_complete(checkpoint.parent)}. Mend that, then go on with --resume_from_checkpoint true."
        ) from error


def mark_complete(checkpoint: Path, run: Mapping[str, Any]) -> None:
    """Say that all of a checkpoint is there, and of which run it is."""
    with writing(checkpoint / RUN_FILE) as file:
        json.dump(run, file, indent=2)


def describe_run(config: Mapping[str, Any], rows: Any, **order: Any) -> dict[str, Any]:
    """What a resumed run must share with its checkpoint, and what decides the order of its rows.

    Args:
        config: of the model.
        rows: teacher rows; of a stream only the columns are known.
        **order: seeds and batch sizes.
    """
    data = {"columns": sorted(rows.column_names or [])}
    if isinstance(rows, datasets.Dataset):
        sample = rows[np.unique(np.linspace(0, len(rows) - 1, 1000, dtype=np.int64))]
        digest = xxhash.xxh3_64_hexdigest(json.dumps(sample, sort_keys=True).encode())
        data |= {"rows": len(rows), "content": digest}
    plain = json.loads(json.dumps(config, default=str))  # as the file will have it
    return {"config": dict(_flat(plain)), "data": data, "order": order}


def check_run(checkpoint: str, run: Mapping[str, Any]) -> None:
    """Compare a checkpoint's run with the one that is to go on from it; warn where only the order of rows differs.

    Raises:
        ValueError: naming the fields of model or data that differ, with both values.
    """
    path = Path(checkpoint) / RUN_FILE
    if not path.is_file():
        warnings.warn(f"{checkpoint} does not say of which run it is; nothing was compared.", stacklevel=3)
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    differences = {
        part: [
            f"{name} is {saved[part].get(name)!r} there and {run[part].get(name)!r} here"
            for name in sorted(saved[part].keys() | run[part].keys())
            if saved[part].get(name) != run[part].get(name)
        ]
        for part in (*IDENTITY, "order")
    }
    if others := [f"{part}: {difference}" for part in IDENTITY for difference in differences[part]]:
        raise ValueError(
            f"{checkpoint} is of another run ({'; '.join(others[:3])}{'; ...' if len(others) > 3 else ''}); resume it "
            "with its own model and data, or start afresh in another output folder."
        )
    if differences["order"]:
        warnings.warn(
            f"{checkpoint} read its rows in another order ({'; '.join(differences['order'])}), so that some rows of "
            "this epoch will come twice and some not at all.",
            stacklevel=3,
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of a config by dotted names."""
    for name, value in values.items():
        if name in VOLATILE or name.endswith("_token_id"):  # training aligns these with the tokenizer
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
