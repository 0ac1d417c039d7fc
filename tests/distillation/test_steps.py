"""Stages up to the scores: what teachers, files of scores and judgments become, and what is refused."""

import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hf_kd_ranking.distillation.plan import make_plan
from hf_kd_ranking.distillation.stage import run_stage

import hf_kd_ranking as kd
from hf_kd_ranking.distillation import stages, students
from hf_kd_ranking.distillation.outcome import outcome_text


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


def test_a_run_of_training_queries_only_is_no_row_of_the_table(make_job, trainings, tmp_path):
    job = make_job(architectures=["bert_dot"])
    train = set(job.split_queries(job.read_judgments())["train"])
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


def test_teachers_of_one_name_and_of_reserved_names_are_told_apart(make_job):
    job = dataclasses.replace(make_job(), teachers=["x/a", "y/a", "z/a-0", "mean"])
    assert students.Distillation(job).sources == {"a-0": "x/a", "a-1": "y/a", "a-0-2": "z/a-0", "mean-3": "mean"}


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


def test_a_teacher_no_better_than_bm25_stops_the_job(make_job, trainings):
    with pytest.raises(ValueError, match=r"no better than BM25 \(RR@10 [.\d]+, BM25 [.\d]+\).*--force"):
        kd.distill(make_job(force=False))
    assert trainings == []


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
