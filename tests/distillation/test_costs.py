"""The cost of a job before it starts."""

import dataclasses
import os
import signal

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.artifacts import read_description
from hf_kd_ranking.distillation import costs as costs_module
from hf_kd_ranking.distillation.context import Context
from hf_kd_ranking.distillation.costs import BM25_BYTES, Bm25Probe, Cost, Plan, plan_text
from hf_kd_ranking.distillation.pipeline import make_all, make_plan
from hf_kd_ranking.distillation.work import Workspace

DELIVERY = "vectors"  # of the chosen ranker, which is not known before


def pending(plan: list[Cost]) -> list[str]:
    return [cost.name for cost in plan if not cost.is_done and cost.name != DELIVERY]


def test_plan_walks_the_steps_of_the_job_and_knows_what_is_done(make_job, trainings, tmp_path):
    options = {"architectures": ["bert_dot"], "seeds": 2, "overrides": {"bert_dot": {"learning_rates": [1e-3, 1e-2]}}}
    job = make_job(**options)
    plan = make_plan(job)
    assert not any(cost.is_done for cost in plan) and all(cost.seconds > 0 for cost in plan)
    assert not trainings and not (tmp_path / "out").exists()
    trained = [cost.name for cost in plan if "/rate-" in cost.name or "/seed-" in cost.name]
    assert len(trained) == 2 * (2 + 1)
    kd.distill(job)
    folders = {path.parent for path in (tmp_path / "out").rglob("artifact.json")} - {tmp_path / "out"}
    made = {str(folder.relative_to(tmp_path / "out")) for folder in folders if "step" in read_description(folder)}
    assert made - {DELIVERY} == {cost.name for cost in plan} - {DELIVERY}
    assert pending(make_plan(job)) == []
    # A step of other inputs is never taken for done, and only what reads an option is repeated.
    changes = [{"epochs": 2}, {"loss": "weighted_ranknet"}, {"max_document_length": 9}, {"lists_per_query": 2}]
    for change in changes:
        names = pending(make_plan(make_job(**options | change)))
        assert "students/bert_dot teacher/rate-0.001" in names and "teacher_scores/teacher/train" not in names, change
    names = pending(make_plan(make_job(**options | {"k": 7})))
    assert "bm25_search/test" in names and "judgments/test" not in names and "bm25_search/train" not in names
    assert pending(make_plan(make_job(**options | {"data_name": "Words"})))[-1] == "report"
    assert pending(make_plan(make_job(**options | {"budget_ms": 5.0}))) == ["report"]
    names = pending(make_plan(dataclasses.replace(job, architectures=["tk"])))
    assert len([name for name in names if name.startswith("students/tk ")]) == 2 * (2 + 1 + 1)
    assert names[-1] == "report" and not any("bert_dot" in name for name in names)
    context = Context(job)
    context.device = "cpu:0"  # another name, as on a machine with a GPU: only latencies are measured again
    plan = Plan(context)
    make_all(plan, context)
    assert pending(plan.costs) == ["timing", "points", "report"]


def test_search_grows_with_queries_and_passages(make_job, monkeypatch):
    monkeypatch.setattr(costs_module, "_probe_bm25", lambda context: Bm25Probe(0.001, 0.05, 0.0001))
    context = Context(make_job())
    plan = Plan(context)
    plan._passages = 1_000
    texts = context.texts("train")
    build, search = plan._index_collection(None, context), plan._search_bm25(None, texts, 8, False)
    assert build == (pytest.approx(1.0), 1_000_000, BM25_BYTES * 1_000)
    assert search[0] == pytest.approx(len(texts) * (0.05 + 0.0001 * 1_000))
    plan._passages = 2_000
    assert plan._search_bm25(None, texts, 8, False)[0] == pytest.approx(len(texts) * (0.05 + 0.0001 * 2_000))


def test_training_that_may_stop_early_is_planned(make_job):
    plan = make_plan(make_job(architectures=["bert_dot"], evaluations=2, patience=1))
    assert all(cost.seconds > 0 for cost in plan)


def test_output_of_another_collection_is_kept(make_job, tmp_path, out):
    Workspace(out).claim({"collection": tmp_path / "collection.tsv", "queries": tmp_path / "queries.tsv"})
    (tmp_path / "collection.tsv").write_text("d0\tapple\n")
    for run in (kd.distill, make_plan):
        with pytest.raises(ValueError, match="out was made from another collection; give another output folder"):
            run(make_job())


def test_files_that_no_step_wrote_are_kept(make_job, out):
    (out / "bm25").mkdir(parents=True)
    (out / "bm25/notes.txt").write_text("mine")
    for run in (make_plan, kd.distill):
        with pytest.raises(FileExistsError, match="out/bm25 contains files that no step wrote"):
            run(make_job())
    assert (out / "bm25/notes.txt").read_text() == "mine"


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


def test_termination_while_the_plan_probes_ends_at_once_and_writes_nothing(make_job, out, monkeypatch):
    monkeypatch.setattr(costs_module, "_probe_bm25", lambda context: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="Stopped by SIGTERM"):
        make_plan(make_job(architectures=["bert_dot"]))
    assert not out.exists()


def test_a_probe_counts_the_faster_of_two_calls_after_the_first(make_job, monkeypatch):
    clock, lasted = [0.0], [1.0, 5.0, 3.0]
    monkeypatch.setattr(costs_module.time, "perf_counter", lambda: clock[0])
    given = []

    def call(queries: list[str], passages: list[str]) -> None:
        given.append((len(queries), passages))
        clock[0] += lasted[len(given) - 1]

    assert costs_module._seconds_per_text(call, Context(make_job())) == 3.0 / costs_module.SCORED_PAIRS
    assert [count for count, _ in given] == [costs_module.SCORED_PAIRS] * 3
