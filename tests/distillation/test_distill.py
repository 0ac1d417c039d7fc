"""From a collection and a teacher to the best ranker within a budget, on a toy: stages, resuming, refusals."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.distillation import stages
from hf_kd_ranking.distillation.outcome import choose, outcome_text
from hf_kd_ranking.distillation.stage import run_stage

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
        return kd.DistillJob(*paths, [str(tmp_path / "teacher")], **settings | options)

    return make


@pytest.fixture
def trainings(monkeypatch) -> list[str]:
    """The folders of all trainings that were run."""
    calls, train = [], stages.train_ranker
    monkeypatch.setattr(stages, "train_ranker", lambda job, args: (calls.append(args.output_dir), train(job, args))[1])
    return calls


def test_every_stage_is_made_once_and_a_changed_option_repeats_what_depends_on_it(make_job, trainings, tmp_path):
    outcome = kd.distill(make_job())
    assert len(trainings) == 4  # two architectures with and without the teacher
    assert outcome["test"].keys() == {"BM25", "teacher", *outcome["dev"]}
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
    rows = kd.load_teacher_scores(tmp_path / "out" / "triples" / "scores.tsv")
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
    for name, (loss, scores) in {"taught": ("margin_mse", "scores.tsv"), "alone": ("ranknet", "labels.tsv")}.items():
        manifest = json.loads((Path(outcome["folders"][f"bert_dot {name}"]) / "manifest.json").read_text())
        assert (manifest["loss"], manifest["files"]["teacher_scores"]["name"]) == (loss, scores)
    labels = kd.load_teacher_scores(tmp_path / "out" / "triples" / "labels.tsv")
    assert all(labels[name] == rows[name] for name in ("query_id", "pos_id", "neg_id"))
    assert set(labels["pos_score"]) == {1.0} and set(labels["neg_score"]) == {0.0}
    # Again, nothing runs; with an architecture more only that is trained; with another batch size all are.
    again = kd.distill(make_job())
    assert (again, len(trainings)) == (outcome, 4)
    more = kd.distill(make_job(architectures=["bert_dot", "colbert", "tk"]))
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
    before = (tmp_path / "out" / "triples" / "scores.tsv").read_text()
    other = kd.load_ranker(tmp_path / "teacher")
    torch.nn.init.normal_(other._classification_layer.weight)
    other.save_pretrained(tmp_path / "teacher")
    kd.distill(shorter)
    assert len(trainings) == 10
    assert (tmp_path / "out" / "triples" / "scores.tsv").read_text() != before
    assert len({*timed, efficiency.read_text()}) == 3  # each time measured anew


def test_an_interrupted_job_goes_on_to_the_same_figures(make_job, trainings, monkeypatch):
    whole = kd.distill(make_job(architectures=["bert_dot"]))
    measure, rerank = stages.measure_efficiency, stages.rerank_run
    other = dataclasses.replace(make_job(architectures=["bert_dot"]), output=make_job().output + "2")
    for name, function in {
        "score_teacher": stages.score_teacher,
        "train_ranker": stages.train_ranker,
        "measure_efficiency": measure,
        "rerank_run": rerank,
    }.items():

        def stop(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(stages, name, stop)
        with pytest.raises(KeyboardInterrupt):
            kd.distill(other)
        monkeypatch.setattr(stages, name, function)
    assert kd.distill(other)["test"] == whole["test"]
    assert len(trainings) == 4


def test_without_judgments_agreement_with_the_teacher_is_measured(make_job, trainings, tmp_path):
    job = make_job(qrels=None, architectures=["bert_dot"])
    outcome = kd.distill(job)
    run = kd.read_run(tmp_path / "out" / "teacher" / "all.trec")
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
    names = ("scores.0.tsv", "scores.1.tsv", "scores.tsv")
    files = [kd.load_teacher_scores(tmp_path / "out" / "triples" / name) for name in names]
    one, two, mean = (np.array([rows["pos_score"], rows["neg_score"]]) for rows in files)
    assert two.std() > 10 * one.std()
    margins = [scores[0] - scores[1] for scores in (one / one.std(), two / two.std(), mean)]
    assert np.corrcoef(margins[0] + margins[1], margins[2])[0, 1] > 0.98  # nearly: it standardises over distinct pairs


def test_the_rate_is_chosen_on_dev_and_every_seed_is_another_student(make_job, trainings, tmp_path):
    outcome = kd.distill(make_job(architectures=["bert_dot"], learning_rates=[1e-2, 1e-9], seeds=2))
    assert len(trainings) == 2 * (2 + 1)
    for name in ("alone", "taught"):
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
        ({"architectures": []}, "at least one teacher and one architecture"),
        ({"held_out": 1.5}, "between 0 and 1, got 1.5"),
        ({"held_out": 0.01}, r"Too few queries with a relevant document for .*test 0 \(needed 2\)"),
    ],
)
def test_bad_options_are_refused_before_any_work(make_job, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        kd.distill(make_job(**options))
    assert not (tmp_path / "out").exists()


def test_an_output_of_another_collection_is_kept(make_job, tmp_path):
    stages.Distillation(make_job())
    (tmp_path / "collection.tsv").write_text("d0\tapple\n")
    with pytest.raises(ValueError, match="out was made from another collection; take another output folder"):
        stages.Distillation(make_job())


def test_the_verb_prints_a_table_and_the_choice(call, make_job, trainings, tmp_path):
    job = make_job(architectures=["bert_dot"])
    files = f"--collection {job.collection} --queries {job.queries} --qrels {job.qrels} --output {job.output}"
    options = "--architecture bert_dot --candidates 8 --triples-per-query 2 --held-out 0.5 --learning-rate 0.001"
    options += """ --configs {"bert_dot":{"pooling":"mean"}}"""
    options += " --max-query-length 8 --max-document-length 16 --measure RR@10 --batch-size 8 --force"
    command = f"distill {files} --teacher {job.teachers[0]} --model-name {job.model_name} {options}"
    status, out, err = call(f"{command} --budget-ms 60000")
    assert status == 0, err
    assert kd.load_ranker(tmp_path / "out" / "best").config.pooling == "mean"
    assert "| bert_dot taught | " in out and "Chosen on dev within 60000 ms a query: bert_dot" in out
    status, _, err = call(f"{command} --budget-ms 0.001")
    assert (status, "No ranker is within 0.001 ms" in err) == (2, True)
    assert len(trainings) == 2  # the second call repeated nothing
    status, _, err = call(f"{command} --configs {{bert_dot")
    assert (status, "--configs is no JSON" in err) == (2, True)


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
