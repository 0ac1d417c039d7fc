"""The command line: `hf-kd-ranking VERB`, `python -m hf_kd_ranking VERB`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed
import typer
from huggingface_hub.errors import StrictDataclassError

from . import benchmark, demo, distill, evaluate, export, push, report, retrieval, serve, teacher, train
from .settings import CONTEXT

# What the package raises about its input; anything else is a failure and keeps its traceback.
BAD_INPUT = (ValueError, KeyError, FileNotFoundError, FileExistsError, NotADirectoryError, StrictDataclassError)

app = typer.Typer(help="Distil fast passage rankers from slow ones.", no_args_is_help=True, add_completion=False)
app.command("distill", context_settings=CONTEXT, add_help_option=False)(distill.distill)
app.command("demo")(demo.demo)
app.add_typer(teacher.app, name="teacher")
for verb in (retrieval.index, retrieval.search, retrieval.fuse, evaluate.rerank, evaluate.evaluate, evaluate.compare):
    app.command(verb.__name__)(verb)
for verb in (benchmark.benchmark, report.report, serve.serve, export.export, push.push):
    app.command(verb.__name__)(verb)
app.command("train", context_settings=CONTEXT, add_help_option=False)(train.train)


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Turn bad input into one line on standard error and exit status 2, what stops a training into one and status 1.

    HF_KD_RANKING_TRACEBACK=1 keeps the traceback. Processes of one job part at the end: one that ends with its threads
    still at work is aborted now and then, which the launcher takes for a failure of all.
    """
    try:
        yield
        _leave_processes()
    except SystemExit as error:
        if not error.code:
            _leave_processes()
        raise
    except BAD_INPUT as error:
        if os.environ.get("HF_KD_RANKING_TRACEBACK") == "1":
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        typer.echo(f"error: {' '.join(str(message).split())}", err=True)
        sys.exit(2)
    except (FloatingPointError, OSError) as error:
        if os.environ.get("HF_KD_RANKING_TRACEBACK") == "1":
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from here", err=True)
        sys.exit(130)


def _leave_processes() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    """Run the command line."""
    with exit_on_bad_input():
        app(standalone_mode=True)
