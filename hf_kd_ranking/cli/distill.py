"""Verb `distill`: a collection, queries and a teacher become the best ranker within a latency budget."""

import sys
from pathlib import Path

import typer

from ..distillation.job import DistillJob
from .options import report
from .settings import parse_settings

PLAN_ONLY = {"--plan-only": "Only say what it will take: time, disk and memory of every stage."}


def distill(context: typer.Context) -> None:
    """Distil a slow ranker into fast ones and choose the best within a budget (options: --help)."""
    from ..distillation.outcome import distill as distil
    from ..distillation.outcome import outcome_text
    from ..distillation.plan import make_plan, plan_text

    program = f"{Path(sys.argv[0]).name} distill"
    (job,), given = parse_settings((DistillJob,), context.args, program, PLAN_ONLY)
    typer.echo(plan_text(make_plan(job)), err=not given.plan_only)
    if given.plan_only:
        return
    outcome = distil(job)
    if given.json:
        report(outcome, True)
    else:
        typer.echo(outcome_text(outcome, job))
