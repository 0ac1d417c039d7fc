"""`hf-kd-ranking train`: the main job on files."""

import json
import sys

import typer
from transformers import HfArgumentParser

from ..training.arguments import RankingTrainingArguments
from ..training.job import TrainingJob, train_ranker

# All options are those of the two dataclasses, so that they are the same here and in Python.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(context: typer.Context) -> None:
    """Train a ranker on teacher scores (options: --help)."""
    arguments = list(context.args)
    as_json = "--json" in arguments
    if as_json:
        arguments.remove("--json")
    parser = HfArgumentParser((TrainingJob, RankingTrainingArguments), prog=f"{sys.argv[0]} train")
    if "--config" in arguments:
        file = arguments[arguments.index("--config") + 1]
        job, args = parser.parse_yaml_file(file)
    else:
        job, args = parser.parse_args_into_dataclasses(arguments)
    results = train_ranker(job, args)
    if args.process_index == 0:
        measures = {when: results[when] for when in ("first_stage", "before", "after")}
        typer.echo(json.dumps(measures, indent=None if as_json else 2))
