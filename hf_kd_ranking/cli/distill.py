"""`hf-kd-ranking distill`: the best ranker within a latency budget, from a collection, queries and a teacher."""

from typing import Annotated

import typer

from ..distillation.job import DistillJob
from .options import Result
from .settings import with_settings

PlanOnly = Annotated[bool, typer.Option(help="Print time, disk space and memory of every stage, and stop.")]


@with_settings(DistillJob)
def distill(job: DistillJob, *, plan_only: PlanOnly = False) -> Result | None:
    """Distil a slow ranker into fast ones and choose the best within a budget."""
    from ..distillation import pipeline  # here, so that other verbs do not load it
    from ..distillation.costs import plan_text
    from ..distillation.selection import outcome_text

    typer.echo(plan_text(pipeline.make_plan(job)), err=not plan_only)
    if plan_only:
        return None
    outcome = pipeline.distill(job)
    return outcome, outcome_text(outcome, job)
