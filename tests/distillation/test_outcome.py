"""The test of the choice, in figures."""

import json
from types import SimpleNamespace

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.distillation import outcome as outcome_module
from hf_kd_ranking.distillation.outcome import Measured, write_outcome
from hf_kd_ranking.distillation.points import Point, System

QUERIES = [f"q{i}" for i in range(12)]


def ranked_at(ranks: list[int]) -> kd.Run:
    """A run that puts the relevant document y of each query at a rank; 0 ranks nothing for the query."""
    run = kd.Run()
    for query_id, rank in zip(QUERIES, ranks, strict=True):
        doc_ids = ["x", "z", "v"]
        doc_ids.insert(rank - 1, "y")
        if rank:
            run[query_id] = [(doc_id, -float(place)) for place, doc_id in enumerate(doc_ids)]
    return run


@pytest.fixture
def write(make_artifact, monkeypatch):
    """write(points, runs of the test queries): the outcome, and what the report was given.

    `runs` are name -> its runs, one per seed.
    """

    def run(found: list[Point], runs: dict[str, list[kd.Run]], budget_ms: float | None = None) -> dict:
        reports = []

        def report(folder, output, measures, arrows, **options):
            names = sorted(path.stem for path in (folder / "runs").iterdir())
            about = {name: options[name] for name in ("title", "findings", "summary")}
            about["timed"] = sorted(json.loads((folder / "efficiency.json").read_text())["rankers"])
            reports.append({"arrows": arrows, "names": names, **about})

        monkeypatch.setattr(outcome_module, "write_report", report)
        monkeypatch.setattr("hf_kd_ranking.reporting.plot.save_plot", lambda figure, path: None)
        rankings = {}
        for name, of_name in runs.items():
            rankings[name] = [make_artifact(f"{name} {seed}", each) for seed, each in enumerate(of_name)]
        first_stages = {name: rankings.pop(name)[0] for name in ("candidates", "BM25") if name in rankings}
        teachers = {name: rankings.pop(name)[0] for name in ("teacher",) if name in rankings}
        systems = []
        for name, artifacts in rankings.items():
            (artifacts[0].path / "choice.json").write_text('{"learning_rate": 0.001}')
            students = []
            for artifact in artifacts:
                students.append(SimpleNamespace(training=artifact, checkpoint=artifact.path / "ranker"))
            control = "dot no_teacher" if name == "dot teacher" else None
            is_trained = not name.endswith("untrained")
            systems.append(System(name, tuple(students), "dot", is_trained=is_trained, control=control))
        timing, made, folder = make_artifact("timing"), make_artifact("points"), make_artifact("report")
        costs = {"first_stages": {"BM25": {"total_ms": {"p50": 1.0}}}, "rankers": {}}
        costs["rankers"] = {name: {"total_ms": {"p50": 9.0, "p95": 9.0}} for name in runs if name != "BM25"}
        (timing.path / "efficiency.json").write_text(json.dumps(costs))
        content = {"points": [vars(point) for point in found]}
        (made.path / "points.json").write_text(json.dumps(content))
        judgments = make_artifact("judgments", qrels={query_id: {"y": 1} for query_id in QUERIES})
        settings = {"measure": "RR@10", "k": 4, "purpose": "rerank", "budget_ms": budget_ms, "data_name": "Words"}
        job = SimpleNamespace(queries="queries.tsv", collection="collection.tsv", candidates=None)
        job.measure, job.budget_ms = "RR@10", budget_ms
        job.synthetic_splits = job.agreement_splits = []
        context = SimpleNamespace(job=job, splits={"dev": QUERIES, "test": QUERIES}, overlaps={})
        measured = Measured(systems, first_stages, teachers, rankings, judgments, made, timing, settings)
        write_outcome(folder.path, measured, context)
        return json.loads((folder.path / "outcome.json").read_text()) | {"report": reports[0]}

    return run


def point(system: str, dev: float, seed: int = 0, weight: float = 0.0, latency_ms: float = 5.0) -> Point:
    name = None if system == "BM25" else system
    return Point("BM25", name, seed, 4, weight, "float32", dev, latency_ms)


def pairs(outcome: dict) -> set[tuple[str, str]]:
    return {(test["treatment"], test["control"]) for test in outcome["tests"]}


def test_choice_is_tested_against_what_a_user_has(write):
    found = [point("BM25", 0.3, latency_ms=1.0), point("dot untrained", 0.2), point("dot no_teacher", 0.5)]
    found += [point("dot teacher", 0.7), point("dot untrained", 0.4, weight=0.5)]
    found.append(point("dot teacher", 0.6, weight=0.5))
    runs = {"BM25": [ranked_at([2] * 12)], "teacher": [ranked_at([1] * 12)]}
    runs |= {"dot untrained": [ranked_at([4] * 12)], "dot no_teacher": [ranked_at([1, 2] * 6)]}
    runs["dot teacher"] = [ranked_at([1] * 11 + [2])]
    outcome = write(found, runs)
    assert outcome["chosen"] == "dot teacher"
    assert outcome["test"]["BM25"] == 0.5 and outcome["test"]["dot teacher"] == pytest.approx(11.5 / 12)
    assert pairs(outcome) == {
        ("dot teacher", "dot no_teacher"),
        ("dot teacher", "BM25"),
        ("dot teacher", "dot untrained"),
        ("dot teacher", "dot untrained + BM25"),
    }
    assert outcome["family"] == "Holm over the 4 tests of this job"
    tests = sorted(outcome["tests"], key=lambda test: test["p_value"])
    corrected = 0.0
    for place, test in enumerate(tests):
        corrected = max(corrected, min(1.0, test["p_value"] * (4 - place)))
        assert test["p_corrected"] == pytest.approx(corrected)
    assert outcome["frontier"] == [["BM25", 0.3, 1.0], ["dot teacher", 0.7, 5.0]]
    assert outcome["latency_ms"]["teacher"] == 1.0 + 9.0
    assert outcome["report"]["arrows"] == [("dot no_teacher", "dot teacher")]
    assert outcome["report"]["title"] == "Distillation on Words"
    findings = outcome["report"]["findings"]
    assert findings[0] == "All tests of the job are one family: Holm over the 4 tests of this job."
    assert len(findings) == 5 and findings[1].startswith("dot teacher against dot no_teacher: ")
    summary = outcome["report"]["summary"]
    assert len(summary) == 2 and summary[0].startswith("Chosen on dev: dot teacher") and "better than" in summary[1]


def test_budget_decides_the_choice(write):
    found = [point("BM25", 0.3, latency_ms=1.0), point("dot teacher", 0.7)]
    runs = {"BM25": [ranked_at([2] * 12)], "dot teacher": [ranked_at([1] * 12)]}
    assert write(found, runs, budget_ms=4.0)["chosen"] == "BM25"


def test_first_stage_that_is_chosen_is_not_tested_against_itself(write):
    found = [point("BM25", 0.9, latency_ms=1.0), point("dot untrained", 0.1), point("dot teacher", 0.2)]
    runs = {"BM25": [ranked_at([1] * 12)], "dot untrained": [ranked_at([4] * 12)]}
    runs["dot teacher"] = [ranked_at([1, 3] * 6)]
    outcome = write(found, runs)
    assert (outcome["chosen"], pairs(outcome)) == ("BM25", {("BM25", "dot untrained")})


def test_all_figures_of_several_seeds_are_means_and_each_is_shown(write):
    found = [point("BM25", 0.3, latency_ms=1.0), point("dot no_teacher", 0.4), point("dot teacher", 0.7, seed=1)]
    runs = {"BM25": [ranked_at([2] * 12)], "dot no_teacher": [ranked_at([2] * 12), ranked_at([4] * 12)]}
    runs["dot teacher"] = [ranked_at([2] * 12), ranked_at([1] * 11 + [4])]
    outcome = write(found, runs)
    second = (11 + 0.25) / 12
    assert outcome["seeds"]["dot teacher"] == pytest.approx([0.5, second])
    assert outcome["test"]["dot teacher"] == pytest.approx((0.5 + second) / 2)
    assert outcome["interval"]["mean"] == pytest.approx(outcome["test"]["dot teacher"])
    test = next(test for test in outcome["tests"] if test["control"] == "dot no_teacher")
    assert test["seeds"] == [2, 2]
    assert test["difference"] == pytest.approx(outcome["test"]["dot teacher"] - outcome["test"]["dot no_teacher"])
    names = [f"dot {condition}, seed {seed}" for condition in ("no_teacher", "teacher") for seed in (0, 1)]
    assert outcome["report"]["names"] == ["BM25", *names]
    assert [list(arrow) for arrow in outcome["report"]["arrows"]] == [names[::2], names[1::2]]


def test_sum_with_bm25_that_is_chosen_has_all_seeds(write):
    found = [point("BM25", 0.3, latency_ms=1.0), point("dot teacher", 0.5, 1), point("dot teacher", 0.7, 1, 0.1)]
    runs = {"BM25": [ranked_at([2] * 12)], "dot teacher": [ranked_at([2] * 12), ranked_at([1] * 12)]}
    outcome = write(found, runs)
    assert outcome["chosen"] == "dot teacher + BM25" and outcome["seeds"]["dot teacher + BM25"] == [0.5, 1.0]
    assert outcome["fused"] == {"dot teacher": 0.75}
    rankers = ["dot teacher + BM25", "dot teacher"]
    assert outcome["report"]["timed"] == [f"{name}, seed {seed}" for name in rankers for seed in (0, 1)]


def test_query_without_candidates_counts_as_zero_for_all(write):
    found = [point("BM25", 0.3, latency_ms=1.0), point("dot teacher", 0.7)]
    runs = {"BM25": [ranked_at([2] * 11 + [0])], "teacher": [ranked_at([1] * 11 + [0])]}
    runs["dot teacher"] = [ranked_at([1] * 11 + [0])]
    outcome = write(found, runs)
    assert outcome["test"] == pytest.approx({"BM25": 5.5 / 12, "teacher": 11 / 12, "dot teacher": 11 / 12})


def test_teacher_that_ranked_some_of_the_queries_is_not_compared(write):
    found = [point("BM25", 0.3, latency_ms=1.0), point("dot teacher", 0.7)]
    runs = {"BM25": [ranked_at([2] * 12)], "teacher": [ranked_at([1] * 6 + [0] * 6)]}
    runs["dot teacher"] = [ranked_at([1] * 12)]
    assert write(found, runs)["test"].keys() == {"BM25", "dot teacher"}
