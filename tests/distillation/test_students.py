"""The trainings: rates, seeds, trained teachers, layers, losses, scales."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig

import hf_kd_ranking as kd
from hf_kd_ranking.artifacts import file_digest
from hf_kd_ranking.distillation import outcome as outcome_module
from hf_kd_ranking.distillation import students, teaching
from hf_kd_ranking.distillation.context import Context
from hf_kd_ranking.distillation.job import ARCHITECTURE_SETTINGS
from hf_kd_ranking.distillation.students import (
    LIVE_LOSS,
    LOSS,
    Recipe,
    choose_rate,
    kept_layers,
    learning_rate,
    teacher_scale,
    training_arguments,
    untrained_ranker,
)

ONE = {"architectures": ["bert_dot"]}


def dev_value(folder: Path) -> float:
    return json.loads((folder / "ranker/results.json").read_text())["after"]["eval_RR@10"]


def manifest(ranker: str | Path) -> dict:
    return json.loads(Path(ranker, "manifest.json").read_text())


# ---- Recipes --------------------------------------------------------------------------------------------------------


def test_layers_are_spread_evenly_from_the_first_to_the_last(make_job, tmp_path):
    BertConfig(num_hidden_layers=6).save_pretrained(tmp_path / "six")
    job = make_job(model_name=str(tmp_path / "six"), layer_counts=[1, 2, 3, 6])
    assert kept_layers(job, "bert_dot") == {
        "bert_dot-1": [5],
        "bert_dot-2": [0, 5],
        "bert_dot-3": [0, 2, 5],
        "bert_dot-6": [0, 1, 2, 3, 4, 5],
    }
    assert kept_layers(job, "tk") == {"tk": None}  # has layers of its own
    assert kept_layers(make_job(), "bert_dot") == {"bert_dot": None}
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"between 1 and the encoder's 6 layers, got {count}"):
            kept_layers(dataclasses.replace(job, layer_counts=[count]), "bert_dot")


def test_student_has_the_layers_of_its_recipe(make_job):
    job = make_job(layer_counts=[1])
    (layers,) = kept_layers(job, "bert_dot").values()
    ranker = untrained_ranker(Recipe.of_job(job, "bert_dot", "teacher", layers=layers), Context(job))
    assert ranker.model.config.encoder_config.num_hidden_layers == 1


def test_loss_is_measured_best_for_the_teacher(make_job, tmp_path):
    job, live = make_job(), str(tmp_path / "live")

    def loss(architecture: str, condition: str, teacher: str | None) -> tuple[str, bool]:
        recipe = Recipe.of_job(job, architecture, condition, teacher)
        return recipe.loss, recipe.live_teacher is not None

    assert loss("bert_dot", "teacher", live) == (LIVE_LOSS, True)
    assert loss("bert_dot", "teacher", None) == (LOSS, False)
    assert loss("tk", "teacher", live) == (LIVE_LOSS, True)
    assert loss("bert_cat", "teacher", live) == (LOSS, False)  # reads both texts at once
    assert loss("prettr", "teacher", live) == (LOSS, False)  # reads them together in its upper layers
    assert loss("bert_dot", "no_teacher", live) == ("ranknet", False)
    penalty = ARCHITECTURE_SETTINGS["splade"]["regularization"]
    assert loss("splade", "no_teacher", None) == (f"ranknet,{penalty}", False)
    job.loss = "kl_div"
    assert loss("bert_dot", "teacher", live) == ("kl_div", False)
    assert loss("splade", "teacher", live) == (f"kl_div,{penalty}", False)
    job.loss = "kl_div,l1(query=1)"
    assert loss("splade", "teacher", live) == (job.loss, False)


def test_evaluations_and_patience_reach_the_training(make_job, tmp_path):
    job = make_job(evaluations=4, patience=2, epochs=1.5, data_name="Words", bf16=False)
    context = Context(job)
    args = training_arguments(Recipe.of_job(job, "tk", "teacher"), 1e-3, "0.5", context, tmp_path / "x")
    assert (args.eval_steps, args.save_steps, args.early_stopping_patience) == (0.25, 0.25, 2)
    assert (args.load_best_model_at_end, args.metric_for_best_model) == (True, "eval_RR@10")
    assert (args.teacher_scale, args.teacher_name, args.base_model) == ("0.5", "teacher", None)
    assert (args.data_name, args.seed, args.num_train_epochs) == ("Words", 42, 1.5)
    once = training_arguments(Recipe.of_job(make_job(), "tk", "teacher"), 1e-3, "1", context, tmp_path / "x")
    assert (once.eval_strategy, once.load_best_model_at_end) == ("no", False)
    each = Recipe.of_job(make_job(epochs=2), "tk", "teacher")  # every epoch by default
    assert training_arguments(each, 1e-3, "1", context, tmp_path / "x").eval_steps == 0.5


def test_scale_of_teachers_for_lists_of_any_length(make_job, tmp_path):
    rows = {"query_id": ["q0", "q1"], "doc_ids": [["d0", "d1"], ["d1", "d2", "d3"]]}
    rows["teacher_scores"] = [[3.0, 1.0], [5.0, 4.0, 2.0]]
    lines = [json.dumps(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    scales = {}
    for name in ("bert_cat", "bert_dot", "colbert", "prettr", "tk"):
        scales[name] = teacher_scale(Recipe.of_job(make_job(), name, "teacher"), tmp_path / "rows.jsonl")
        assert teacher_scale(Recipe.of_job(make_job(), name, "no_teacher"), tmp_path / "rows.jsonl") == "1"
    # The margins 2, 1 and 3 get the root mean square 1.5.
    expected = f"{1.5 / ((4 + 1 + 9) / 3) ** 0.5:.6g}"
    assert scales == dict.fromkeys(("bert_cat", "prettr", "tk"), expected) | dict.fromkeys(
        ("bert_dot", "colbert"), "match"
    )


def test_best_rate_is_linked(tmp_path, make_artifact):
    trained = [make_artifact(name) for name in ("low", "high", "middle")]
    for artifact, value in zip(trained, (0.2, 0.9, 0.5), strict=True):
        (artifact.path / "ranker").mkdir()
        (artifact.path / "ranker/results.json").write_text(json.dumps({"after": {"eval_RR@10": value}}))
    chosen = make_artifact("chosen")
    choose_rate(chosen.path, trained, [1e-5, 1e-4, 1e-3], "RR@10")
    assert learning_rate(chosen) == 1e-4 and learning_rate(1e-5) == 1e-5
    assert (chosen.path / "ranker").resolve() == (trained[1].path / "ranker").resolve()
    assert not (chosen.path / "ranker").readlink().is_absolute()  # the output can be moved


def test_stopped_training_says_how_to_go_on(make_job, tmp_path, make_artifact, monkeypatch):
    def stop(*_, **__):
        raise SystemExit("with --resume-from-checkpoint true")  # an option that `distill` does not have

    monkeypatch.setattr(students, "train_ranker", stop)
    monkeypatch.setattr(students, "training", lambda *_: (None, None))
    with pytest.raises(SystemExit, match=r"^Stopped by SIGTERM, .* checkpoint; the same command resumes\.$"):
        students.train_student(tmp_path, None, 1e-3, tmp_path / "x.tsv", None, None, SimpleNamespace())


# ---- Whole jobs -----------------------------------------------------------------------------------------------------


def test_rate_is_chosen_on_dev_and_seeds_are_other_students(make_job, trainings, out, stores):
    outcome = kd.distill(make_job(**ONE, learning_rates=[1e-2, 1e-9], seeds=2, fusion=False))
    assert len(trainings) == 2 * (2 + 1)
    qrels = kd.read_qrels(out / "judgments/test/qrels.txt")
    evaluate = kd.RerankingEvaluator(kd.read_run(out / "bm25_search/test/run.trec"), qrels, *stores, ("RR@10",))
    for condition in ("no_teacher", "teacher"):
        name, folder = f"bert_dot {condition}", out / f"students/bert_dot {condition}"
        values = {rate: dev_value(folder / f"rate-{rate}") for rate in ("0.01", "1e-09")}
        assert len(set(values.values())) == 2, "the test could not tell the rates apart"
        best = max(values, key=values.get)
        assert outcome["folders"][name] == str(folder / f"rate-{best}" / "ranker")
        assert outcome["rates"][name] == float(best)
        rankers = [kd.Ranker.from_pretrained(folder / part / "ranker") for part in ("chosen", "seed-1")]
        first, second = (next(ranker.model.parameters()) for ranker in rankers)
        assert not torch.equal(first, second)
        of_seeds = [evaluate(ranker)["RR@10"] for ranker in rankers]
        assert outcome["seeds"][name] == pytest.approx(of_seeds)
        assert outcome["test"][name] == pytest.approx(sum(of_seeds) / 2)


def test_teacher_is_trained_on_the_labels_of_the_same_lists(make_job, trainings, out, stores):
    special = {"teacher": {"learning_rates": [1e-3, 1e-9], "epochs": 2}}
    special["bert_dot"] = {"layers": [0], "pooling": "mean"}
    conditions = ["no_teacher", "first_teacher", "teacher"]
    job = make_job(**ONE, overrides=special, conditions=conditions)
    job.teachers.insert(0, "bert_cat")
    outcome = kd.distill(job)
    taught = [out / "teachers/bert_cat" / name for name in ("rate-0.001", "rate-1e-09")]
    assert trainings[:2] == [str(folder / "ranker") for folder in taught] and len(trainings) == 2 + 3
    labels = manifest(outcome["folders"]["bert_dot no_teacher"])["files"]["teacher_scores"]
    assert [manifest(folder / "ranker")["files"]["teacher_scores"] for folder in taught] == [labels, labels]
    best = kd.Ranker.from_pretrained(max(taught, key=dev_value) / "ranker")
    for row in list(kd.load_teacher_scores(out / "lists/first_teacher/rows.jsonl").rows)[:5]:
        expected = best.score(stores[0][row["query_id"]], stores[1][row["doc_ids"]])
        assert row["teacher_scores"] == pytest.approx(expected.tolist(), abs=1e-4)
    for condition in conditions:
        files = manifest(outcome["folders"][f"bert_dot {condition}"])["files"]
        assert files["teacher_scores"]["sha256"] == file_digest(out / "lists" / condition / "rows.jsonl")
    assert {"teacher", "teacher bert_cat", "teacher teacher"} < outcome["test"].keys()
    # The teacher has the whole encoder and its own epochs, the student its own settings.
    models = [kd.load_ranker(path) for path in (taught[0] / "ranker", outcome["folders"]["bert_dot teacher"])]
    assert [model.config.encoder_config.num_hidden_layers for model in models] == [2, 1]
    state = json.loads((taught[0] / "ranker/trainer_state.json").read_text())
    assert state["epoch"] == 2 and models[1].config.pooling == "mean"
    tests = {(test["control"], test["treatment"]) for test in outcome["tests"]}
    assert {("bert_dot no_teacher", f"bert_dot {condition}") for condition in conditions[1:]} <= tests
    card = Path(outcome["folders"]["bert_dot first_teacher"], "README.md").read_text()
    assert "Teacher: a bert_cat trained on the labels." in card


def test_other_teachers_and_judgments_repeat_only_what_reads_them(make_job, trainings, tmp_path, monkeypatch):
    lines = (tmp_path / "qrels.txt").read_text().splitlines(keepends=True)
    (tmp_path / "test.txt").write_text("".join(lines[45:]))
    job = make_job(**ONE, test_qrels=str(tmp_path / "test.txt"), store_vectors=False)
    scored, score = [], teaching.score_teacher

    def noted(*arguments):
        scored.append(str(arguments[-1]))
        return score(*arguments)

    monkeypatch.setattr(teaching, "score_teacher", noted)
    first = kd.distill(job)
    (tmp_path / "test.txt").write_text("".join([*lines[46:], "q45 0 d3 1\n"]))
    second = kd.distill(job)
    assert len(trainings) == 2 and second["test"] != first["test"]
    kd.Ranker.from_pretrained(tmp_path / "teacher").save_pretrained(tmp_path / "more")
    kd.distill(dataclasses.replace(job, teachers=["bm25", *job.teachers]))
    assert sum("/teacher_scores/teacher/train/" in path for path in scored) == 1  # the first teacher scored once
    assert len(trainings) == 2 + 1  # the student of both


def test_live_teacher_and_layers_train(make_job, trainings, tmp_path, encoder, tokenizer):
    model = kd.load_ranker(encoder, "bert_dot", max_query_length=8, max_document_length=16)
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "live")
    job = make_job(**ONE, teachers=[str(tmp_path / "live")], layer_counts=[1, 2], conditions=["teacher"])
    job = dataclasses.replace(job, evaluations=2, patience=1, store_vectors=False)
    outcome = kd.distill(job)
    names = ["bert_dot-1 teacher", "bert_dot-2 teacher"]
    assert len(trainings) == 2 and {*names, "bert_dot-1 untrained"} <= outcome["test"].keys()
    for name, layers in zip(names, (1, 2), strict=True):
        assert kd.load_ranker(outcome["folders"][name]).config.encoder_config.num_hidden_layers == layers
        assert manifest(outcome["folders"][name])["loss"] == LIVE_LOSS


def test_int8_graphs_are_candidates_of_the_choice(make_job, trainings, out, stores, monkeypatch):
    pytest.importorskip("onnxruntime")

    def choose_graph(found, budget_ms):
        return next(point for point in found if point.precision == "int8" and point.depth == 8)

    monkeypatch.setattr(outcome_module, "choose", choose_graph)
    options = {"precisions": ["float32", "int8"], "conditions": ["teacher"], "bf16": True, "fusion": False}
    outcome = kd.distill(make_job(architectures=["bert_cat"], **options))
    found = json.loads((out / "points/points.json").read_text())["points"]
    of_graph = [point for point in found if point["system"] == "bert_cat teacher int8"]
    assert {point["precision"] for point in of_graph} == {"int8"} and len(of_graph) == 2
    assert outcome["latency_ms"]["bert_cat teacher int8"] > 0 and "bert_cat teacher int8" in outcome["test"]
    assert manifest(outcome["folders"]["bert_cat teacher"])["settings"]["bf16"] is True
    assert (outcome["chosen"], outcome["pipeline"]["precision"]) == ("bert_cat teacher int8", "int8")
    qrels = kd.read_qrels(out / "judgments/test/qrels.txt")
    run = kd.load_pipeline(out / "best").search_run({query_id: stores[0][query_id] for query_id in qrels}, k=8)
    assert kd.evaluate_run(run, qrels, ("RR@10",))["RR@10"] == pytest.approx(outcome["test"][outcome["chosen"]])
