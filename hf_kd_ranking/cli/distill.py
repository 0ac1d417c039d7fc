"""`hf-kd-ranking distill`: the best ranker within a latency budget, from a collection, queries and a teacher."""

from typing import Annotated

import typer

from ..distillation.job import DistillJob
from .options import Json, print_result
from .settings import with_settings

PlanOnly = Annotated[bool, typer.Option(help="Print time, disk space and memory of every stage, and stop.")]


@with_settings(DistillJob)
def distill(job: DistillJob, *, plan_only: PlanOnly = False, as_json: Json = False) -> None:
    """Distil a slow ranker into fast ones and choose the best within a budget."""
    from ..distillation.outcome import distill as run_distillation
    from ..distillation.outcome import outcome_text
    from ..distillation.plan import make_plan, plan_text

    typer.echo(plan_text(make_plan(job)), err=not plan_only)
    if not plan_only:
        outcome = run_distillation(job)
        print_result(outcome, as_json, lambda result: outcome_text(result, job))
