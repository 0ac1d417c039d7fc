"""The trainings: rates, seeds, trained teachers, scales."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.artifacts import file_digest
from hf_kd_ranking.distillation import steps
from hf_kd_ranking.distillation.context import Context
from hf_kd_ranking.distillation.pipeline import prepare
from hf_kd_ranking.distillation.steps import rows_file
from hf_kd_ranking.distillation.students import Recipe, teacher_scale, training_arguments
from hf_kd_ranking.distillation.work import Workspace


def dev_value(folder: Path) -> float:
    return json.loads((folder / "ranker/results.json").read_text())["after"]["eval_RR@10"]


def manifest(ranker: str | Path) -> dict:
    return json.loads(Path(ranker, "manifest.json").read_text())


def test_rate_is_chosen_on_dev_and_seeds_are_other_students(make_job, trainings, out, stores):
    outcome = kd.distill(make_job(architectures=["bert_dot"], learning_rates=[1e-2, 1e-9], seeds=2))
    assert len(trainings) == 2 * (2 + 1)
    qrels = kd.read_qrels(out / "judgments/test/qrels.txt")
    evaluate = kd.RerankingEvaluator(kd.read_run(out / "candidates/test/run.trec"), qrels, *stores, ("RR@10",))
    for condition, loss in (("no_teacher", "ranknet"), ("teacher", "margin_mse")):
        name, folder = f"bert_dot {condition}", out / "students/bert_dot" / f"{condition}-{loss}"
        values = {rate: dev_value(folder / f"rate-{rate}") for rate in ("0.01", "1e-09")}
        assert len(set(values.values())) == 2, "the test could not tell the rates apart"
        best = max(values, key=values.get)
        assert outcome["folders"][name] == str(folder / f"rate-{best}" / "ranker")
        assert (outcome["dev"][name], outcome["rates"][name]) == (values[best], float(best))
        rankers = [kd.Ranker.from_pretrained(folder / part / "ranker") for part in ("chosen", "seed-1")]
        first, second = (next(ranker.model.parameters()) for ranker in rankers)
        assert not torch.equal(first, second)
        means = [evaluate(ranker)["RR@10"] for ranker in rankers]
        assert outcome["test"][name] == pytest.approx(sum(means) / 2)


def test_teacher_is_trained_on_the_labels_of_the_same_triples(make_job, trainings, out, stores, pair_scores):
    special = {"teacher": {"learning_rates": [1e-3, 1e-9], "epochs": 2}}
    special["bert_dot"] = {"layers": [0], "pooling": "mean"}
    conditions = ["no_teacher", "first_teacher", "teacher"]
    job = make_job(architectures=["bert_dot"], overrides=special, conditions=conditions)
    job.teachers.insert(0, "bert_cat")
    outcome = kd.distill(job)
    taught = [out / "teachers/bert_cat" / name for name in ("rate-0.001", "rate-1e-09")]
    assert trainings[:2] == [str(folder / "ranker") for folder in taught] and len(trainings) == 2 + 3
    labels = manifest(outcome["folders"]["bert_dot no_teacher"])["files"]["teacher_scores"]
    assert [manifest(folder / "ranker")["files"]["teacher_scores"] for folder in taught] == [labels, labels]
    best = kd.Ranker.from_pretrained(max(taught, key=dev_value) / "ranker")
    rows = kd.load_teacher_scores(out / "scores/bert_cat/rows.tsv").rows
    positives = [doc_ids[0] for doc_ids in rows["doc_ids"]]
    expected = best.score(stores[0][rows["query_id"]], stores[1][positives])
    scores = {name: pair_scores(out / "scores" / name / "rows.tsv")[0] for name in ("bert_cat", "mean")}
    assert scores["bert_cat"] == pytest.approx(expected.tolist(), abs=1e-4) and scores["bert_cat"] != scores["mean"]
    for condition, name in (("first_teacher", "bert_cat"), ("teacher", "mean")):
        files = manifest(outcome["folders"][f"bert_dot {condition}"])["files"]
        assert files["teacher_scores"]["sha256"] == file_digest(out / "scores" / name / "rows.tsv")
    assert {"teacher", "teacher bert_cat", "teacher teacher"} < outcome["test"].keys()
    # The teacher has the whole encoder and its own epochs, the student its own settings.
    models = [kd.load_ranker(path) for path in (taught[0] / "ranker", outcome["folders"]["bert_dot teacher"])]
    assert [model.config.encoder_config.num_hidden_layers for model in models] == [2, 1]
    state = json.loads((taught[0] / "ranker/trainer_state.json").read_text())
    assert state["epoch"] == 2 and models[1].config.pooling == "mean"
    tests = {(test["control"], test["treatment"]) for test in outcome["tests"]}
    assert tests == {("bert_dot no_teacher", f"bert_dot {condition}") for condition in conditions[1:]}
    card = Path(outcome["folders"]["bert_dot first_teacher"], "README.md").read_text()
    assert "a bert_cat trained on the labels of the triples" in card


def test_other_teachers_and_judgments_repeat_only_what_reads_them(make_job, trainings, tmp_path, monkeypatch):
    lines = (tmp_path / "qrels.txt").read_text().splitlines(keepends=True)
    (tmp_path / "test.txt").write_text("".join(lines[45:]))
    job = make_job(architectures=["bert_dot"], test_qrels=str(tmp_path / "test.txt"), retrieve=False)
    scored, score = [], steps.score_teacher

    def noted(*arguments):
        scored.append(str(arguments[-1]))
        return score(*arguments)

    monkeypatch.setattr(steps, "score_teacher", noted)
    first = kd.distill(job)
    (tmp_path / "test.txt").write_text("".join([*lines[46:], "q45 0 d3 1\n"]))
    second = kd.distill(job)
    assert len(trainings) == 2 and second["test"] != first["test"]
    kd.Ranker.from_pretrained(tmp_path / "teacher").save_pretrained(tmp_path / "more")
    kd.distill(dataclasses.replace(job, teachers=["bert_cat", *job.teachers], overrides={"teacher": {"epochs": 2}}))
    assert sum("/scores/teacher/" in path for path in scored) == 1  # the first teacher scored the triples once
    assert len(trainings) == 2 + 1 + 1  # the new teacher, and the student of both


def test_products_match_their_scale_and_layers_get_one(make_job, tmp_path, pair_scores):
    job = make_job()
    context = Context(job)
    material = prepare(Workspace(Path(job.output)), context)
    rows = rows_file(material.scores["teacher"])
    scales = {}
    for name in ("bert_cat", "bert_dot", "colbert", "prettr", "tk"):
        scales[name] = teacher_scale(Recipe.of_job(job, name, "teacher"), rows)
        assert teacher_scale(Recipe.of_job(job, name, "no_teacher"), rows) == "1"
    positives, negatives = (np.array(scores) for scores in pair_scores(rows))
    assert scales["bert_dot"] == scales["colbert"] == "match" and len(set(scales.values())) == 2
    spread = np.sqrt(np.mean((float(scales["prettr"]) * (positives - negatives)) ** 2))
    assert spread == pytest.approx(1.5, rel=1e-4)
    args = training_arguments(Recipe.of_job(job, "tk", "teacher"), 1e-3, "0.5", context, tmp_path / "x")
    assert (args.teacher_scale, args.teacher_name, args.base_model) == ("0.5", "teacher", None)


@pytest.mark.parametrize("bf16", [False, True])
def test_trainings_have_the_precision_of_the_job(make_job, bf16):
    outcome = kd.distill(make_job(architectures=["bert_dot"], conditions=["teacher"], bf16=bf16))
    assert manifest(outcome["ranker"])["settings"]["bf16"] is bf16
