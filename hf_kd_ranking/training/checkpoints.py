"""Checkpoints to rely on: a complete one has a file, written last, that says to which run it belongs."""

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

from ..artifacts import read_json
from ..errors import InputError

RUN_FILE = "run.json"  # in every complete checkpoint; nothing is written after it
# Config fields that depend on where and by which versions a model was saved.
VOLATILE = frozenset({"transformers_version", "_name_or_path", "name_or_path", "architectures", "auto_map", "dtype"})


def last_complete(folder: Path) -> str | None:
    """Return the complete checkpoint of the highest step in an output folder, or None."""
    if folder.is_dir():
        for path in reversed(sort_checkpoints(str(folder))):
            if (Path(path) / RUN_FILE).is_file():
                return str(path)
    return None


@contextmanager
def written_whole(checkpoint: Path, is_main: bool) -> Iterator[None]:
    """Run a block that writes a checkpoint, and remove it if that fails; `is_main` is True on the process that saves.

    A checkpoint that cannot be written is an OSError that names it and the last complete one.
    """
    if is_main:
        (checkpoint / RUN_FILE).unlink(missing_ok=True)  # it is incomplete while it is written again
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # of Python, torch.save and safetensors on a full disk
        shutil.rmtree(checkpoint, ignore_errors=True)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"The checkpoint {checkpoint} could not be written ({reason}) and was removed; the last complete one is "
            f"{last_complete(checkpoint.parent)}. Free some space, then resume with --resume-from-checkpoint true."
        ) from error


def describe_run(config: Mapping[str, Any], rows: Any, **order: Any) -> dict[str, Any]:
    """Return what a resumed run must share with its checkpoint, and what decides the order of its rows."""
    data = {"columns": sorted(rows.column_names or [])}
    if isinstance(rows, datasets.Dataset):
        sample = rows[np.unique(np.linspace(0, len(rows) - 1, 1000, dtype=np.int64))]
        data["rows"] = len(rows)
        data["content"] = xxhash.xxh3_64_hexdigest(json.dumps(sample, sort_keys=True).encode())
    plain = json.loads(json.dumps(config, default=str))  # as the file will have it
    return {"config": dict(_flat(plain)), "data": data, "order": order}


def check_run(checkpoint: str, run: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another model or other data than `describe_run`; warn if only the order differs."""
    path = Path(checkpoint) / RUN_FILE
    if not path.is_file():
        warnings.warn(f"{checkpoint} does not say to which run it belongs; nothing was compared.", stacklevel=3)
        return
    saved = read_json(path)
    differences = []
    for section in ("config", "data"):
        for difference in _differences(saved[section], run[section]):
            differences.append(f"{section}: {difference}")
    if differences:
        more = "; ..." if len(differences) > 3 else ""
        raise InputError(
            f"{checkpoint} belongs to another run ({'; '.join(differences[:3])}{more}); resume it with its own model "
            "and data, or start afresh in another output folder."
        )
    differences = _differences(saved["order"], run["order"])
    if differences:
        warnings.warn(
            f"{checkpoint} read its rows in another order ({'; '.join(differences)}): some will come twice in this "
            "epoch and some not at all.",
            stacklevel=3,
        )


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    differences = []
    for name in sorted(saved.keys() | current.keys()):
        if saved.get(name) != current.get(name):
            differences.append(f"{name} is {saved.get(name)!r} there and {current.get(name)!r} here")
    return differences


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields of a config by dotted names."""
    for name, value in values.items():
        if name in VOLATILE or name.endswith("_token_id"):  # training aligns these with the tokenizer
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
