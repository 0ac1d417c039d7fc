"""Options that are the same words in every verb."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml


def _defaults_from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take what a YAML file says for options that the command line does not give."""
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"The config file {path} does not exist.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must map options to values, got a {type(values).__name__}.")
    known = {parameter.name for parameter in context.command.params}
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{path} has options that this verb does not: {', '.join(unknown)}.")
    context.default_map = values
    return path


Config = Annotated[
    Path | None,
    typer.Option("--config", callback=_defaults_from_file, is_eager=True, help="YAML file of these options."),
]
Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Output = Annotated[Path, typer.Option(help="What is written; it appears when it is complete.")]
Queries = Annotated[Path, typer.Option(help="Queries: id<TAB>text, JSONL, or a text store.")]
Collection = Annotated[Path, typer.Option(help="Documents: id<TAB>text, JSONL, or a text store.")]


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
