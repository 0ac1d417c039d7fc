"""The cost of a job before it starts."""

import dataclasses

import hf_kd_ranking as kd
from hf_kd_ranking.artifacts import read_description
from hf_kd_ranking.distillation.context import Context
from hf_kd_ranking.distillation.costs import Cost, Plan, plan_text
from hf_kd_ranking.distillation.pipeline import make_all, make_plan


def test_plan_walks_the_steps_of_the_job_and_knows_what_is_done(make_job, trainings, tmp_path):
    job = make_job(seeds=2, overrides={"colbert": {"learning_rates": [1e-3, 1e-2]}})
    plan = make_plan(job)
    assert not any(cost.is_done for cost in plan)
    assert all(cost.seconds > 0 for cost in plan)
    assert not trainings and not (tmp_path / "out").exists()
    trained = [cost.name for cost in plan if "/rate-" in cost.name or "/seed-" in cost.name]
    assert len(trained) == 2 * 2 + 2 * 3
    kd.distill(job)
    folders = {path.parent for path in (tmp_path / "out").rglob("artifact.json")} - {tmp_path / "out"}
    made = {str(folder.relative_to(tmp_path / "out")) for folder in folders if "step" in read_description(folder)}
    assert made == {cost.name for cost in plan}
    assert all(cost.is_done for cost in make_plan(job))
    more = [cost.name for cost in make_plan(dataclasses.replace(job, architectures=["tk"])) if not cost.is_done]
    assert len([name for name in more if name.startswith("students/tk/")]) == 2 * (2 + 1 + 1)
    assert more[-1] == "report" and not any("bert_dot" in name for name in more)


def test_plan_never_takes_a_step_of_other_inputs_for_done(make_job):
    kd.distill(make_job(architectures=["bert_dot"]))
    for change in ({"epochs": 2}, {"loss": "weighted_ranknet"}, {"max_document_length": 9}, {"k": 7}):
        plan = make_plan(make_job(architectures=["bert_dot"], **change))
        pending = [cost.name for cost in plan if not cost.is_done]
        assert any(name.startswith("students/bert_dot/teacher-") for name in pending), change
        assert all(cost.seconds > 0 for cost in plan if cost.name in pending)
    assert "bert_dot untrained" in " ".join(pending) and "judgments/test" not in pending
    plan = make_plan(make_job(architectures=["bert_dot"], data_name="Words"))
    assert [cost.name for cost in plan if not cost.is_done] == ["report"]
    context = Context(make_job(architectures=["bert_dot"]))
    context.device = "cpu:0"  # another name, as on a machine with a GPU
    plan = Plan(context)
    make_all(plan, context)
    assert [cost.name for cost in plan.costs if not cost.is_done] == ["timing", "report"]


def test_plan_is_a_table_with_its_sum():
    costs = [Cost("done", is_done=True), Cost("a", 400.0, 2.0**30, 2.0**30), Cost("b", 80.0, 0.0, 2.0**31)]
    lines = plan_text(costs).splitlines()
    assert lines[2:] == [
        "| done | done |  |  |",
        "| a | 7 min | 1.0 GiB | 1.0 GiB |",
        "| b | 80 s | 0 MiB | 2.0 GiB |",
        "| all | 8 min | 1.0 GiB | 2.0 GiB |",
    ]
    assert plan_text(costs[:1]).splitlines()[-1] == "| all | 0 s | 0 MiB | 0 MiB |"
