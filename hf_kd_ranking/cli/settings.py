"""Verbs whose options are the fields of dataclasses, so that they are the same here and in Python."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from .options import read_options

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise in place of printing a usage of hundreds of lines."""
        raise ValueError(f"{message} (all options: --help).")


def parse_settings(
    classes: Sequence[type],
    arguments: Sequence[str],
    program: str | None = None,
    flags: Mapping[str, str] | None = None,
) -> tuple[list[Any], Namespace]:
    """Settings from a command line, and from the YAML file that `--config` names; the command line wins.

    Args:
        classes: dataclasses, whose fields are the options.
        arguments: options and values, without the program.
        program: what `--help` calls it; None is the script's name.
        flags: others by name, with their help, besides `--config` and `--json`.

    Returns:
        An object of each class, and the flags.

    Raises:
        ValueError: if an option is unknown, a list stands twice, or a value not the option's, on either side.
        FileNotFoundError: if there is no such file.
    """
    shared = ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--config", type=Path, help="YAML file of these options; those of the command line win.")
    for flag, words in ({"--json": "End with one line of JSON."} | dict(flags or {})).items():
        shared.add_argument(flag, action="store_true", help=words)
    config = shared.parse_known_args(arguments)[0].config
    names = [field.name for settings in classes for field in fields(settings) if field.init]
    from_file = [] if config is None else _as_arguments(read_options(config, names))
    parser = _Parser(classes, prog=program, parents=[shared], allow_abbrev=False)
    given_names = [argument.partition("=")[0] for argument in arguments]
    for option in (action.option_strings for action in parser._actions if action.nargs == "+"):
        if sum(name in option for name in given_names) > 1:  # the last would silently win
            raise ValueError(f"{option[0]} stands twice; its values follow one another: {option[0]} A B.")
    *found, given = parser.parse_args_into_dataclasses([*from_file, *arguments], look_for_args_file=False)
    return found, given


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
