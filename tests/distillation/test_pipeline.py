"""The whole job: from a collection and a teacher to a pipeline within a budget, again and after interruptions."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.artifacts import locked
from hf_kd_ranking.distillation import candidates, pipeline, points, students, teaching
from hf_kd_ranking.distillation.wording import outcome_text

ONE = {"architectures": ["bert_dot"]}


def test_job_splits_teaches_ranks_and_delivers(make_job, trainings, tmp_path, out, stores):
    job = make_job()
    outcome = kd.distill(job)
    assert len(trainings) == 4  # two architectures with and without the teacher
    trained = {f"{name} {condition}" for name in ("bert_dot", "colbert") for condition in ("no_teacher", "teacher")}
    assert {"BM25", "teacher", "bert_dot untrained", "colbert untrained", *trained} <= outcome["test"].keys()
    assert outcome["folders"].keys() == {"bert_dot untrained", "colbert untrained", *trained}
    assert outcome["chosen"] in outcome["test"] and outcome["measure"] == "RR@10"
    assert outcome["dev"][outcome["chosen"]] == max(outcome["dev"].values())
    assert all(name in Path(outcome["page"]).read_text() for name in trained)
    qrels = kd.read_qrels(out / "judgments/test/qrels.txt")
    for name, value in outcome["test"].items():
        run = kd.read_run(out / "report/runs" / f"{name}.trec")
        assert kd.evaluate_run(run, qrels, ("RR@10",))["RR@10"] == pytest.approx(value)
    splits = [set(kd.read_qrels(out / "judgments" / split / "qrels.txt")) for split in ("train", "dev", "test")]
    assert sum(map(len, splits)) == len(set().union(*splits)) == 60
    assert min(map(len, splits)) >= 8  # held out is half, of which dev and test have a half each
    rows = kd.load_teacher_scores(out / "lists/teacher/rows.jsonl").rows
    teacher = kd.Ranker.from_pretrained(tmp_path / "teacher")
    for row in rows:
        assert row["query_id"] in splits[0] and row["doc_ids"][0] == row["query_id"].replace("q", "d")
        expected = teacher.score(stores[0][row["query_id"]], stores[1][row["doc_ids"]])
        assert row["teacher_scores"] == pytest.approx(expected.tolist(), abs=1e-4)
    labels = kd.load_teacher_scores(out / "lists/no_teacher/rows.jsonl").rows
    assert {tuple(scores) for scores in labels["teacher_scores"]} <= {
        (1.0, 0.0),
        (1.0, 0.0, 0.0),
        (1.0, 0.0, 0.0, 0.0),
    }
    assert outcome["lists"] == {"no_teacher": len(labels), "teacher": len(rows)}


def test_delivered_pipeline_returns_what_was_measured(make_job, trainings, out, stores):
    for purpose in ("rerank", "search"):
        job = make_job(**ONE, purpose=purpose, output=str(out) + purpose)
        outcome = kd.distill(job)
        pipeline = kd.load_pipeline(outcome["folder"])
        qrels = kd.read_qrels(Path(job.output) / "judgments/test/qrels.txt")
        queries = {query_id: stores[0][query_id] for query_id in qrels}
        run = pipeline.search_run(queries, k=8)
        value = kd.evaluate_run(run, qrels, ("RR@10",))["RR@10"]
        assert value == pytest.approx(outcome["test"][outcome["chosen"]])
        first, text = next(iter(queries.items()))
        assert [doc_id for doc_id, _ in pipeline.search(text, k=3)] == [doc_id for doc_id, _ in run[first][:3]]


def test_pipeline_of_the_users_engine_ranks_the_candidates_that_it_is_given(
    make_job, trainings, tmp_path, out, stores
):
    kd.write_run(kd.BM25Index.build(stores[1]).search(dict(stores[0].items()), 8), tmp_path / "engine.trec")
    reverse = kd.Run()
    for query_id, found in kd.read_run(tmp_path / "engine.trec").items():  # worse than any other order
        reverse[query_id] = [(doc_id, float(place)) for place, (doc_id, _) in enumerate(found)][::-1]
    kd.write_run(reverse, tmp_path / "engine.trec")
    outcome = kd.distill(make_job(**ONE, candidates=str(tmp_path / "engine.trec"), conditions=["teacher"]))
    assert {"candidates", "BM25", "bert_dot teacher + candidates"} <= outcome["test"].keys()
    assert outcome["chosen"] == "BM25" or "engine, whose time is not included" in outcome["verdict"]
    system = outcome["pipeline"]["system"]
    if system is not None:
        pipeline = kd.load_pipeline(outcome["folder"])
        queries = {query_id: stores[0][query_id] for query_id in kd.read_qrels(out / "judgments/test/qrels.txt")}
        run = pipeline.rerank(kd.Run({query_id: reverse[query_id] for query_id in queries}), queries)
        value = kd.evaluate_run(run, kd.read_qrels(out / "judgments/test/qrels.txt"), ("RR@10",))["RR@10"]
        assert value == pytest.approx(outcome["test"][outcome["chosen"]])
        with pytest.raises(ValueError, match="no first stage"):
            pipeline.search("apple")


def test_job_without_training_labels_learns_from_all_queries(make_job, trainings, tmp_path, out):
    lines = (tmp_path / "qrels.txt").read_text().splitlines(keepends=True)
    for name, part in (("dev", lines[:10]), ("test", lines[10:25])):
        (tmp_path / f"{name}.txt").write_text("".join(part))
    judged = {"qrels": None, "dev_qrels": str(tmp_path / "dev.txt"), "test_qrels": str(tmp_path / "test.txt")}
    outcome = kd.distill(make_job(**ONE, **judged))
    assert outcome["queries"] == {"train": 35, "dev": 10, "test": 15}
    assert len(trainings) == 1 and "/bert_dot teacher/" in trainings[0]  # no labels, so no student without a teacher
    rows = kd.load_teacher_scores(out / "lists/teacher/rows.jsonl").rows
    scored = kd.read_run(out / "teacher_scores/teacher/train/run.trec")
    assert len(rows) > 20
    for row in rows:  # the teacher's best candidate is the positive
        assert row["doc_ids"][0] == scored[row["query_id"]][0][0]
        assert row["query_id"] in {f"q{i}" for i in range(25, 60)}
    with pytest.raises(ValueError, match="condition no_teacher needs judgments of training queries"):
        kd.distill(make_job(**ONE, **judged, conditions=["no_teacher"]))


def test_ranker_that_is_worse_than_the_first_stage_on_dev_is_not_chosen(make_job, trainings, out):
    outcome = kd.distill(make_job(**ONE, fusion=False, learning_rates=[1e-9]))
    assert outcome["dev"]["BM25"] > max(outcome["dev"][name] for name in outcome["folders"])  # weights are random
    assert (outcome["chosen"], outcome["ranker"]) == ("BM25", None)
    assert "so it is delivered without one" in outcome["verdict"]
    assert kd.load_pipeline(out / "best").ranker is None


def test_chosen_ranker_is_the_best_seed_on_dev(make_job, trainings, out):
    job = make_job(**ONE, seeds=2, conditions=["teacher"], fusion=False)
    outcome = kd.distill(job)
    found = json.loads((out / "points/points.json").read_text())
    values = found["seeds"]["bert_dot teacher"]
    of_student = [point for point in found["points"] if point["system"] == "bert_dot teacher"]
    point = next(point for point in of_student if point["depth"] == job.k)
    assert point["seed"] == values.index(max(values)) and point["dev"] == max(values)
    assert len(outcome["seeds"]["bert_dot teacher"]) == 2
    mean = sum(outcome["seeds"]["bert_dot teacher"]) / 2
    assert outcome["test"]["bert_dot teacher"] == pytest.approx(mean)


def test_all_tests_are_one_family(make_job, trainings):
    job = make_job()
    outcome = kd.distill(job)
    pairs = {(test["treatment"], test["control"]) for test in outcome["tests"]}
    assert {(f"{name} teacher", f"{name} no_teacher") for name in ("bert_dot", "colbert")} <= pairs
    chosen = {control for treatment, control in pairs if treatment == outcome["chosen"]}
    assert "BM25" in chosen or outcome["chosen"] == "BM25"
    p_values = sorted(test["p_value"] for test in outcome["tests"])
    smallest = min(outcome["tests"], key=lambda test: test["p_value"])
    assert smallest["p_corrected"] == pytest.approx(min(1, p_values[0] * len(p_values)))
    text = outcome_text(outcome, job)
    assert f"Holm over the {len(pairs)} tests of this job" in text and outcome["verdict"] in text


def test_second_round_learns_from_what_the_best_student_finds(make_job, trainings, out):
    outcome = kd.distill(make_job(**ONE, rounds=2, conditions=["teacher"]))
    assert len(trainings) == 2 and {"bert_dot teacher", "bert_dot teacher round 2"} <= outcome["test"].keys()
    first, mined = (kd.read_run(out / name / "run.trec") for name in ("candidates/train", "round_2/candidates"))
    assert any(dict(mined[query_id]).keys() - dict(first[query_id]).keys() for query_id in first)
    tests = {(test["treatment"], test["control"]) for test in outcome["tests"]}
    assert ("bert_dot teacher round 2", "bert_dot teacher") in tests


def test_steps_run_again_only_where_their_inputs_change(make_job, trainings, tmp_path, out):
    outcome = kd.distill(make_job(**ONE))
    again = kd.distill(make_job(**ONE))
    assert (again, len(trainings)) == (outcome, 2)
    more = kd.distill(make_job(architectures=["bert_dot", "tk"], overrides={"tk": {"learning_rates": [1e-3]}}))
    assert len(trainings) == 4 and all("/tk " in folder for folder in trainings[2:])
    assert {name: more["test"][name] for name in outcome["folders"]} == {
        name: outcome["test"][name] for name in outcome["folders"]
    }
    # A note beside a teacher changes nothing; another teacher under the same name is another teacher.
    (tmp_path / "teacher/notes.txt").write_text("mine")
    kd.distill(make_job(**ONE))
    assert len(trainings) == 4
    before = (out / "lists/teacher/rows.jsonl").read_text()
    other = kd.load_ranker(tmp_path / "teacher")
    torch.nn.init.normal_(other._classification_layer.weight)
    other.save_pretrained(tmp_path / "teacher")
    kd.distill(make_job(**ONE))
    assert len(trainings) == 5 and "bert_dot teacher" in trainings[-1]  # labels alone teach as before
    assert (out / "lists/teacher/rows.jsonl").read_text() != before


def test_interrupted_job_resumes_to_the_same_figures(make_job, trainings, monkeypatch):
    whole = kd.distill(make_job(**ONE))
    other = dataclasses.replace(make_job(**ONE), output=make_job().output + "2")
    stops = [(candidates.BM25Index, "search"), (teaching, "score_teacher"), (teaching, "sample_triples")]
    stops += [(students, "train_ranker"), (points, "rerank_run"), (points, "measure_efficiency")]
    for module, name in stops:
        function = getattr(module, name)

        def stop(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            kd.distill(other)
        monkeypatch.setattr(module, name, function)
    resumed = kd.distill(other)
    for name in whole["folders"]:
        assert resumed["test"][name] == whole["test"][name] and resumed["dev"][name] == whole["dev"][name]
    assert len(trainings) == 4


def test_finished_output_can_be_moved(make_job, trainings, tmp_path, out):
    outcome = kd.distill(make_job(**ONE))
    out.rename(tmp_path / "moved")
    moved = kd.distill(dataclasses.replace(make_job(**ONE), output=str(tmp_path / "moved")))
    assert (moved["test"], len(trainings)) == (outcome["test"], 2)
    assert moved["folder"] == str(tmp_path / "moved/best")
    assert "/moved/" in moved["folders"]["bert_dot teacher"]


def test_verb_prints_the_verdict_and_json(call, make_job, trainings, tmp_path, out):
    job = make_job(**ONE)
    files = f"--collection {job.collection} --queries {job.queries} --qrels {job.qrels} --output {job.output}"
    numbers = "--k 8 --candidate-depth 8 --candidates-per-query 8 --held-out 0.5 --learning-rates 0.001 --batch-size 8"
    numbers += " --max-query-length 8 --max-document-length 16 --measure RR@10 --force"
    settings = """--architectures bert_dot --overrides {"bert_dot":{"pooling":"mean"}}"""
    plain = f"distill {files} --teacher {job.teachers[0]} --model {job.model_name} {numbers}"
    status, printed, error = call(f"{plain} {settings} --budget-ms 60000")
    assert status == 0, error
    assert "| bert_dot teacher | " in printed and "Chosen on dev within 60000 ms per query: " in printed
    status, printed, error = call(f"{plain} {settings} --json")
    outcome = json.loads(printed.splitlines()[-1])
    assert {"chosen", "ranker", "measure", "test", "tests", "latency_ms"} <= outcome.keys()
    assert kd.load_ranker(outcome["folders"]["bert_dot teacher"]).config.pooling == "mean"
    status, _, error = call(f"{plain} {settings} --budget-ms 0.00001")
    assert (status, "No pipeline is within 1e-05 ms" in error) == (1, True)
    status, _, error = call(f"{plain.replace(' --force', '')} {settings}")
    assert (status, "The teacher ranks the" in error, "no better than" in error) == (1, True, True)
    assert len(trainings) == 2  # the later calls repeated nothing
    status, printed, error = call(f"{plain} {settings} --plan-only")
    assert (status, printed.splitlines()[2]) == (0, "| bm25 | done |  |  |")
    (tmp_path / "job.yaml").write_text("architectures: [bert_dot]\noverrides: {bert_dot: {pooling: mean}}\n")
    status, printed, error = call(f"{plain} --config {tmp_path / 'job.yaml'}")
    assert (status, "| bert_dot teacher | " in printed, len(trainings)) == (0, True, 2)
    status, _, error = call(f"{plain} --overrides {{bert_dot")
    assert (status, "overrides is not valid JSON" in error) == (2, True)


def test_second_job_in_one_output_is_refused(make_job, out, trainings):
    with locked(out), pytest.raises(ValueError, match="out is in use by process"):
        kd.distill(make_job())
    assert trainings == []


def test_termination_ends_at_once_and_says_how_to_go_on(make_job, monkeypatch):
    previous = signal.getsignal(signal.SIGTERM)

    def terminate(job):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    monkeypatch.setattr(pipeline, "Context", terminate)
    for run in (kd.distill, pipeline.make_plan):
        with pytest.raises(SystemExit, match="Stopped by SIGTERM; the same command resumes"):
            run(make_job())
    assert signal.getsignal(signal.SIGTERM) is previous
