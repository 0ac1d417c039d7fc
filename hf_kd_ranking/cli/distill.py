"""`hf-kd-ranking distill | demo`: the best ranker within a latency budget, on your collection or on docstrings."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from transformers.utils.logging import disable_progress_bar

from ..distillation.job import DistillJob, TargetNotMetError
from ..processes import processes
from .options import Json, Result, print_result
from .settings import with_settings

PlanOnly = Annotated[bool, typer.Option(help="Print time, disk space and memory of every stage, and stop.")]


@with_settings(DistillJob)
def distill(job: DistillJob, *, plan_only: PlanOnly = False) -> Result | None:
    """Distil a slow ranker into fast ones, and deliver the best pipeline within a latency budget.

    Example: hf-kd-ranking distill --collection collection.tsv --queries queries.tsv --qrels qrels.txt --teacher
    bert_cat --output distilled
    """
    from ..distillation import pipeline  # here, so that other verbs do not load it
    from ..distillation.costs import plan_text
    from ..distillation.wording import outcome_text

    disable_progress_bar()  # of loading and saving weights, dozens of which would hide the others
    if not plan_only:
        pipeline.with_queries(job)  # generates them, if the job brings none: their number determines all other costs
    plan, is_main = plan_text(pipeline.make_plan(job)), processes().is_main_process
    if is_main:
        typer.echo(plan, err=not plan_only)
    if plan_only:
        return None
    try:
        outcome = pipeline.distill(job)
    except TargetNotMetError as error:  # the input is good, so the status is not that of bad input
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if not is_main:
        return None  # one process prints
    return outcome, outcome_text(outcome, job)


def demo(
    output: Annotated[Path, typer.Option(help="Folder of all stages; a second run resumes.")] = Path("demo_output"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of training seeds of each student.")] = 1,
    is_complete: Annotated[bool, typer.Option("--all/--no-all", help="Train all architectures.")] = False,
    as_json: Json = False,
) -> None:
    """Distil BERT_DOT and ColBERT from all-MiniLM-L6-v2, on the docstrings of the installed packages.

    Example: hf-kd-ranking demo --output demo_output
    """
    from ..demo.experiment import run_demo

    disable_progress_bar()
    with redirect_stdout(sys.stderr if as_json else sys.stdout):  # it prints its plan and its outcome
        outcome = run_demo(output, seeds, is_complete)
    if as_json:
        print_result(outcome, as_json)
