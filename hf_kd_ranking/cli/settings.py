"""Verbs whose options are the fields of dataclasses, so that they are the same on the command line and in Python."""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from enum import EnumMeta
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from ..errors import InputError
from .options import Json
from .parser import add_verb, make_app, run_app

# Options whose name is not that of their field.
NAMES = {
    "model_name": ["--model", "--model-name"],
    "teachers": ["--teacher", "--teachers"],
    "teacher_scores": ["--scores", "--teacher-scores"],
    "purpose": ["--for", "--purpose"],
    "output_dir": ["--output", "--output-dir"],
    "per_device_train_batch_size": ["--batch-size", "--per-device-train-batch-size"],
}


def with_settings(*classes: type) -> Callable[[Callable], Callable]:
    """Give a verb the fields of dataclasses as options.

    The verb is called with an object of each class, made from the options that were given, and with its own
    keyword-only parameters. The metadata of a field has its `help`, and may have `aliases`. Fields with `bf16` or
    `fp16` as their name can be set by `--dtype` as well.
    """
    options = {}
    for settings in classes:
        options.update(_field_options(settings))
    dtypes = ["fp32"] + [name for name in ("bf16", "fp16") if name in options]
    if len(dtypes) > 1:
        help_text = f"Precision of training: {', '.join(dtypes)}; wins over --{' and --'.join(dtypes[1:])}."
        options["dtype"] = _keyword("dtype", str, typer.Option(help=help_text))

    def _decorate(verb: Callable) -> Callable:
        parameters = inspect.signature(verb).parameters.values()
        own = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]

        @functools.wraps(verb)
        def _run(**values: Any) -> Any:
            others = {parameter.name: values.pop(parameter.name) for parameter in own}
            dtype = values.pop("dtype", None)
            if dtype is not None:
                if dtype not in dtypes:
                    raise InputError(f"--dtype is one of {', '.join(dtypes)}, got {dtype!r}.")
                values.update({name: name == dtype for name in dtypes[1:]})
            return verb(*[_make(settings, values) for settings in classes], **others)

        _run.__signature__ = inspect.Signature([*options.values(), *own])
        return _run

    return _decorate


def parse_settings(classes: Sequence[type], arguments: Sequence[str]) -> tuple[list[Any], bool]:
    """Return an object of each dataclass, see `with_settings`, and whether `--json` was given.

    An InputError, FileNotFoundError or UsageError (of click) says which option or value is wrong.
    """

    @with_settings(*classes)
    def _parse(*settings: Any, as_json: Json = False) -> tuple[list[Any], bool]:
        return list(settings), as_json

    app = make_app()
    add_verb(app, _parse)
    return run_app(app, arguments, Path(sys.argv[0]).name)


def _make(settings: type, values: dict[str, Any]) -> Any:
    given = {}
    for field in fields(settings):
        if values.get(field.name) not in (None, []):
            given[field.name] = values[field.name]
    return settings(**given)


def _field_options(settings: type) -> dict[str, inspect.Parameter]:
    """Return options for the fields that a command line can set, the class's own before inherited ones."""
    options = {}
    hints, own = get_type_hints(settings), inspect.get_annotations(settings)
    for field in sorted(fields(settings), key=lambda field: field.name not in own):
        kind = _value_type(field, hints[field.name])
        if field.init and kind is not None:
            options[field.name] = _field_option(field, kind)
    return options


def _value_type(field: Field, hint: Any) -> Any:
    """Return the type of a field on the command line: str, int, float, bool or a list; None if it has none."""
    if field.metadata.get("const") is True:
        return bool
    members = get_args(hint | None)
    if str in members:  # among them dictionaries, as JSON
        return str
    for member in members:
        if member in (bool, int, float, list[str], list[int], list[float]):
            return member
        if isinstance(member, EnumMeta):
            return str
    return None


def _field_option(field: Field, kind: Any) -> inspect.Parameter:
    names = list(NAMES.get(field.name, [f"--{field.name.replace('_', '-')}"]))
    for alias in field.metadata.get("aliases", []):
        if alias not in names:
            names.append(alias)
    if kind is bool:
        names[0] += f"/--no-{names[0].removeprefix('--')}"
    help_text = field.metadata.get("help", "").replace("%%", "%")  # written for argparse
    default = field.default
    if field.default_factory is not MISSING:
        default = " ".join(str(value) for value in field.default_factory())
    if default is MISSING:
        return _keyword(field.name, kind, typer.Option(*names, help=help_text), inspect.Parameter.empty)
    if default is not None and default is not False and default != "":
        help_text += f" [default: {default}]"
    return _keyword(field.name, kind, typer.Option(*names, help=help_text))


def _keyword(name: str, kind: Any, option: Any, default: Any = None) -> inspect.Parameter:
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
