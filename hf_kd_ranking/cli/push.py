"""`hf-kd-ranking push`: a trained ranker to the Hub."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..artifacts import existing_file
from ..hub.model_card import select_efficiency
from ..hub.publish import publish_ranker
from . import options


def push(
    model: Annotated[Path, typer.Argument(help="Folder of a trained ranker.")],
    repository: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name.")],
    efficiency: Annotated[Path | None, typer.Option(help="Output of `benchmark`, for the card.")] = None,
    name: Annotated[str | None, typer.Option(help="Name in --efficiency; that of the folder if not given.")] = None,
    private: options.Private = False,
    overwrite: Annotated[bool, typer.Option(help="Commit onto a repository that exists.")] = False,
    dry_run: Annotated[bool, typer.Option(help="List the files; publish nothing and change nothing.")] = False,
    as_json: options.Json = False,
) -> None:
    """Publish a ranker: weights, tokenizer, code, card, results, manifest and runs in one commit."""
    figures = None
    if efficiency is not None:
        measured = existing_file(efficiency, "efficiency").read_text(encoding="utf-8")
        figures = select_efficiency(json.loads(measured), name or model.name)

    def _as_text(plan: dict[str, Any]) -> str:
        lines = [f"{size:>13,}  {file}" for file, size in plan["files"].items()]
        verb = "went to"
        if dry_run:
            verb = "would go to"
        kind = "private repository" if private else "repository"
        lines.append(f"{plan['bytes']:>13,}  bytes {verb} {kind} {repository}")
        if plan["address"] is not None:
            lines.append(plan["address"])
        return "\n".join(lines)

    plan = publish_ranker(model, repository, private, overwrite, dry_run, figures)
    options.print_result(plan, as_json, _as_text)
