"""`hf-kd-ranking train`: the main job on files."""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import typer
from transformers import HfArgumentParser

from ..training.arguments import RankingTrainingArguments
from ..training.job import TrainingJob, train_ranker
from .options import read_options

# All options are those of the two dataclasses, so that they are the same here and in Python.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
SETTINGS = (TrainingJob, RankingTrainingArguments)


def train(context: typer.Context) -> None:
    """Train a ranker on teacher scores (options: --help)."""
    job, args, as_json = parse_job(context.args, f"{Path(sys.argv[0]).name} train")
    results = train_ranker(job, args)
    if args.process_index == 0:
        measures = {when: results[when] for when in ("first_stage", "before", "after")}
        typer.echo(json.dumps(measures, indent=None if as_json else 2))


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise in place of printing a usage of hundreds of lines."""
        raise ValueError(f"{message} (all options: --help).")


def parse_job(
    arguments: Sequence[str], program: str | None = None
) -> tuple[TrainingJob, RankingTrainingArguments, bool]:
    """Settings from a command line, and from the YAML file that `--config` names; the command line wins.

    Args:
        arguments: options and values, without the program.
        program: what `--help` calls it; None is the script's name.

    Returns:
        What is trained, how, and whether `--json` was given.

    Raises:
        ValueError: if an option is unknown, or a value not the option's, on either side.
        FileNotFoundError: if there is no such file.
    """
    shared = ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--config", type=Path, help="YAML file of these options; those of the command line win.")
    shared.add_argument("--json", action="store_true", help="End with one line of JSON.")
    config = shared.parse_known_args(arguments)[0].config
    names = [field.name for settings in SETTINGS for field in fields(settings) if field.init]
    from_file = [] if config is None else _as_arguments(read_options(config, names))
    parser = _Parser(SETTINGS, prog=program, parents=[shared], allow_abbrev=False)
    job, args, given = parser.parse_args_into_dataclasses([*from_file, *arguments], look_for_args_file=False)
    return job, args, given.json


def _as_arguments(options: dict[str, Any]) -> list[str]:
    """Options as a command line has them; null leaves an option at its default."""
    arguments = []
    for name, value in options.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(_as_text, value)]
        elif value is not None:
            arguments.append(f"--{name}={_as_text(value)}")
    return arguments


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)
