"""The parser of every verb: spelling of options, option files, and errors as one line."""

import functools
import inspect
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch.distributed
import typer
import yaml
from huggingface_hub.errors import StrictDataclassError
from typer.core import TyperCommand, TyperGroup

UsageError: type[Exception] = typer.BadParameter.__base__  # click's; recent versions of typer contain a copy of click
# What the package raises about its input; other exceptions are failures and keep their traceback.
BAD_INPUT = (ValueError, KeyError, FileNotFoundError, FileExistsError, NotADirectoryError, StrictDataclassError)
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")
OPTION = re.compile("-[^.0-9]")  # and not a negative number


# ---- Verbs ----------------------------------------------------------------------------------------------------------


class Command(TyperCommand):
    """A verb.

    Its options may be written with underscores for dashes. Several values may follow an option that takes several, and
    `true` or `false` may follow a flag.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Parse the arguments after the verb."""
        options = {}
        for option in self.params:
            if option.param_type_name == "option":
                options.update(dict.fromkeys([*option.opts, *option.secondary_opts], option))
        return super().parse_args(ctx, _spell_out(args, options))


class Group(TyperGroup):
    """A group of verbs, which prints its help if no verb is given."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Parse the arguments after the group."""
        return super().parse_args(ctx, args or ["--help"])


def make_app(description: str | None = None) -> typer.Typer:
    """Return an empty group of verbs."""
    width = {"max_content_width": 119}
    return typer.Typer(
        cls=Group, help=description, context_settings=width, add_completion=False, rich_markup_mode=None
    )


def add_verb(app: typer.Typer, verb: Callable) -> None:
    """Add a function to a group under its name; its options are its parameters and `--config`."""

    @functools.wraps(verb)
    def _run(config: Path | None = None, **options: Any) -> Any:
        return verb(**options)

    signature = inspect.signature(verb)
    config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Config)
    _run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), config])
    app.command(verb.__name__, cls=Command)(_run)


def run_app(app: typer.Typer, arguments: Sequence[str], program: str) -> Any:
    """Run a verb of a group, or the only verb of it, and return what its function returns.

    Args:
        app: the group.
        arguments: the command line without the program.
        program: name of the program in help and messages.
    """
    command = typer.main.get_command(app)
    with command.make_context(program, list(arguments)) as context:
        return command.invoke(context)


# ---- Spelling -------------------------------------------------------------------------------------------------------


def _spell_out(arguments: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Rewrite arguments as click reads them: dashes in names, an option before each value, flags without values."""
    rest, result = deque(arguments), []
    while rest:
        argument = rest.popleft()
        if argument == "--":
            return [*result, argument, *rest]
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        option = options.get(name)
        if option is None or (equals and not option.is_flag):
            result.append(name + equals + value)
        elif option.is_flag:
            if not equals:
                value = rest.popleft() if rest and rest[0].lower() in TRUE + FALSE else "true"
            result.append(_flag(name, value, option))
        elif not rest or OPTION.match(rest[0]):
            raise ValueError(f"{name} needs a value; one that begins with a dash is given as {name}=VALUE.")
        elif option.multiple:
            while rest and not OPTION.match(rest[0]):
                result.append(f"{name}={rest.popleft()}")
        else:
            result.append(name)
            for _ in range(min(option.nargs, len(rest))):
                result.append(rest.popleft())
    return result


def _flag(name: str, value: str, option: Any) -> str:
    if value.lower() not in TRUE + FALSE:
        raise ValueError(f"{name} is a flag: it takes true, false or nothing, got {value!r}.")
    is_on = (value.lower() in TRUE) == (name in option.opts)
    return option.opts[0] if is_on else option.secondary_opts[0]


# ---- Option files ---------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans and floats: `no` is a word (a value of options), 7e-6 a number."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), "-+.0123456789")


def _take_defaults(context: typer.Context, path: Path | None) -> Path | None:
    """Let an option file give the options that the command line does not give."""
    if path is not None:
        known = {}
        for parameter in context.command.params:
            for name in (parameter.name, *parameter.opts):
                known[name.lstrip("-").replace("-", "_")] = parameter
        del known["config"]
        context.default_map = _read_option_file(path, known)
    return path


def _read_option_file(path: Path, known: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """Return the values in a file as a command line has them; null leaves an option at its default."""
    if not path.is_file():
        raise FileNotFoundError(f"The config file {path} does not exist.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must map options to values, got a {type(content).__name__}.")
    unknown = [str(name) for name in content if str(name).replace("-", "_") not in known]
    if unknown:
        raise ValueError(f"{path} has options that this verb does not have: {', '.join(sorted(unknown))}.")
    values = {}
    for name, value in content.items():
        parameter = known[name.replace("-", "_")]
        if parameter.name in values:
            raise ValueError(f"{path} has {name} twice, under two of its names.")
        if value is not None:
            values[parameter.name] = _file_value(f"{path}: {name}", value, parameter)
    return values


def _file_value(name: str, value: Any, parameter: Any) -> str | list[str]:
    values = value if isinstance(value, list) else [value]
    texts = [json.dumps(item) if isinstance(item, dict | bool) else str(item) for item in values]
    if not texts:
        raise ValueError(f"{name} has an empty list; leave it out, or give at least one value.")
    if parameter.multiple or parameter.nargs != 1:
        return texts
    if isinstance(value, list):
        raise ValueError(f"{name} takes one value, got a list.")
    return texts[0]


Config = Annotated[
    Path | None,
    typer.Option(callback=_take_defaults, is_eager=True, help="YAML file of these options; the command line wins."),
]


# ---- Errors ---------------------------------------------------------------------------------------------------------


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Turn errors into one line on standard error and an exit status: 2 for bad input, 1 for other failures.

    HF_KD_RANKING_TRACEBACK=1 keeps the traceback. The processes of a distributed job leave their group at the end: a
    process that ends while its threads still work is aborted now and then, which the launcher takes for a failure.
    """
    try:
        yield
        _leave_processes()
    except typer.Exit as exit_:  # after --help
        sys.exit(exit_.exit_code)
    except SystemExit as error:
        if not error.code:
            _leave_processes()
        raise
    except (*BAD_INPUT, UsageError) as error:
        _exit(error, 2)
    except BrokenPipeError:  # the reader of the output has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (FloatingPointError, OSError) as error:
        _exit(error, 1)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command resumes here", err=True)
        sys.exit(130)


def _exit(error: Exception, status: int) -> None:
    if os.environ.get("HF_KD_RANKING_TRACEBACK") == "1":
        raise error
    message = str(error)
    if isinstance(error, KeyError) and error.args:
        message = str(error.args[0])  # str() of a KeyError is its argument in quotes
    if isinstance(error, UsageError):
        command = error.ctx.command_path if error.ctx else "hf-kd-ranking"
        message = f"{error.format_message()} (all options: {command} --help)"
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(status)


def _leave_processes() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
