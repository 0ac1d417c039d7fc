"""The last step of `distill`: the best ranker within the budget, and what was found in words."""

import shutil
from pathlib import Path
from typing import Any

from ..data.formats import building
from .job import DistillJob
from .stages import ALONE, TAUGHT, Distillation


def distill(job: DistillJob) -> dict[str, Any]:
    """Distil a teacher into every architecture of a job, and choose the best ranker within the latency budget.

    Every stage has a folder in the job's output and is done once: the same call after an interruption goes on, a call
    with another option repeats what depends on it.

    Returns:
        `test` and `dev` (name -> mean of the measure), `latency_ms` (name -> median of a query), `folders`, `page`
        (the report), `best` (the chosen name) and `ranker`, its folder, ready to push.

    Raises:
        ValueError, FileNotFoundError, KeyError: for bad input, as far as possible before any work.
    """
    outcome = Distillation(job).measure()
    best = choose(outcome, job.budget_ms)
    ranker = Path(job.output) / "best"
    with building(ranker) as temporary:
        shutil.copytree(
            outcome["folders"][best], temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*")
        )
        shutil.rmtree(ranker, ignore_errors=True)
    return outcome | {"best": best, "ranker": str(ranker)}


def choose(outcome: dict[str, Any], budget_ms: float | None) -> str:
    """The ranker that is best on the queries for choosing, among those within the budget.

    Raises:
        ValueError: if none is; it names the fastest.
    """
    latency = outcome["latency_ms"]
    within = [name for name in outcome["dev"] if budget_ms is None or latency[name] <= budget_ms]
    if not within:
        fastest = min(latency, key=latency.get)
        raise ValueError(
            f"No ranker is within {budget_ms:g} ms a query; the fastest, {fastest}, takes {latency[fastest]:.1f} ms: "
            "raise --budget-ms, lower --candidates, or add a faster architecture."
        )
    return max(within, key=lambda name: outcome["dev"][name])


def outcome_text(outcome: dict[str, Any], job: DistillJob) -> str:
    """The outcome as a Markdown table and a sentence."""
    what = job.measure if job.qrels is not None else f"{job.measure} (agreement with the teacher, not relevance)"
    lines = [f"| ranker | {what}, test | {job.measure}, dev | ms a query |", "| --- | --- | --- | --- |"]
    for name, value in outcome["test"].items():
        dev, latency = outcome["dev"].get(name), outcome["latency_ms"].get(name)
        cells = [
            name,
            f"{value:.4f}",
            "" if dev is None else f"{dev:.4f}",
            "" if latency is None else f"{latency:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    budget = "" if job.budget_ms is None else f" within {job.budget_ms:g} ms a query"
    for name in job.architectures:
        gain = outcome["test"][f"{name} {TAUGHT}"] - outcome["test"][f"{name} {ALONE}"]
        lines.append(f"\n{name}: {gain:+.4f} by the teacher on the same triples.")
    lines.append(f"\nChosen on dev{budget}: {outcome['best']}, in {outcome['ranker']}. Report: {outcome['page']}")
    return "\n".join(lines)
