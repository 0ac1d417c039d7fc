"""`manifest.json`, from which a model card is written: training inputs and results, tied by digests to the weights."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..artifacts import changed_names, file_digest, read_json, write_json
from ..errors import InputError

FILE = "manifest.json"
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")  # an access token of the Hub
TOKEN_OPTION = re.compile(r"--[a-z_-]*token")
LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "huggingface_hub", "ir_measures")
# The training arguments that a reader needs to repeat the training.
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
    languages: Sequence[str] = (),
) -> None:
    """Write how the checkpoint in a folder was made, with the digests of its weights.

    Local paths are cut to their last part, because the manifest is published.

    Args:
        results: `after`, and if known `first_stage`, `before` (each measure -> mean) and `tests` (measure -> a paired
            t-test of `after` against `first_stage`).
        files: the training's input files by name; None, folders and names on the Hub have no digest.
        command: the command line that started the training.
        languages: languages of the documents, ISO 639-1.
    """
    settings = {name: arguments[name] for name in SETTINGS if arguments[name] is not None}
    digests = {}
    for name, path in files.items():
        if path is not None:
            path = Path(path)
            digests[name] = {"name": path.name, "sha256": file_digest(path) if path.is_file() else None}
    versions = {"python": platform.python_version(), **{library: version(library) for library in LIBRARIES}}
    manifest = {
        "loss": arguments["loss"],
        "teacher": arguments["teacher_name"],
        "data": arguments["data_name"],
        "base_model": arguments["base_model"],
        "languages": list(languages),
        "rows": training_rows,
        "settings": settings,
        "results": dict(results),
        "command": _public_command(command or []),
        "versions": versions,
        "files": digests,
        "weights": _weight_digests(folder),
    }
    write_json(Path(folder) / FILE, manifest)


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """Read a manifest; FileNotFoundError if there is none, InputError if it belongs to other weights."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {FILE}; training writes it (train_ranker, RankingTrainer).")
    manifest = read_json(path, what="manifest")
    if not isinstance(manifest.get("weights"), dict):
        raise InputError(f"{path} is damaged: it does not name its weights; train again, or copy the folder again.")
    described, present = manifest["weights"], _weight_digests(folder)
    changed = sorted({*changed_names(described, present), *changed_names(present, described)})
    if changed:
        raise InputError(
            f"The results in {path} were measured with other weights than the folder's ({', '.join(changed)}): train "
            "or evaluate again, or remove the manifest and write the card by hand."
        )
    return manifest


def select_measures(metrics: Mapping[str, Any], measures: Sequence[str] | None = None) -> dict[str, float]:
    """Return the measures among the metrics that `Trainer.evaluate` returned or logged: `eval_AP` becomes `AP`.

    Args:
        metrics: the metrics, among them losses and times.
        measures: names of the measures; None takes every name that ir_measures knows.
    """
    values = {}
    for key, value in metrics.items():
        name = key.removeprefix("eval_")
        if name != key and (_is_measure(name) if measures is None else name in measures):
            values[name] = value
    return values


def _is_measure(name: str) -> bool:
    import ir_measures  # slow to import

    try:
        ir_measures.parse_measure(name)
    except (NameError, ValueError, SyntaxError):
        return False
    return True


def _public_command(arguments: Sequence[str]) -> list[str]:
    """Return a command line without access tokens, its absolute paths cut to their last part."""
    shown: list[str] = []
    for argument in arguments:
        if shown and TOKEN_OPTION.fullmatch(shown[-1]):
            shown.append("***")
            continue
        argument = argument.removesuffix(f"{os.sep}__main__.py")  # python -m hf_kd_ranking
        if os.path.isabs(argument):
            argument = Path(argument).name
        name, equals, _ = argument.partition("=")
        if equals and TOKEN_OPTION.fullmatch(name):
            argument = f"{name}=***"
        shown.append(TOKEN.sub("***", argument))
    return shown


def _weight_digests(folder: str | os.PathLike) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(Path(folder).glob("*.safetensors"))}
