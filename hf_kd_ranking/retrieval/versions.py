"""Folders of stores and indexes: what one was built with, its checksums, and how the next version takes its place.

`index.json` says everything, the name of the folder beside it that holds the data included. It is replaced in one step
when a new version is complete: until then, and wherever a process dies, the old version is what a reader opens.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import xxhash

from ..data.tables import existing_file, writing
from ..inference import fingerprint
from ..models import RankerConfig
from ..ranker import Ranker

FACTS = "index.json"
# Config fields that change no document's vector; those of the query side are left out by their names.
NOT_OF_DOCUMENTS = {"encoder_config", "initializer_range", *(field.name for field in fields(RankerConfig))}


def model_facts(ranker: Ranker) -> dict[str, str]:
    """What identifies the model that makes vectors: architecture, dtype, fingerprint of weights and settings."""
    config = ranker.model.config
    own = {field.name for field in fields(type(config))} - NOT_OF_DOCUMENTS
    own |= {"max_document_length", "document_prefix"}
    settings = {name: vars(config)[name] for name in sorted(own) if not name.startswith("query_")}
    return {
        "architecture": config.model_type,
        "model_dtype": str(ranker.model.dtype).removeprefix("torch."),
        "model": fingerprint(ranker.model, settings),
    }


def check_model(facts: Mapping[str, Any], ranker: Ranker, folder: Path) -> None:
    """Refuse a ranker that did not make the vectors of a folder.

    Raises:
        ValueError: naming the first difference.
    """
    for name, value in model_facts(ranker).items():
        if facts[name] != value:
            raise ValueError(
                f"{folder} was built by another model: {name.replace('_', ' ')} {facts[name]} there, {value} here; "
                "open it with that model, or build it again."
            )


@contextmanager
def new_version(folder: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """An empty folder for the files of an index; they become the index when the block ends well.

    Args:
        folder: of the index.
        facts: what it was built with; its `kind` among them.
    """
    number = 1 + (read_facts(folder)["version"] if (folder / FACTS).is_file() else 0)
    data = folder / f"v{number}"
    shutil.rmtree(data, ignore_errors=True)  # of a process that died
    data.mkdir(parents=True)
    try:
        yield data
        files = {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(data.iterdir())}
        facts = {name: value for name, value in facts.items() if name != "checksum"}  # of what it is made from
        facts |= {"version": number, "files": files}
        with writing(folder / FACTS) as file:
            json.dump(facts | {"checksum": _digest(facts)}, file, indent=1)
    except BaseException:
        shutil.rmtree(data, ignore_errors=True)
        raise
    for path in folder.glob("v*"):
        if path != data:
            shutil.rmtree(path, ignore_errors=True)


def read_facts(folder: Path) -> dict[str, Any]:
    """What an index was built with.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is damaged.
    """
    path = existing_file(folder / FACTS, "index's description")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        is_whole = facts.pop("checksum") == _digest(facts)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path} is damaged: its checksum is another; build the index again.")
    return facts | {"checksum": _digest(facts)}


def open_version(folder: Path, kind: str, is_verified: bool = True) -> tuple[dict[str, Any], Path]:
    """The facts of an index, and the folder of its files, whose sizes are checked.

    Args:
        kind: that the index must be of.
        is_verified: True reads every file and compares checksums.

    Raises:
        FileNotFoundError: if it, or one of its files, is not there.
        ValueError: if it is of another kind, or a file is truncated or damaged.
    """
    facts = read_facts(folder)
    if facts["kind"] != kind:
        raise ValueError(f"{folder} is an index of kind {facts['kind']}, needed {kind}.")
    data = folder / f"v{facts['version']}"
    for name, (size, checksum) in facts["files"].items():
        path = data / name
        found = existing_file(path, "index").stat().st_size
        if found != size:
            raise ValueError(f"{path} has {found:,} bytes of {size:,}: it is truncated; build the index again.")
        if is_verified and _checksum(path) != checksum:
            raise ValueError(f"{path} is damaged: its checksum is another; build the index again.")
    return facts, data


def _digest(facts: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode())


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
