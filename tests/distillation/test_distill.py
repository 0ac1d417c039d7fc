"""From a collection and a teacher to the best ranker within a budget, on a toy: stages, resuming, refusals."""

import dataclasses
import fnmatch
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.cli.settings import parse_settings
from hf_kd_ranking.distillation import outcome as outcomes
from hf_kd_ranking.distillation import stages, students
from hf_kd_ranking.distillation.outcome import choose, outcome_text
from hf_kd_ranking.distillation.plan import Stage, make_plan, plan_text
from hf_kd_ranking.distillation.stage import run_stage
from hf_kd_ranking.evaluation.rerank import rerank_run
from hf_kd_ranking.hub.manifest import digest

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = "apple bread cat dog earth fire glass house iron jam king lake moon night ocean paper queen river".split()


@pytest.fixture
def make_job(tmp_path, encoder, tokenizer):
    """A collection of 60 passages, 60 queries with one judged passage each, and a teacher that may rank anyhow."""
    rng = random.Random(3)
    passages = [rng.choices(WORDS, k=8) for _ in range(60)]
    lines = {
        "collection.tsv": [f"d{i}\t{' '.join(words)}\n" for i, words in enumerate(passages)],
        "queries.tsv": [f"q{i}\t{' '.join(rng.sample(words, 3))}\n" for i, words in enumerate(passages)],
        "qrels.txt": [f"q{i} 0 d{i} 1\n" for i in range(60)],
    }
    for name, of_file in lines.items():
        (tmp_path / name).write_text("".join(of_file))
    teacher = kd.load_ranker(encoder, "bert_cat", max_query_length=8, max_document_length=16)
    kd.Ranker(teacher, tokenizer).save_pretrained(tmp_path / "teacher")

    def make(**options) -> kd.DistillJob:
        settings = {"model_name": str(encoder), "candidates": 8, "triples_per_query": 2, "held_out": 0.5}
        settings |= {"learning_rates": [1e-3], "max_query_length": 8, "max_document_length": 16, "force": True}
        settings |= {"qrels": str(tmp_path / "qrels.txt"), "measure": "RR@10", "batch_size": 8}
        paths = [str(tmp_path / name) for name in ("collection.tsv", "queries.tsv", "out")]
        if "scores" not in options:
            settings["teachers"] = [str(tmp_path / "teacher")]
        return kd.DistillJob(*paths, **settings | options)

    return make


def splits_of(job: kd.DistillJob) -> dict[str, list[str]]:
    return job.split_queries(job.read_judgments())


@pytest.fixture
def trainings(monkeypatch) -> list[str]:
    """The folders of all trainings that were run."""
    calls, train = [], students.train_ranker
    monkeypatch.setattr(
        students, "train_ranker", lambda job, args, **how: (calls.append(args.output_dir), train(job, args, **how))[1]
    )
    return calls


def test_every_stage_is_made_once_and_a_changed_option_repeats_what_depends_on_it(make_job, trainings, tmp_path):
    outcome = kd.distill(make_job())
    assert len(trainings) == 4  # two architectures with and without the teacher
    untrained = {"bert_dot untrained", "colbert untrained"}
    assert outcome["test"].keys() == {"BM25", "teacher", *untrained, *outcome["dev"]}
    best = max(outcome["dev"], key=outcome["dev"].get)
    assert (outcome["best"], outcome["ranker"]) == (best, str(tmp_path / "out" / "best"))
    scores = [
        kd.Ranker.from_pretrained(path).score("cat", ["dog cat"])
        for path in (outcome["ranker"], outcome["folders"][best])
    ]
    assert scores[0] == scores[1]
    assert all(name in Path(outcome["page"]).read_text() for name in outcome["test"])
    # The figures are those of the runs, and the triples' scores the teacher's.
    qrels = kd.read_qrels(tmp_path / "out" / "triples" / "test.qrels.txt")
    for name, value in outcome["test"].items():
        run = kd.read_run(tmp_path / "out" / "report" / "runs" / f"{name}.trec")
        assert kd.evaluate_run(run, qrels, ("RR@10",))["RR@10"] == pytest.approx(value)
    rows = kd.load_teacher_scores(tmp_path / "out" / "scores" / "teacher" / "rows.tsv")
    teacher = kd.Ranker.from_pretrained(tmp_path / "teacher")
    queries, documents = (
        kd.TextStore.from_tsv(tmp_path / "queries.tsv"),
        kd.TextStore.from_tsv(tmp_path / "collection.tsv"),
    )
    expected = teacher.score(queries[rows["query_id"]], documents[rows["neg_id"]])
    assert rows["neg_score"] == pytest.approx(expected.tolist(), abs=1e-4)
    splits = [
        set(kd.read_qrels(tmp_path / "out" / "triples" / f"{split}.qrels.txt")) for split in ("train", "dev", "test")
    ]
    assert set(rows["query_id"]) <= splits[0] and sum(map(len, splits)) == len(set().union(*splits)) == 60
    assert min(map(len, splits)) >= 8  # held out is half, of which dev and test have a half each
    assert json.loads((tmp_path / "out/report/efficiency.json").read_text())["protocol"]["candidates"] == 8
    # Taught by the teacher's scores, alone by the labels of the same triples.
    for name, (loss, scores) in {
        "teacher": ("margin_mse", "rows.tsv"),
        "no_teacher": ("ranknet", "labels.tsv"),
    }.items():
        manifest = json.loads((Path(outcome["folders"][f"bert_dot {name}"]) / "manifest.json").read_text())
        assert (manifest["loss"], manifest["files"]["teacher_scores"]["name"]) == (loss, scores)
        assert manifest["results"]["after"] == {"RR@10": pytest.approx(outcome["test"][f"bert_dot {name}"])}
        card = (Path(outcome["folders"][f"bert_dot {name}"]) / "README.md").read_text()
        assert f"| RR@10 | {outcome['test'][f'bert_dot {name}']:.4f} | {outcome['test']['BM25']:.4f} |" in card
    labels = kd.load_teacher_scores(tmp_path / "out" / "triples" / "labels.tsv")
    assert all(labels[name] == rows[name] for name in ("query_id", "pos_id", "neg_id"))
    assert set(labels["pos_score"]) == {1.0} and set(labels["neg_score"]) == {0.0}
    # Again, nothing runs; with an architecture more only that is trained; with another batch size all are.
    again = kd.distill(make_job())
    assert (again, len(trainings)) == (outcome, 4)
    more = kd.distill(
        make_job(architectures=["bert_dot", "colbert", "tk"], overrides={"tk": {"learning_rates": [1e-3]}})
    )
    assert len(trainings) == 6 and all("/tk/" in folder for folder in trainings[4:])
    assert {name: more["test"][name] for name in outcome["test"]} == outcome["test"]
    shorter, efficiency = (
        make_job(architectures=["bert_dot"], max_document_length=9),
        tmp_path / "out/report/efficiency.json",
    )
    timed = [efficiency.read_text()]
    kd.distill(shorter)
    timed.append(efficiency.read_text())
    assert len(trainings) == 8
    # Another teacher under the same name is another teacher.
    before = (tmp_path / "out" / "scores" / "teacher" / "rows.tsv").read_text()
    other = kd.load_ranker(tmp_path / "teacher")
    torch.nn.init.normal_(other._classification_layer.weight)
    other.save_pretrained(tmp_path / "teacher")
    kd.distill(shorter)
    assert len(trainings) == 9 and "/teacher-" in trainings[-1]  # nor does it change what labels alone teach
    assert (tmp_path / "out" / "scores" / "teacher" / "rows.tsv").read_text() != before
    assert len({*timed, efficiency.read_text()}) == 3  # each time measured anew


def test_an_interrupted_job_goes_on_to_the_same_figures(make_job, trainings, monkeypatch):
    whole = kd.distill(make_job(architectures=["bert_dot"]))
    other = dataclasses.replace(make_job(architectures=["bert_dot"]), output=make_job().output + "2")
    stops = [(stages, "sample_triples"), (stages, "score_teacher"), (students, "train_ranker")]
    for module, name in [*stops, (outcomes, "rerank_run"), (outcomes, "measure_efficiency")]:
        function = getattr(module, name)

        def stop(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            kd.distill(other)
        monkeypatch.setattr(module, name, function)
    assert kd.distill(other)["test"] == whole["test"]
    assert len(trainings) == 4


def test_without_judgments_agreement_with_the_teacher_is_measured(make_job, trainings, tmp_path):
    job = make_job(qrels=None, architectures=["bert_dot"])
    outcome = kd.distill(job)
    run = kd.read_run(tmp_path / "out" / "teacher" / "run.trec")
    qrels = kd.read_qrels(tmp_path / "out" / "triples" / "dev.qrels.txt")
    assert all(
        list(grades.items()) == [(run[q][i][0], 3 - i) for i in range(len(grades))] for q, grades in qrels.items()
    )
    assert outcome["test"]["teacher"] == 1.0
    assert "agreement with the teacher, not relevance" in outcome_text(outcome, job)


def test_several_teachers_on_any_scale_count_alike(make_job, trainings, tmp_path, tokenizer):
    other = kd.load_ranker(tmp_path / "teacher")
    torch.nn.init.normal_(other._classification_layer.weight, std=100)
    kd.Ranker(other, tokenizer).save_pretrained(tmp_path / "other")
    job = make_job(architectures=["bert_dot"])
    job.teachers.append(str(tmp_path / "other"))
    kd.distill(job)
    names = ("teacher", "other", "mean")
    files = [kd.load_teacher_scores(tmp_path / "out" / "scores" / name / "rows.tsv") for name in names]
    one, two, mean = (np.array([rows["pos_score"], rows["neg_score"]]) for rows in files)
    assert two.std() > 10 * one.std()
    margins = [scores[0] - scores[1] for scores in (one / one.std(), two / two.std(), mean)]
    assert np.corrcoef(margins[0] + margins[1], margins[2])[0, 1] > 0.98  # nearly: it standardises over distinct pairs


def test_bm25_is_a_teacher_by_the_scores_that_it_has_given(make_job, trainings, tmp_path):
    job = make_job(architectures=["bert_dot"], candidates=2)  # so that it misses positives
    job.teachers.append("bm25")
    assert [stage.seconds for stage in make_plan(job) if stage.name == "teachers/bm25"] == [0.0]
    outcome = kd.distill(job)
    run = {q: dict(ranking) for q, ranking in kd.read_run(tmp_path / "out" / "candidates" / "train.trec").items()}
    rows = kd.load_teacher_scores(tmp_path / "out" / "scores" / "bm25" / "rows.tsv")
    for kind in ("pos", "neg"):
        assert list(rows[f"{kind}_score"]) == pytest.approx([run[r["query_id"]][r[f"{kind}_id"]] for r in rows])
    held_out = [kd.read_run(tmp_path / "out" / "candidates" / f"{split}.trec") for split in ("dev", "test")]
    assert kd.read_run(tmp_path / "out" / "teachers" / "bm25" / "run.trec") == held_out[0] | held_out[1]
    missed = [q for q in run if len(run[q]) > 2]  # the positive stands last, with the lowest score
    assert missed and all(run[q][f"d{q[1:]}"] == min(run[q].values()) for q in missed)
    assert {"BM25", "teacher", "teacher teacher"} <= outcome["test"].keys() and "teacher bm25" not in outcome["test"]
    card = next((tmp_path / "out" / "students" / "bert_dot").glob("teacher-*/ranker/README.md"))
    assert "teacher and BM25" in card.read_text()
    with pytest.raises(ValueError, match="no better than BM25"):
        kd.distill(dataclasses.replace(job, teachers=["bm25"], force=False))


def test_other_candidates_repeat_what_bm25_has_scored(make_job, trainings, tmp_path):
    runs = []
    for candidates in (4, 8):
        kd.distill(make_job(teachers=["bm25"], architectures=["bert_dot"], candidates=candidates))
        runs.append(kd.read_run(tmp_path / "out" / "teachers" / "bm25" / "run.trec"))
    assert [max(map(len, run.values())) for run in runs] == [4, 8]


def test_a_whole_number_and_the_same_with_a_point_are_one_option(make_job, trainings):
    for epochs in (1, 1.0):
        overrides = {"bert_dot": {"epochs": 2 * epochs}}
        kd.distill(make_job(architectures=["bert_dot", "colbert"], epochs=epochs, overrides=overrides))
    assert len(trainings) == 4


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


def test_every_ranker_is_measured_with_bm25_too(make_job, trainings, tmp_path):
    job = make_job(architectures=["bert_dot"])
    outcome = kd.distill(job)
    assert outcome["fused"].keys() == outcome["test"].keys() - {"BM25"}
    runs, qrels = tmp_path / "out" / "report" / "runs", kd.read_qrels(tmp_path / "out" / "triples" / "test.qrels.txt")

    def scaled(name: str) -> dict[str, dict[str, float]]:
        found = {q: dict(ranking) for q, ranking in kd.read_run(runs / f"{name}.trec").items()}
        low, high = ({q: of(scores.values()) for q, scores in found.items()} for of in (min, max))
        return {q: {d: (s - low[q]) / (high[q] - low[q]) for d, s in scores.items()} for q, scores in found.items()}

    student, first = scaled("bert_dot teacher"), scaled("BM25")
    sums = {q: {doc_id: (score + first[q][doc_id]) / 2 for doc_id, score in of.items()} for q, of in student.items()}
    hybrid = kd.Run((q, sorted(of.items(), key=lambda scored: -scored[1])) for q, of in sums.items())
    expected = kd.evaluate_run(hybrid, qrels, ("RR@10",))["RR@10"]
    assert outcome["fused"]["bert_dot teacher"] == pytest.approx(expected)
    assert expected not in (outcome["test"]["bert_dot teacher"], outcome["test"]["BM25"])
    cells = [f"{outcome[key]['bert_dot teacher']:.4f}" for key in ("test", "fused", "dev")]
    assert f"| bert_dot teacher | {' | '.join(cells)} |" in outcome_text(outcome, job)


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
        assert manifest["files"]["teacher_scores"]["sha256"] == digest(tmp_path / "out" / "scores" / name / "rows.tsv")
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


def test_untrained_students_are_ranked_too(make_job, trainings, tmp_path, encoder, tokenizer):
    kd.distill(make_job(architectures=["bert_dot"]))
    ranker = kd.Ranker(kd.load_ranker(encoder, "bert_dot", max_query_length=8, max_document_length=16), tokenizer)
    stores = kd.TextStore.from_tsv(tmp_path / "queries.tsv"), kd.TextStore.from_tsv(tmp_path / "collection.tsv")
    expected = rerank_run(ranker, kd.read_run(tmp_path / "out" / "candidates" / "test.trec"), *stores)
    found = kd.read_run(tmp_path / "out" / "report" / "runs" / "bert_dot untrained.trec")
    for query_id, ranking in expected.items():
        assert dict(found[query_id]) == pytest.approx(dict(ranking), abs=1e-4)


def test_rankers_of_one_vector_also_search_the_collection(make_job, trainings, tmp_path):
    outcome = kd.distill(make_job())
    assert outcome["retrieval"].keys() == {"bert_dot no_teacher", "bert_dot teacher"}
    stores = kd.TextStore.from_tsv(tmp_path / "queries.tsv"), kd.TextStore.from_tsv(tmp_path / "collection.tsv")
    qrels = kd.read_qrels(tmp_path / "out" / "triples" / "test.qrels.txt")
    expected = kd.RetrievalEvaluator(qrels, *stores, ("RR@10",))(
        kd.Ranker.from_pretrained(outcome["folders"]["bert_dot teacher"])
    )
    assert outcome["retrieval"]["bert_dot teacher"] == pytest.approx(expected["RR@10"])
    assert f"| {outcome['retrieval']['bert_dot teacher']:.4f} |" in outcome_text(outcome, make_job())
    without = kd.distill(make_job(retrieve=False))
    assert without["retrieval"] == {} and "whole collection" not in outcome_text(without, make_job())


def test_rows_of_scores_are_trained_on_as_they_are(make_job, trainings, tmp_path):
    rng = np.random.default_rng(0)
    lines = [f"{rng.normal():.3f}\t{rng.normal():.3f}\tq{i}\td{i}\td{(i + 7) % 60}\n" for i in range(40)]
    (tmp_path / "scores.tsv").write_text("".join(lines))
    outcome = kd.distill(make_job(scores=[str(tmp_path / "scores.tsv")], architectures=["bert_dot"]))
    manifest = json.loads((Path(outcome["folders"]["bert_dot teacher"]) / "manifest.json").read_text())
    assert manifest["files"]["teacher_scores"]["name"] == "scores.tsv" and manifest["rows"] == 40
    labels = [line.split("\t") for line in (tmp_path / "out/triples/labels.tsv").read_text().splitlines()]
    assert labels == [["1", "0", *line.strip().split("\t")[2:]] for line in lines]
    held_out = {split: set(kd.read_qrels(tmp_path / f"out/triples/{split}.qrels.txt")) for split in ("dev", "test")}
    assert held_out["dev"] | held_out["test"] == {f"q{i}" for i in range(40, 60)}
    assert outcome["queries"]["train"] == 40 and "teacher" not in outcome["test"]


def test_runs_of_other_systems_are_teachers(make_job, trainings, tmp_path):
    rng = random.Random(5)
    of_query = {f"q{i}": {f"d{j}": rng.random() for j in (i, *rng.sample(range(60), 12))} for i in range(60)}
    shorter = {q: dict(list(docs.items())[:8]) for q, docs in of_query.items()}
    for name, scores in (("one", of_query), ("two", shorter)):
        run = kd.Run({q: sorted(docs.items(), key=lambda pair: -pair[1]) for q, docs in scores.items()})
        kd.write_run(run, tmp_path / f"{name}.trec")
    paths = [str(tmp_path / f"{name}.trec") for name in ("one", "two")]
    outcome = kd.distill(make_job(scores=paths, architectures=["bert_dot"]))
    rows = kd.load_teacher_scores(tmp_path / "out" / "scores" / "one.trec" / "rows.tsv")
    for row in rows:
        assert row["neg_score"] == pytest.approx(of_query[row["query_id"]][row["neg_id"]], abs=1e-6)
        assert row["neg_id"] in shorter[row["query_id"]]  # what one of them did not score is no negative
    assert {"teacher", "teacher one.trec", "teacher two.trec"} < outcome["test"].keys()


def test_judgments_of_their_own_decide_what_is_held_out(make_job, tmp_path):
    lines = (tmp_path / "qrels.txt").read_text().splitlines(keepends=True)
    for name, part in (("qrels.txt", lines[:40]), ("dev.txt", lines[40:45]), ("test.txt", lines[45:])):
        (tmp_path / name).write_text("".join(part))
    dev, test = str(tmp_path / "dev.txt"), str(tmp_path / "test.txt")
    splits = splits_of(make_job(dev_qrels=dev, test_qrels=test))
    assert splits["train"] == [f"q{i}" for i in range(40)] and splits["dev"] == [f"q{i}" for i in range(40, 45)]
    assert splits["test"] == [f"q{i}" for i in range(45, 60)]
    splits = splits_of(make_job(test_qrels=test))
    assert splits["test"] == [f"q{i}" for i in range(45, 60)]
    assert len(splits["dev"]) > 10  # all of the held out half of 40
    assert splits_of(make_job(test_qrels=test, held_out=0.25))["dev"] == splits_of(make_job(held_out=0.5))["test"]


def test_the_best_within_the_budget_is_chosen_on_dev():
    outcome = {
        "dev": {"slow": 0.9, "quick": 0.7, "quicker": 0.6},
        "latency_ms": {"slow": 50.0, "quick": 9.0, "quicker": 1.5},
    }
    assert [choose(outcome, budget) for budget in (None, 50, 10, 2)] == ["slow", "slow", "quick", "quicker"]
    with pytest.raises(ValueError, match=r"within 1 ms.*fastest, quicker, takes 1\.5 ms"):
        choose(outcome, 1)


def test_a_teacher_no_better_than_bm25_stops_the_job(make_job, trainings):
    with pytest.raises(ValueError, match=r"no better than BM25 \(RR@10 [.\d]+, BM25 [.\d]+\).*--force"):
        kd.distill(make_job(force=False))
    assert trainings == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architectures": ["bert"]}, "Unknown architectures bert"),
        ({"architectures": []}, "needs a teacher or scores, an architecture, a condition and a learning rate"),
        ({"conditions": ["first_teacher"]}, "first_teacher needs several teachers"),
        ({"conditions": ["T2"]}, "Unknown conditions T2; there are no_teacher, first_teacher, teacher"),
        ({"overrides": {"bert": {}}}, "Unknown overrides bert; there are bert_cat, .*, teacher"),
        ({"overrides": {"tk": 5}}, "overrides of tk must be an object, its learning_rates a list; got 5"),
        ({"overrides": {"tk": {"learning_rates": 2e-4}}}, "overrides of tk must be .* got {'learning_rates': 0.0002}"),
        ({"qrels": None, "test_qrels": "qrels.txt"}, "Give --qrels too"),
        ({"qrels": None, "scores": ["scores.tsv"]}, "Give --qrels too"),
        ({"scores": ["scores.tsv", "scores.trec"]}, "all rows of triples, or all TREC runs"),
        ({"scores": ["scores.tsv"], "teachers": ["x"]}, "not both"),
        ({"scores": [], "teachers": []}, "needs a teacher or scores"),
        ({"qrels": None, "teachers": ["bert_cat"]}, "A teacher is trained on judgments"),
        ({"device": "cuda"}, "needs a GPU"),
        ({"loss": "margin-mse"}, "Unknown loss 'margin-mse'"),
        ({"loss": "margin_mse:1,in_batch_margin_mse:1"}, "trains on pairs, .*; in_batch_margin_mse needs more"),
        ({"measure": "nDGC@10"}, "nDGC@10"),
        ({"scores": ["scores.jsonl"]}, "scores.jsonl holds lists"),
        ({"device": "gpu"}, "device is cpu or cuda, got 'gpu'"),
        ({"seeds": 0, "epochs": -1}, "above 0, got seeds 0, epochs -1"),
        ({"held_out": 1.5}, "between 0 and 1, got 1.5"),
        ({"held_out": 0.01}, r"Too few queries with a relevant document for .*test 0 \(needed 2\)"),
    ],
)
def test_bad_options_are_refused_before_any_work(make_job, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("scores.tsv").write_text("1.0\t0.5\tq0\td0\td1\n")
    Path("scores.jsonl").write_text("{}")
    Path("scores.trec").write_text("q0 Q0 d0 1 0.5 x\n")
    with pytest.raises(ValueError, match=words):
        kd.distill(make_job(**options))
    assert not (tmp_path / "out").exists()


def test_an_output_of_another_collection_is_kept(make_job, tmp_path):
    _ = students.Distillation(make_job()).candidates
    (tmp_path / "collection.tsv").write_text("d0\tapple\n")
    with pytest.raises(ValueError, match="out was made from another collection; take another output folder"):
        students.Distillation(make_job())


def test_a_collection_with_an_id_twice_is_refused(make_job, tmp_path):
    with (tmp_path / "collection.tsv").open("a") as file:
        file.write((tmp_path / "collection.tsv").read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"collection\.tsv has 1 documents under an id of another"):
        kd.distill(make_job())
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(make_job, monkeypatch):
    monkeypatch.setattr(stages, "processes", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="distill is one process"):
        kd.distill(make_job())


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


def test_files_that_no_stage_made_are_kept(make_job, tmp_path, trainings):
    (tmp_path / "out" / "teachers").mkdir(parents=True)
    (tmp_path / "teacher").rename(tmp_path / "out" / "teachers" / "teacher")
    job = dataclasses.replace(make_job(), teachers=[str(tmp_path / "out" / "teachers" / "teacher")])
    with pytest.raises(ValueError, match="teachers/teacher holds something that no stage made"):
        kd.distill(job)
    assert kd.load_ranker(tmp_path / "out" / "teachers" / "teacher")
    (tmp_path / "out" / "teachers" / "teacher").rename(tmp_path / "teacher")
    (tmp_path / "out" / "best").mkdir()
    (tmp_path / "out" / "best" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="best holds something else than a ranker"):
        kd.distill(make_job(architectures=["bert_dot"]))
    assert (tmp_path / "out" / "best" / "notes.txt").read_text() == "mine"


def test_teachers_of_one_name_and_of_reserved_names_are_told_apart(make_job):
    job = dataclasses.replace(make_job(), teachers=["x/a", "y/a", "z/a-0", "mean"])
    assert students.Distillation(job).sources == {"a-0": "x/a", "a-1": "y/a", "a-0-2": "z/a-0", "mean-3": "mean"}


def test_a_finished_output_can_be_moved(make_job, trainings, tmp_path):
    outcome = kd.distill(make_job(architectures=["bert_dot"]))
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = kd.distill(dataclasses.replace(make_job(architectures=["bert_dot"]), output=str(tmp_path / "moved")))
    assert (moved["test"], len(trainings)) == (outcome["test"], 2)
    assert moved["ranker"] == str(tmp_path / "moved" / "best") and "/moved/" in moved["folders"]["bert_dot teacher"]


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


def test_a_teacher_that_is_better_alone_than_in_the_mean_is_told(make_job, tmp_path, caplog):
    parts = students.Distillation(make_job())
    _ = parts.candidates
    for name, sign in (("good", 1), ("bad", -5)):  # the judged passage first, and last
        runs = [kd.read_run(parts.run(split)) for split in ("train", "dev", "test")]
        scored = {q: [(d, sign * float(d[1:] == q[1:])) for d, _ in of[q]] for of in runs for q in of}
        kd.write_run(scored, tmp_path / f"{name}.trec")
    job = make_job(scores=[str(tmp_path / f"{name}.trec") for name in ("bad", "good")])
    job = dataclasses.replace(job, output=str(tmp_path / "other"))
    with caplog.at_level("WARNING"):
        _ = students.Distillation(job).teaching
    assert "good.trec alone ranks the" in caplog.text
    assert "better than the mean of the teachers (RR@10 1.0000" in caplog.text


def test_a_run_of_training_queries_only_is_no_row_of_the_table(make_job, trainings, tmp_path):
    job = make_job(architectures=["bert_dot"])
    train = set(splits_of(job)["train"])
    rng = random.Random(5)
    run = kd.Run(
        {q: [(f"d{j}", 1 / (1 + i)) for i, j in enumerate((int(q[1:]), *rng.sample(range(60), 5)))] for q in train}
    )
    kd.write_run(kd.Run({q: list(dict(ranking).items()) for q, ranking in run.items()}), tmp_path / "one.trec")
    outcome = kd.distill(make_job(scores=[str(tmp_path / "one.trec")], architectures=["bert_dot"], force=False))
    assert "teacher" not in outcome["test"] and "bert_dot teacher" in outcome["test"]


def test_judged_documents_that_the_collection_lacks_teach_nothing(make_job, trainings, tmp_path):
    with (tmp_path / "qrels.txt").open("a") as file:
        file.writelines(f"q{i} 0 gone{i} 1\n" for i in range(60))
    kd.distill(make_job(architectures=["bert_dot"], triples_per_query=20))
    assert "gone" not in (tmp_path / "out" / "triples" / "labels.tsv").read_text()
    assert "gone" in (tmp_path / "out" / "triples" / "test.qrels.txt").read_text()


def test_the_verb_prints_a_table_and_the_choice(call, make_job, trainings, tmp_path):
    job = make_job(architectures=["bert_dot"])
    files = f"--collection {job.collection} --queries {job.queries} --qrels {job.qrels} --output {job.output}"
    options = "--architectures bert_dot --candidates 8 --triples-per-query 2 --held-out 0.5 --learning-rates 0.001"
    options += """ --overrides {"bert_dot":{"pooling":"mean"}}"""
    options += " --max-query-length 8 --max-document-length 16 --measure RR@10 --batch-size 8 --force"
    command = f"distill {files} --teacher {job.teachers[0]} --model-name {job.model_name} {options}"
    status, out, err = call(f"{command} --budget-ms 60000")
    assert status == 0, err
    assert kd.load_ranker(tmp_path / "out" / "best").config.pooling == "mean"
    assert "| bert_dot teacher | " in out and "Chosen on dev within 60000 ms a query: bert_dot" in out
    status, _, err = call(f"{command} --budget-ms 0.001")
    assert (status, "No ranker is within 0.001 ms" in err) == (2, True)
    assert len(trainings) == 2  # the second call repeated nothing
    status, _, err = call(f"{command} --teachers x")
    assert (status, "--teachers stands twice" in err) == (2, True)
    status, out, err = call(f"{command} --plan-only")
    assert (status, out.splitlines()[2]) == (0, "| candidates | done |  |  |")
    (tmp_path / "job.yaml").write_text("architectures: [bert_dot]\noverrides: {bert_dot: {pooling: mean}}\n")
    status, out, err = call(
        f"{command.replace('--architectures bert_dot', '').split(' --overrides')[0]} --max-query-length 8 "
        f"--max-document-length 16 --measure RR@10 --batch-size 8 --force --config {tmp_path / 'job.yaml'}"
    )
    assert (status, "| bert_dot teacher | " in out, len(trainings)) == (0, True, 2)
    status, _, err = call(f"{command} --overrides {{bert_dot")
    assert (status, "--overrides is no JSON" in err) == (2, True)


def test_a_stage_is_removed_when_its_inputs_change_and_kept_when_it_was_interrupted(tmp_path):
    seen = []

    def work(folder: Path) -> None:
        seen.append(sorted(path.name for path in folder.iterdir()))
        (folder / "part").touch()
        if len(seen) == 1:
            raise OSError

    with pytest.raises(OSError):
        run_stage(tmp_path / "stage", {"a": 1}, work)
    first = run_stage(tmp_path / "stage", {"a": 1}, work)
    assert run_stage(tmp_path / "stage", {"a": 1}, work) == first
    assert run_stage(tmp_path / "stage", {"a": 2}, work) != first
    assert seen == [["stage.json"], ["part", "stage.json"], ["stage.json"]]
    assert json.loads((tmp_path / "stage" / "stage.json").read_text())["inputs"] == {"a": 2}


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("reproduce_*.yaml")), ids=lambda file: file.stem)
def test_an_example_names_options_that_there_are(file, tmp_path, monkeypatch):
    (job,), _ = parse_settings((kd.DistillJob,), ["--config", str(file)])
    monkeypatch.chdir(tmp_path)
    for path in (job.collection, job.queries, job.qrels, job.test_qrels, *job.scores):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("1\t0\tq0\td0\td1\n")
    job._check_options()
    assert set(job.architectures) == set(kd.models.ARCHITECTURES)
    for architecture in job.architectures:
        training, config = job.options_of(architecture)
        assert training["learning_rates"] and config.keys() <= {
            "compression_dim",
            "join_layer_idx",
            "layers",
            "pooling",
        }
