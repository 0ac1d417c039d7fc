"""Verb `push`: a trained ranker to the Hub."""

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from ..artifacts import existing_file
from ..hub.model_card import select_efficiency
from ..hub.publish import publish_ranker
from .options import Config, Json, report


def push(
    model: Annotated[Path, typer.Argument(help="Folder of a trained ranker.")],
    repository: Annotated[str, typer.Argument(help="On the Hub, owner/name.")],
    efficiency: Annotated[
        Path | None, typer.Option(help="What `benchmark` wrote, for the card's costs; its ranker is --name.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The ranker's name in --efficiency; the folder's if unset.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Commit onto a repository that exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go; ask the Hub nothing.")] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Publish a ranker: weights, tokenizer, code, card, results, manifest and runs in one commit."""
    costs = None
    if efficiency is not None:
        measured = existing_file(efficiency, "measured costs").read_text(encoding="utf-8")
        costs = select_efficiency(json_format.loads(measured), name or model.name)
    plan = publish_ranker(model, repository, private, overwrite, dry_run, costs)
    if json:
        report(plan, True)
        return
    for file, size in plan["files"].items():
        typer.echo(f"{size:>13,}  {file}")
    where = f"{'private ' if private else ''}repository {repository}"
    typer.echo(f"{plan['bytes']:>13,}  bytes {'would go to' if dry_run else 'went to'} {where}")
    if plan["address"] is not None:
        typer.echo(plan["address"])
