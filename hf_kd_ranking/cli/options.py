"""Options that are the same words in every verb."""

import json
import re
from collections.abc import Collection as Names
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from ..data.collections import READERS, RankingCollection, load_collection
from ..models import ARCHITECTURES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans and floats: `no` is a word (an option's value), 7e-6 a number."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), "-+.0123456789")


def read_options(path: Path, known: Names[str]) -> dict[str, Any]:
    """Options and their values in a YAML file, by names with underscores.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no YAML, or holds something else than options, or options that are not among the known.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The config file {path} does not exist.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must map options to values, got a {type(values).__name__}.")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{path} has options that this verb does not: {', '.join(unknown)}.")
    return values


def _defaults_from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take what a YAML file says for options that the command line does not give."""
    if path is not None:
        context.default_map = read_options(path, [parameter.name for parameter in context.command.params])
    return path


Config = Annotated[
    Path | None,
    typer.Option("--config", callback=_defaults_from_file, is_eager=True, help="YAML file of these options."),
]
Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Output = Annotated[Path, typer.Option(help="What is written; it appears when it is complete.")]
Architecture = Annotated[str | None, typer.Option(help=f"{', '.join(ARCHITECTURES)}; of a plain encoder.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts, or pairs, a forward.")]
Dtype = Annotated[str, typer.Option(help=f"Of the model: {', '.join(DTYPES)}.")]
# Optional in verbs that give them a default, which take --dataset as well.
Queries = Annotated[Path | None, typer.Option(help="Queries: id<TAB>text, JSONL, or a text store.")]
Collection = Annotated[Path | None, typer.Option(help="Documents: id<TAB>text, JSONL, or a text store.")]
Qrels = Annotated[Path | None, typer.Option(help="Judgments, TREC qrels.")]
Dataset = Annotated[
    str | None,
    typer.Option(help="A collection by name (a folder, trec-dl-2019, beir/scifact/test), in place of its files."),
]
Split = Annotated[str, typer.Option(help="Of a collection that has several.")]


def collection_of(dataset: str | None, split: str, **files: Path | None) -> RankingCollection:
    """The collection that a verb's options name: as a whole, or by its files.

    Args:
        **files: `queries`, `documents`, `qrels`, `candidates`, as far as the verb has them; they win over the whole's.

    Raises:
        ValueError: where neither names a part.
    """
    parts = {name: partial(READERS[name], path) for name, path in files.items() if path is not None}
    if dataset is not None:
        return load_collection(dataset, split, parts)
    needed = [name for name in files if name not in (*parts, "candidates")]
    if needed:
        options = ", ".join("--collection" if name == "documents" else f"--{name}" for name in needed)
        raise ValueError(f"Give {options}, or --dataset.")
    return RankingCollection("files", parts)


def named(options: list[str], what: str) -> dict[str, str]:
    """Paths by name, of options that are PATH or NAME=PATH; a path's own name is its last part without the suffix.

    Args:
        what: they are, for the message.

    Raises:
        ValueError: if two have one name.
    """
    paths = {}
    for option in options:
        name, _, path = ("", "", option) if Path(option).exists() else option.rpartition("=")
        name = name or (Path(path).stem if Path(path).is_file() else Path(path).name)
        if name in paths:
            raise ValueError(f"Two of the {what} are called {name!r}; write NAME=PATH.")
        paths[name] = path
    return paths


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that an option names.

    Raises:
        ValueError: listing those there are.
    """
    if name not in DTYPES:
        raise ValueError(f"--dtype is one of {', '.join(DTYPES)}, got {name!r}.")
    return DTYPES[name]


def report(result: dict[str, Any], as_json: bool) -> None:
    """Print what a verb did: a line for people, or a line for programs."""
    if as_json:
        typer.echo(json.dumps(result))
    else:
        typer.echo(
            ", ".join(
                f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in result.items()
            )
        )
