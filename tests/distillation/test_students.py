"""The trainings: rates, seeds, trained teachers, scales."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.artifacts import file_digest
from hf_kd_ranking.distillation import stages, students


def test_the_rate_is_chosen_on_dev_and_every_seed_is_another_student(make_job, trainings, tmp_path):
    outcome = kd.distill(make_job(architectures=["bert_dot"], learning_rates=[1e-2, 1e-9], seeds=2))
    assert len(trainings) == 2 * (2 + 1)
    for name in ("no_teacher", "teacher"):
        found = {
            folder.parent.name: json.loads((folder / "results.json").read_text())["after"]["eval_RR@10"]
            for folder in (tmp_path / "out" / "students" / "bert_dot").glob(f"{name}-*seed0/ranker")
        }
        assert len(set(found.values())) == 2, "the test could not tell the rates apart"
        best = max(found, key=found.get)
        assert Path(outcome["folders"][f"bert_dot {name}"]).parent.name == best
        assert outcome["dev"][f"bert_dot {name}"] == found[best]
        seeds = [
            kd.load_ranker(tmp_path / "out/students/bert_dot" / best.replace("seed0", s) / "ranker")
            for s in ("seed0", "seed1")
        ]
        assert not torch.equal(*(next(model.parameters()) for model in seeds))
        qrels = kd.read_qrels(tmp_path / "out" / "triples" / "test.qrels.txt")
        first = kd.evaluate_run(kd.read_run(tmp_path / "out/report/runs" / f"bert_dot {name}.trec"), qrels, ("RR@10",))
        values = [first["RR@10"]]
        evaluate = kd.RerankingEvaluator(
            kd.read_run(tmp_path / "out" / "candidates" / "test.trec"),
            qrels,
            kd.TextStore.from_tsv(tmp_path / "queries.tsv"),
            kd.TextStore.from_tsv(tmp_path / "collection.tsv"),
            ("RR@10",),
        )
        values.append(
            evaluate(
                kd.Ranker.from_pretrained(
                    tmp_path / "out/students/bert_dot" / best.replace("seed0", "seed1") / "ranker"
                )
            )["RR@10"]
        )
        assert outcome["test"][f"bert_dot {name}"] == pytest.approx(sum(values) / 2)


def test_a_teacher_is_trained_on_the_labels_of_the_same_triples(make_job, trainings, tmp_path):
    special = {
        "teacher": {"learning_rates": [1e-3, 1e-9], "epochs": 2},
        "bert_dot": {"layers": [0], "pooling": "mean"},
    }
    conditions = ["no_teacher", "first_teacher", "teacher"]
    job = make_job(architectures=["bert_dot"], overrides=special, conditions=conditions)
    job.teachers.insert(0, "bert_cat")
    outcome = kd.distill(job)
    taught = [Path(folder).parent for folder in trainings[:2]]
    assert [folder.name for folder in taught] == ["bert_cat-0.001", "bert_cat-1e-09"] and len(trainings) == 2 + 3
    files = {folder: json.loads((folder / "ranker" / "manifest.json").read_text())["files"] for folder in taught}
    student = json.loads((Path(outcome["folders"]["bert_dot no_teacher"]) / "manifest.json").read_text())
    assert all(of["teacher_scores"] == student["files"]["teacher_scores"] for of in files.values())
    found = [json.loads((folder / "ranker" / "results.json").read_text())["after"]["eval_RR@10"] for folder in taught]
    best = kd.Ranker.from_pretrained(taught[found.index(max(found))] / "ranker")
    stores = kd.TextStore.from_tsv(tmp_path / "queries.tsv"), kd.TextStore.from_tsv(tmp_path / "collection.tsv")
    rows = kd.load_teacher_scores(tmp_path / "out" / "scores" / "bert_cat" / "rows.tsv")
    expected = best.score(stores[0][rows["query_id"]], stores[1][rows["pos_id"]])
    assert rows["pos_score"] == pytest.approx(expected.tolist(), abs=1e-4)
    scores = {
        name: kd.load_teacher_scores(tmp_path / "out" / "scores" / name / "rows.tsv")["pos_score"]
        for name in ("bert_cat", "mean")
    }
    for condition, name in (("first_teacher", "bert_cat"), ("teacher", "mean")):
        manifest = json.loads((Path(outcome["folders"][f"bert_dot {condition}"]) / "manifest.json").read_text())
        assert manifest["files"]["teacher_scores"]["sha256"] == file_digest(
            tmp_path / "out" / "scores" / name / "rows.tsv"
        )
    assert scores["bert_cat"] != scores["mean"]
    assert {"teacher", "teacher bert_cat", "teacher teacher"} < outcome["test"].keys()
    # The teacher has the whole encoder and its own epochs, the student what is said of it.
    models = [kd.load_ranker(path) for path in (taught[0] / "ranker", outcome["folders"]["bert_dot teacher"])]
    assert [model.config.encoder_config.num_hidden_layers for model in models] == [2, 1]
    state = json.loads((taught[0] / "ranker" / "trainer_state.json").read_text())
    assert state["epoch"] == 2 and models[1].config.pooling == "mean"
    assert {(test["control"], test["treatment"]) for test in outcome["tests"]} == {
        ("bert_dot no_teacher", f"bert_dot {condition}") for condition in conditions[1:]
    }
    card = (Path(outcome["folders"]["bert_dot first_teacher"]) / "README.md").read_text()
    assert "a bert_cat trained on the labels of the triples" in card


def test_more_teachers_and_other_test_judgments_repeat_only_what_reads_them(
    make_job, trainings, tmp_path, monkeypatch
):
    lines = (tmp_path / "qrels.txt").read_text().splitlines(keepends=True)
    (tmp_path / "test.txt").write_text("".join(lines[45:]))
    job = make_job(architectures=["bert_dot"], test_qrels=str(tmp_path / "test.txt"), retrieve=False)
    scored, score = [], stages.score_teacher
    monkeypatch.setattr(stages, "score_teacher", lambda *a: (scored.append(str(a[-1])), score(*a))[1])
    first = kd.distill(job)
    (tmp_path / "test.txt").write_text("".join([*lines[46:], "q45 0 d3 1\n"]))
    second = kd.distill(job)
    assert len(trainings) == 2 and second["test"] != first["test"]
    kd.Ranker.from_pretrained(tmp_path / "teacher").save_pretrained(tmp_path / "more")
    kd.distill(dataclasses.replace(job, teachers=["bert_cat", *job.teachers], overrides={"teacher": {"epochs": 2}}))
    assert sum("/scores/teacher/" in path for path in scored) == 1  # the triples by the first teacher, all the time
    assert len(trainings) == 2 + 1 + 1  # the new teacher, and the student of both


def test_products_keep_their_scale_and_fresh_heads_get_one(make_job, tmp_path):
    parts = students.Distillation(make_job())
    _ = parts.scores
    scales = {}
    for name in ("bert_cat", "bert_dot", "colbert", "prettr", "tk"):
        _, args = parts.training_of(name, "teacher", 1e-3, 0, tmp_path / "x")
        scales[name] = args.teacher_scale
        assert parts.training_of(name, "no_teacher", 1e-3, 0, tmp_path / "x")[1].teacher_scale == "1"
    rows = kd.load_teacher_scores(parts.scores_of("teacher"))
    margins = np.array(rows["pos_score"]) - np.array(rows["neg_score"])
    assert scales["bert_dot"] == scales["colbert"] == "match" and len(set(scales.values())) == 2
    assert np.sqrt(np.mean((float(scales["prettr"]) * margins) ** 2)) == pytest.approx(1.5, rel=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_trainings_are_of_the_precision_that_is_asked_for(make_job, bf16):
    outcome = kd.distill(make_job(architectures=["bert_dot"], conditions=["teacher"], bf16=bf16))
    manifest = json.loads((Path(outcome["ranker"]) / "manifest.json").read_text())
    assert manifest["settings"]["bf16"] is bf16
