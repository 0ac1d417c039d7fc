"""`hf-kd-ranking demo`: the paper's idea on docstrings, without a network."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from .options import Json, print_result


def demo(
    output: Annotated[Path, typer.Option(help="Folder of all stages; a second run resumes.")] = Path("demo_output"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of training seeds of each student.")] = 1,
    is_complete: Annotated[bool, typer.Option("--all/--no-all", help="Train all five architectures.")] = False,
    as_json: Json = False,
) -> None:
    """Distil BERT_DOT and ColBERT from a BERT_CAT and a bi-encoder, on the docstrings of the installed packages."""
    from ..demo.experiment import run_demo  # here, so that other verbs do not load it

    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        outcome = run_demo(output, seeds, is_complete)
    if as_json:
        print_result(outcome, as_json)
