"""`hf-kd-ranking push | export`: a ranker or a pipeline to the Hub, a ranker in the layout of another library."""

from pathlib import Path
from typing import Annotated

import typer

from ..artifacts import read_json
from ..errors import InputError
from ..hub.model_card import select_efficiency
from ..hub.publish import publish
from ..interop.export import FORMATS, export_ranker
from . import options


def push(
    model: Annotated[Path, typer.Argument(help="Folder of a trained ranker or a pipeline.")],
    repository: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name.")],
    efficiency: Annotated[Path | None, typer.Option(help="Output of `benchmark`, for the card.")] = None,
    name: Annotated[str | None, typer.Option(help="Name in --efficiency; that of the folder if not given.")] = None,
    private: options.Private = False,
    overwrite: Annotated[bool, typer.Option(help="Commit onto a repository that exists.")] = False,
    dry_run: Annotated[bool, typer.Option(help="List the files; publish nothing and change nothing.")] = False,
) -> options.Result:
    """Publish a ranker (weights, tokenizer, code, card, results, manifest, runs) or a pipeline in one commit.

    Example: hf-kd-ranking push bert_dot me/bert_dot --private --dry-run
    """
    figures = None
    if efficiency is not None:
        try:
            figures = select_efficiency(read_json(efficiency, what="efficiency"), name or model.name)
        except InputError as error:
            raise InputError(f"{efficiency}: {error}") from None
    plan = publish(model, repository, private, overwrite, dry_run, figures)
    lines = [f"{size:>13,}  {file}" for file, size in plan["files"].items()]
    verb = "would go to" if dry_run else "went to"
    kind = "repository"
    if private:
        kind = "private repository"
    lines.append(f"{plan['bytes']:>13,}  bytes {verb} {kind} {repository}")
    if plan["address"] is not None:
        lines.append(plan["address"])
    return plan, "\n".join(lines)


def export(
    model: options.Model,
    to: Annotated[str, typer.Option(help=f"Format: {', '.join(FORMATS)}.")],
    output: options.Output,
    architecture: options.Architecture = None,
    overwrite: options.Overwrite = False,
) -> options.Result:
    """Write a ranker in another library's layout, with equal scores (except onnx-int8).

    Example: hf-kd-ranking export --model bert_dot --to sentence-transformer --output exported
    """
    return export_ranker(model, to, output, architecture, overwrite)
