"""`manifest.json` beside a checkpoint: what made it, what it measured, and the digests that tie these to its weights.

The model card is written from it, and publishing refuses a folder whose weights are not those that were measured.
"""

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..artifacts import file_digest, writing

FILE = "manifest.json"
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")  # an access token of the Hub
LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "huggingface_hub", "ir_measures")
# Of the training arguments, what a reader would want to copy.
SETTINGS = (
    "learning_rate",
    "head_learning_rate",
    "lora_r",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "lr_scheduler_type",
    "weight_decay",
    "teacher_scale",
    "bf16",
    "fp16",
    "seed",
)


def write_manifest(
    folder: str | os.PathLike,
    arguments: Mapping[str, Any],
    training_rows: int,
    results: Mapping[str, Any],
    files: Mapping[str, str | os.PathLike | None],
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Write down how the checkpoint in a folder came to be; weights are digested as they lie there.

    Local paths are cut to their last part, because the manifest is published.

    Args:
        arguments: the training arguments as a dict.
        training_rows: teacher rows trained on.
        results: `after`, and as far as they are known `first_stage`, `before` (each measure -> mean) and `tests`
            (measure -> a paired t-test of `after` against `first_stage`).
        files: what the training read, by name; what is a folder, or not a local file, goes without a digest.
        command: the command line that trained it; None if it was not one.

    Returns:
        What was written.
    """
    folder = Path(folder)
    manifest = {
        "loss": arguments["loss"],
        "teacher": arguments["teacher_name"],
        "data": arguments["data_name"],
        "base_model": arguments["base_model"],
        "rows": training_rows,
        "settings": {name: arguments[name] for name in SETTINGS if arguments[name] is not None},
        "results": dict(results),
        "command": public_command(command or ()),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "files": {
            name: {"name": Path(path).name, "sha256": file_digest(path) if Path(path).is_file() else None}
            for name, path in files.items()
            if path is not None
        },
        "weights": weight_digests(folder),
    }
    save_manifest(folder, manifest)
    return manifest


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it was written for other weights than the folder holds.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {FILE}; training writes it (train_ranker, RankingTrainer).")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    found = weight_digests(folder)
    if manifest["weights"] != found:
        changed = sorted(
            name for name in manifest["weights"] | found if manifest["weights"].get(name) != found.get(name)
        )
        raise ValueError(
            f"The results in {path} were measured with other weights than the folder holds ({', '.join(changed)} "
            "differ): train or evaluate again, or remove the manifest and write the card by hand."
        )
    return manifest


def save_manifest(folder: str | os.PathLike, manifest: Mapping[str, Any]) -> None:
    """Write a manifest as it is."""
    with writing(Path(folder) / FILE) as file:
        json.dump(manifest, file, indent=2)


def measures_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What an evaluation logs of measures: `eval_nDCG@10` becomes `nDCG@10`."""
    return {key.removeprefix("eval_"): value for key, value in metrics.items() if "@" in key}


def public_command(parts: Sequence[str]) -> list[str]:
    """A command line without tokens, its absolute paths cut to their last part."""
    shown: list[str] = []
    for part in parts:
        if shown and re.fullmatch("--[a-z_]*token", shown[-1]):
            shown.append("***")
        else:
            part = part.removesuffix(f"{os.sep}__main__.py")  # python -m hf_kd_ranking
            name = Path(part).name if os.path.isabs(part) else re.sub("(--[a-z_]*token=).*", r"\1***", part)
            shown.append(TOKEN.sub("***", name))
    return shown


def weight_digests(folder: str | os.PathLike) -> dict[str, str]:
    """File name -> sha256 of a checkpoint's weights."""
    return {path.name: file_digest(path) for path in sorted(Path(folder).glob("*.safetensors"))}
