"""Verbs whose options are the fields of dataclasses, so that they are the same on the command line and in Python."""

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from .options import Json
from .parser import add_verb, make_app, run_app

# Names of options that differ from their field's.
NAMES = {
    "model_name": ("--model", "--model-name"),
    "teachers": ("--teacher", "--teachers"),
    "teacher_scores": ("--scores", "--teacher-scores"),
    "output_dir": ("--output", "--output-dir"),
    "per_device_train_batch_size": ("--batch-size", "--per-device-train-batch-size"),
}
PRECISIONS = ("bf16", "fp16")  # fields that --dtype sets


def with_settings(*classes: type) -> Callable[[Callable], Callable]:
    """Give a verb the fields of dataclasses as options.

    The verb is called with an object of each class, made from the options that were given, and with its own
    keyword-only parameters.

    Args:
        *classes: dataclasses, whose fields have a `help` in their metadata and may have `aliases`.
    """
    options = {}
    for settings in classes:
        options.update(_field_options(settings))
    precisions = [name for name in PRECISIONS if name in options]
    if precisions:
        options["dtype"] = _dtype_option(precisions)

    def decorate(verb: Callable) -> Callable:
        own = {}
        for name, parameter in inspect.signature(verb).parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                own[name] = parameter

        @functools.wraps(verb)
        def run(**values: Any) -> Any:
            given = {}
            for name in options:
                if values[name] is not None and values[name] != []:
                    given[name] = values[name]
            if "dtype" in given:
                given.update(_precision(given["dtype"], precisions))
            settings = [_make(each, given) for each in classes]
            return verb(*settings, **{name: values[name] for name in own})

        run.__signature__ = inspect.Signature([*options.values(), *own.values()])
        return run

    return decorate


def parse_settings(
    classes: Sequence[type], arguments: Sequence[str], program: str | None = None
) -> tuple[list[Any], bool]:
    """Parse arguments whose options are the fields of dataclasses, `--config` and `--json`.

    Args:
        classes: the dataclasses.
        arguments: options and values, without the program.
        program: name of the program in help and messages; None is that of the process.

    Returns:
        An object of each class, and whether `--json` was given.

    Raises:
        ValueError: if an option or a value is wrong in the file.
        FileNotFoundError: if the file does not exist.
        typer.BadParameter: or another error of its base class, if an option or a value is wrong on the command line.
    """

    @with_settings(*classes)
    def parsed(*settings: Any, as_json: Json = False) -> tuple[list[Any], bool]:
        return list(settings), as_json

    app = make_app()
    add_verb(app, parsed)
    return run_app(app, arguments, program)


def _make(settings: type, given: dict[str, Any]) -> Any:
    own = {}
    for field in fields(settings):
        if field.name in given:
            own[field.name] = given[field.name]
    return settings(**own)


def _field_options(settings: type) -> dict[str, inspect.Parameter]:
    """Return an option for each field that has a form on the command line, those of the class before inherited ones."""
    own, inherited, hints = {}, {}, get_type_hints(settings)
    for field in fields(settings):
        kind = _option_type(field, hints[field.name])
        if field.init and kind is not None:
            place = own if field.name in inspect.get_annotations(settings) else inherited
            place[field.name] = _field_option(field, kind)
    return own | inherited


def _option_type(field: Field, hint: Any) -> Any:
    """Return the type of a field's values on the command line: str, int, float, bool, a list; None if it has none."""
    members = [hint]
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
    if field.metadata.get("const") is True:
        return bool
    if str in members:
        return str
    for member in members:
        if member in (bool, int, float):
            return member
        if get_origin(member) is list and get_args(member)[0] in (str, int, float):
            return member
        if inspect.isclass(member) and issubclass(member, Enum):
            return str
    return None


def _field_option(field: Field, kind: Any) -> inspect.Parameter:
    names = [*NAMES.get(field.name, [f"--{field.name.replace('_', '-')}"])]
    aliases = field.metadata.get("aliases", [])
    for alias in [aliases] if isinstance(aliases, str) else aliases:
        if alias.replace("_", "-") not in names:
            names.append(alias.replace("_", "-"))
    if kind is bool:
        names[0] += f"/--no-{names[0].removeprefix('--')}"
    is_required = field.default is MISSING and field.default_factory is MISSING
    help_text = field.metadata.get("help", "")
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if isinstance(default, list):
        default = " ".join(str(value) for value in default)
    is_shown = not is_required and default is not None and default is not False and default != ""
    if is_shown:
        help_text += f" [default: {default.value if isinstance(default, Enum) else default}]"
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if is_required else None,
        annotation=Annotated[kind if is_required else kind | None, typer.Option(*names, help=help_text)],
    )


def _dtype_option(precisions: Sequence[str]) -> inspect.Parameter:
    flags = " and ".join(f"--{name}" for name in precisions)
    help_text = f"Precision of training: fp32, {', '.join(precisions)}; wins over {flags}."
    annotation = Annotated[str | None, typer.Option(help=help_text)]
    return inspect.Parameter("dtype", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _precision(dtype: str, precisions: Sequence[str]) -> dict[str, bool]:
    if dtype not in ("fp32", *precisions):
        raise ValueError(f"--dtype is one of fp32, {', '.join(precisions)}, got {dtype!r}.")
    return {name: name == dtype for name in precisions}
