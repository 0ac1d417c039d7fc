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

UsageError: type[Exception] = typer.BadParameter.__base__  # click's; typer contains a copy of click from 0.26 on
# What the package raises about its input; other exceptions are failures and keep their traceback.
BAD_INPUT = (
    ValueError,
    KeyError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    StrictDataclassError,
    UsageError,
)
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")
NUMBER = re.compile(r"-\.?\d")


# ---- Verbs ----------------------------------------------------------------------------------------------------------


class Command(TyperCommand):
    """A verb.

    Its options may be written with underscores for dashes. Several values may follow one option that takes several,
    and `true` or `false` may follow a flag.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Parse the arguments after the verb."""
        return super().parse_args(ctx, spell_out(args, option_names(self)))


class Group(TyperGroup):
    """A group of verbs, which prints its help where no verb is given."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Parse the arguments after the group."""
        return super().parse_args(ctx, args or ["--help"])


def make_app(description: str | None = None) -> typer.Typer:
    """Return an empty group of verbs."""
    return typer.Typer(cls=Group, help=description, add_completion=False, rich_markup_mode=None)


def add_verb(app: typer.Typer, verb: Callable, name: str | None = None) -> None:
    """Add a function to a group; as a verb it takes `--config` besides its own options.

    Args:
        app: the group.
        verb: a function whose parameters are annotated with `typer.Option` or `typer.Argument`.
        name: name of the verb; None is the function's.
    """

    @functools.wraps(verb)
    def run(config: Path | None = None, **options: Any) -> Any:
        return verb(**options)

    signature = inspect.signature(verb)
    config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Config)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), config])
    app.command(name or verb.__name__, cls=Command)(run)


def run_app(app: typer.Typer, arguments: Sequence[str], program: str | None = None) -> Any:
    """Run a verb.

    Args:
        app: a group of verbs, or a single verb.
        arguments: without the name of the program.
        program: name of the program in help and messages; None is that of the process.

    Returns:
        What the verb's function returned.
    """
    command = typer.main.get_command(app)
    with command.make_context(program or Path(sys.argv[0]).name, list(arguments)) as context:
        return command.invoke(context)


# ---- Spelling -------------------------------------------------------------------------------------------------------


def option_names(command: TyperCommand) -> dict[str, Any]:
    """Return the options of a command by each of their names, which begin with two dashes."""
    options = {}
    for option in command.params:
        if option.param_type_name == "option":
            for name in (*option.opts, *option.secondary_opts):
                options[name] = option
    return options


def spell_out(arguments: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Rewrite arguments as click reads them: dashes in names, an option before each value, flags without values.

    Args:
        arguments: as the user wrote them.
        options: the options of the command by name.

    Raises:
        ValueError: if an option follows one that needs a value, or a flag has a value that is not true or false.
    """
    rest, result = deque(arguments), []
    while rest:
        argument = rest.popleft()
        if argument == "--":
            return [*result, argument, *rest]
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        option = options.get(name)
        if option is None:
            result.append(f"{name}{equals}{value}")
        elif option.is_flag:
            if not equals:
                value = rest.popleft() if rest and rest[0].lower() in TRUE + FALSE else "true"
            result.append(_flag(name, value, option))
        elif equals:
            result.append(f"{name}={value}")
        else:
            values = _take_values(name, rest, option)
            if option.multiple and values:
                result += [f"{name}={value}" for value in values]
            else:
                result += [name, *values]  # with too few values click says so
    return result


def _flag(name: str, value: str, option: Any) -> str:
    if value.lower() not in TRUE + FALSE:
        raise ValueError(f"{name} is a flag: it takes true, false or nothing, got {value!r}.")
    is_on = (value.lower() in TRUE) == (name in option.opts)
    return option.opts[0] if is_on else option.secondary_opts[0]


def _take_values(name: str, rest: deque[str], option: Any) -> list[str]:
    """Take the values after an option; one that is not repeatable takes them as they come, negative or not."""
    values = []
    while rest and (option.multiple or len(values) < option.nargs):
        is_option = rest[0].startswith("-") and not NUMBER.match(rest[0])
        if is_option and option.multiple:
            break
        if is_option and rest[0].startswith("--"):
            raise ValueError(f"{name} needs a value, got the option {rest[0]}.")
        values.append(rest.popleft())
    return values


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


def read_option_file(path: Path, parameters: Sequence[Any]) -> dict[str, str | list[str]]:
    """Read the values of options from a YAML file; null leaves an option at its default.

    Args:
        path: the file; names have dashes or underscores, and may be aliases.
        parameters: the options and arguments of the command.

    Returns:
        Name of the parameter -> its value as on a command line, or its values where it takes several.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not valid YAML, does not map options to values, has unknown options, one option under two
            names, or a wrong number of values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The config file {path} does not exist.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must map options to values, got a {type(content).__name__}.")
    known = {}
    for parameter in parameters:
        for name in (parameter.name, *parameter.opts):
            known[name.lstrip("-").replace("-", "_")] = parameter
    known.pop("config")
    unknown = [str(name) for name in content if str(name).replace("-", "_") not in known]
    if unknown:
        raise ValueError(f"{path} has options that this verb does not have: {', '.join(sorted(unknown))}.")
    values = {}
    for name, value in content.items():
        parameter = known[name.replace("-", "_")]
        if parameter.name in values:
            raise ValueError(f"{path} has {name} twice, under two of its names.")
        if value is not None:
            values[parameter.name] = _file_value(path, name, value, parameter)
    return values


def _file_value(path: Path, name: str, value: Any, parameter: Any) -> str | list[str]:
    takes_several = parameter.multiple or parameter.nargs != 1
    if not takes_several:
        if isinstance(value, list):
            raise ValueError(f"{path}: {name} takes one value, got a list.")
        return _as_text(value)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{path}: {name} has an empty list; leave it out, or give at least one value.")
    return [_as_text(value) for value in values]


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)


def _take_defaults(context: typer.Context, path: Path | None) -> Path | None:
    """Let an option file give the options that the command line does not give."""
    if path is not None:
        context.default_map = read_option_file(path, context.command.params)
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", callback=_take_defaults, is_eager=True, help="YAML file of options; the command line wins."
    ),
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
    except BAD_INPUT as error:
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
        message = error.format_message()
        if error.ctx is not None:
            message += f" (options: {error.ctx.command_path} --help)"
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(status)


def _leave_processes() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
