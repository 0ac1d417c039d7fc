"""What a job will take."""

import dataclasses
import fnmatch
from pathlib import Path

from hf_kd_ranking.distillation.plan import Stage, make_plan, plan_text

import hf_kd_ranking as kd


def test_the_plan_names_what_is_made_and_what_is_done(make_job, trainings, tmp_path):
    job = make_job(seeds=2, overrides={"colbert": {"learning_rates": [1e-3, 1e-2]}})
    plan = make_plan(job)
    assert all(stage.seconds > 0 and not stage.is_done for stage in plan)
    students = [stage for stage in plan if stage.name.startswith("students/")]
    assert len(students) == 2 * 2 + 2 * 3
    assert not trainings and not (tmp_path / "out" / "candidates").exists()
    kd.distill(job)
    assert {stage.name for stage in make_plan(job) if not stage.is_done} == set()
    of_done = plan_text([Stage("triples", 400.0, 2.0**30, 2.0**30, is_done=True)])
    assert of_done.splitlines()[-1] == "| all | 0 s | 0 MiB | 0 MiB |"
    assert plan_text(make_plan(job)).splitlines()[-1] == "| all | 0 s | 0 MiB | 0 MiB |"
    more = [stage.name for stage in make_plan(dataclasses.replace(job, architectures=["tk"])) if not stage.is_done]
    assert len(more) == 2 * 3 + 1 and more[-1] == "report"
    made = {str(path.parent.relative_to(job.output)) for path in Path(job.output).rglob("stage.json")}
    assert all(fnmatch.filter(made, stage.name) for stage in plan)
