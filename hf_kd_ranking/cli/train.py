"""`hf-kd-ranking train`: the main job on files."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from ..training.arguments import RankingTrainingArguments
from ..training.job import TrainingJob, train_ranker
from .settings import parse_settings


def train(context: typer.Context) -> None:
    """Train a ranker on teacher scores (options: --help)."""
    job, args, as_json = parse_job(context.args, f"{Path(sys.argv[0]).name} train")
    results = train_ranker(job, args, command=sys.argv)
    if args.process_index == 0:
        measures = {when: results[when] for when in ("first_stage", "before", "after")}
        typer.echo(json.dumps(measures, indent=None if as_json else 2))


def parse_job(
    arguments: Sequence[str], program: str | None = None
) -> tuple[TrainingJob, RankingTrainingArguments, bool]:
    """What is trained, how, and whether `--json` was given, see `parse_settings`."""
    (job, args), given = parse_settings((TrainingJob, RankingTrainingArguments), arguments, program)
    return job, args, given.json
