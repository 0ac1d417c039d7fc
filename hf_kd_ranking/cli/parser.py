"""The parser of every verb: spelling of options, option files, and errors as one line."""

import inspect
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch.distributed
import typer
import yaml
from huggingface_hub.errors import StrictDataclassError
from typer.core import TyperCommand, TyperGroup

from ..errors import InputError
from .options import Json, print_result

UsageError: type[Exception] = typer.BadParameter.__base__  # click's; recent versions of typer contain a copy of click
# What is wrong with the input; other exceptions are failures and keep their traceback.
BAD_INPUT = (
    InputError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    StrictDataclassError,
)
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")
LONGEST_MESSAGE = 1_000  # characters
OPTION = re.compile("-[^.0-9]")  # and not a negative number


class Command(TyperCommand):
    """A verb.

    Its options may be written with underscores for dashes. Several values may follow an option that takes several, and
    `true` or `false` may follow a flag.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Write the arguments as click reads them: dashes, an option before each value, flags without values."""
        options = {}
        for option in self.params:
            if option.param_type_name == "option":
                options.update(dict.fromkeys([*option.opts, *option.secondary_opts], option))
        rest, result = deque(args), []
        while rest and rest[0] != "--":
            argument = rest.popleft()
            name, equals, value = argument.partition("=")
            if name.startswith("--"):
                name = name.replace("_", "-")
            option = options.get(name)
            if option is None or (equals and not option.is_flag):
                result.append(name + equals + value)
            elif option.is_flag:
                if not equals:
                    value = rest.popleft() if rest and rest[0].lower() in TRUE + FALSE else "true"
                if value.lower() not in TRUE + FALSE:
                    raise InputError(f"{name} is a flag: it takes true, false or nothing, got {value!r}.")
                is_on = (value.lower() in TRUE) == (name in option.opts)
                result.append(option.opts[0] if is_on else option.secondary_opts[0])
            elif not rest or OPTION.match(rest[0]):
                raise InputError(f"{name} needs a value; one that begins with a dash is given as {name}=VALUE.")
            elif option.multiple:
                while rest and not OPTION.match(rest[0]):
                    result.append(f"{name}={rest.popleft()}")
            else:
                result.append(name)  # its values follow as they are
        arguments = super().parse_args(ctx, [*result, *rest])
        given = {name for name in ctx.params if ctx.get_parameter_source(name).name == "COMMANDLINE"}
        if "dtype" not in given and given & {"bf16", "fp16"}:
            ctx.params["dtype"] = None  # the one of an option file; the command line wins
        return arguments


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
    """Add a function to a group under its name; its options are its parameters, `--json` and `--config`.

    What it returns is printed, see `print_result`. A function with the parameter `as_json` prints by itself.
    """
    signature = inspect.signature(verb)
    prints_itself = "as_json" in signature.parameters

    def _run(*, as_json: Json = False, config: Config = None, **options: Any) -> Any:
        if prints_itself:
            return verb(**options, as_json=as_json)
        return print_result(verb(**options), as_json)

    *added, _ = inspect.signature(_run).parameters.items()
    parameters = dict(signature.parameters) | dict(added)
    _run.__signature__ = signature.replace(parameters=parameters.values())
    app.command(verb.__name__, cls=Command, help=verb.__doc__)(_run)


def run_app(app: typer.Typer, arguments: Sequence[str], program: str) -> Any:
    """Run a verb of a group, or the only verb of it; `program` is the name in help and messages."""
    command = typer.main.get_command(app)
    with command.make_context(program, list(arguments)) as context:
        return command.invoke(context)


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
    """Let an option file give the options that the command line does not give, in the form of a command line."""
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"The config file {path} does not exist.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also bytes that are not UTF-8, February 30
        raise InputError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must map options to values, got a {type(content).__name__}.")
    known = {}
    for parameter in context.command.params:
        for name in (parameter.name, *parameter.opts):
            known[name.lstrip("-").replace("-", "_")] = parameter
    del known["config"]
    unknown = [str(name) for name in content if str(name).replace("-", "_") not in known]
    if unknown:
        raise InputError(f"{path} has options that this verb does not have: {', '.join(sorted(unknown))}.")
    context.default_map = {}
    for name, value in content.items():
        parameter = known[name.replace("-", "_")]
        if parameter.name in context.default_map:
            raise InputError(f"{path} has {name} twice, under two of its names.")
        if value is not None:  # null leaves an option at its default
            context.default_map[parameter.name] = _as_words(f"{path}: {name}", value, parameter)
    return path


def _as_words(name: str, value: Any, parameter: Any) -> str | list[str]:
    values = value if isinstance(value, list) else [value]
    words = [json.dumps(item) if isinstance(item, dict | bool) else str(item) for item in values]
    if not words:
        raise InputError(f"{name} has an empty list; leave it out, or give at least one value.")
    if parameter.multiple or parameter.nargs != 1:
        return words
    if isinstance(value, list):
        raise InputError(f"{name} takes one value, got a list.")
    return words[0]


Config = Annotated[
    Path | None,
    typer.Option(callback=_take_defaults, is_eager=True, help="YAML file of these options; the command line wins."),
]


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
    if isinstance(error, UsageError):
        command = "hf-kd-ranking"
        if error.ctx:
            command = error.ctx.command_path
        message = f"{error.format_message()} (all options: {command} --help)"
    words = " ".join(message.split())
    if len(words) > LONGEST_MESSAGE:  # with a line of a file, for example
        words = f"{words[: LONGEST_MESSAGE // 2]} ... {words[-LONGEST_MESSAGE // 2 :]}"
    # A terminal cannot show halves of characters, which paths and JSON may contain.
    typer.echo(f"error: {words.encode('utf-8', 'backslashreplace').decode()}", err=True)
    sys.exit(status)


def _leave_processes() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
