"""`hf-kd-ranking demo`: the paper's idea on docstrings, without a network."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder of everything the demo makes; a second run goes on there.")
    ] = Path("demo_output"),
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds of each student.")] = 1,
    every: Annotated[bool, typer.Option("--all", help="All five architectures; a longer run.")] = False,
) -> None:
    """Distil BERT_DOT and ColBERT from a BERT_CAT and a bi-encoder, on the docstrings of the installed packages."""
    from ..demo.experiment import run_demo  # here, so that other verbs do not load it

    run_demo(output, seeds, every)
