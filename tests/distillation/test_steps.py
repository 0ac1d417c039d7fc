"""Teachers, files of scores and judgments as steps use them, and refusals."""

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.artifacts import locked
from hf_kd_ranking.distillation import context
from hf_kd_ranking.distillation.context import Context, name_sources
from hf_kd_ranking.distillation.pipeline import make_plan, prepare
from hf_kd_ranking.distillation.selection import outcome_text
from hf_kd_ranking.distillation.steps import check_teacher, find_candidates, judge_by_agreement, label_triples
from hf_kd_ranking.distillation.work import Artifact, Workspace


def artifact(folder, run=None, qrels=None) -> Artifact:
    """A folder with a run or judgments, as a step leaves it."""
    folder.mkdir()
    if run is not None:
        kd.write_run(run, folder / "run.trec")
    if qrels is not None:
        kd.write_qrels(qrels, folder / "qrels.txt")
    return Artifact(folder, folder.name)


# ---- Steps as plain functions ---------------------------------------------------------------------------------------


def test_candidates_end_with_the_positives_that_bm25_missed(tmp_path):
    (tmp_path / "collection.tsv").write_text("a\tapple pie\nb\tapple\nc\tbread\n")
    kd.BM25Index.build(kd.TextStore.from_tsv(tmp_path / "collection.tsv")).save(tmp_path / "index")
    find_candidates(tmp_path, Artifact(tmp_path, ""), {"q": "apple"}, 2, {"q": {"c": 1, "b": 1, "x": 0}})
    (ranking,) = kd.read_run(tmp_path / "run.trec").values()
    assert [doc_id for doc_id, _ in ranking] == ["b", "a", "c"] and ranking[2][1] == ranking[1][1]


def test_best_candidates_of_a_teacher_count_as_relevant(tmp_path):
    teacher = artifact(tmp_path / "teacher", {"q": [(name, -i) for i, name in enumerate("vwxyz")], "r": [("a", 1.0)]})
    judge_by_agreement(tmp_path, teacher, ["q", "r"])
    assert kd.read_qrels(tmp_path / "qrels.txt") == {"q": {"v": 3, "w": 2, "x": 1}, "r": {"a": 3}}


def test_labels_of_runs_use_documents_that_all_have(tmp_path):
    for name, doc_ids in (("one", "abcd"), ("two", "dba")):
        kd.write_run({"q": [(doc_id, 1.0) for doc_id in doc_ids]}, tmp_path / f"{name}.trec")
    judgments = artifact(tmp_path / "judgments", qrels={"q": {"a": 1, "c": 1}})
    label_triples(tmp_path, [tmp_path / "one.trec", tmp_path / "two.trec"], None, judgments, 10)
    lines = sorted((tmp_path / "rows.tsv").read_text().splitlines())
    assert lines == ["1\t0\tq\ta\tb", "1\t0\tq\ta\td"]


def test_teacher_is_checked_on_the_queries_that_it_ranked(tmp_path):
    first = artifact(tmp_path / "first", {q: [("x", 2.0), ("y", 1.0)] for q in ("q", "r")})
    good, bad = artifact(tmp_path / "good", {"q": [("y", 2.0), ("x", 1.0)]}), artifact(tmp_path / "bad", {})
    judgments = artifact(tmp_path / "judgments", qrels={"q": {"y": 1}, "r": {"x": 1}})
    check_teacher(tmp_path, good, {"good": good}, first, judgments, "RR@10", False)
    check_teacher(tmp_path, bad, {"bad": bad}, first, judgments, "RR@10", False)  # ranked none of them
    judged = artifact(tmp_path / "judged", qrels={"q": {"y": 1}})
    with pytest.raises(ValueError, match=r"no better than BM25 \(RR@10 0.5000, BM25 0.5000\).*--force"):
        check_teacher(tmp_path, first, {"first": first}, first, judged, "RR@10", False)


# ---- In a job -------------------------------------------------------------------------------------------------------


def test_job_without_judgments_measures_agreement(make_job, trainings, out):
    job = make_job(qrels=None, architectures=["bert_dot"])
    outcome = kd.distill(job)
    run = kd.read_run(out / "rankings/mean/run.trec")
    for query_id, grades in kd.read_qrels(out / "judgments/dev/qrels.txt").items():
        assert list(grades) == [doc_id for doc_id, _ in run[query_id][:3]] and list(grades.values()) == [3, 2, 1]
    assert outcome["test"]["teacher"] == 1.0
    assert "agreement with the teacher, not relevance" in outcome_text(outcome, job)


def test_teachers_on_any_scale_count_alike(make_job, trainings, tmp_path, out, tokenizer, pair_scores):
    other = kd.load_ranker(tmp_path / "teacher")
    torch.nn.init.normal_(other._classification_layer.weight, std=100)
    kd.Ranker(other, tokenizer).save_pretrained(tmp_path / "other")
    job = make_job(architectures=["bert_dot"])
    job.teachers.append(str(tmp_path / "other"))
    kd.distill(job)
    one, two, mean = (
        np.array(pair_scores(out / "scores" / name / "rows.tsv")) for name in ("teacher", "other", "mean")
    )
    assert two.std() > 10 * one.std()
    margins = [scores[0] - scores[1] for scores in (one / one.std(), two / two.std(), mean)]
    assert np.corrcoef(margins[0] + margins[1], margins[2])[0, 1] > 0.98  # nearly: it standardises over distinct pairs


def test_bm25_teaches_by_the_scores_of_the_candidates(make_job, trainings, out):
    job = make_job(architectures=["bert_dot"], k=2)  # so that it misses positives
    job.teachers.append("bm25")
    assert [cost.seconds < 0.1 for cost in make_plan(job) if cost.name == "rankings/bm25"] == [True]
    outcome = kd.distill(job)
    run = {query_id: dict(ranking) for query_id, ranking in kd.read_run(out / "candidates/train/run.trec").items()}
    for row in kd.load_teacher_scores(out / "scores/bm25/rows.tsv").rows:
        assert row["teacher_scores"] == pytest.approx([run[row["query_id"]][doc_id] for doc_id in row["doc_ids"]])
    held_out = [kd.read_run(out / "candidates" / split / "run.trec") for split in ("dev", "test")]
    assert kd.read_run(out / "rankings/bm25/run.trec") == held_out[0] | held_out[1]
    missed = [query_id for query_id in run if len(run[query_id]) > 2]  # the positive is last, with the lowest score
    assert missed and all(run[q][f"d{q[1:]}"] == min(run[q].values()) for q in missed)
    assert {"BM25", "teacher", "teacher teacher"} <= outcome["test"].keys() and "teacher bm25" not in outcome["test"]
    card = next((out / "students/bert_dot").glob("teacher-*/chosen/ranker/README.md"))
    assert "teacher and BM25" in card.read_text()
    with pytest.raises(ValueError, match="no better than BM25"):
        kd.distill(dataclasses.replace(job, teachers=["bm25"], force=False))


def test_bm25_teaches_again_for_other_candidates(make_job, trainings, out):
    runs = []
    for k in (4, 8):
        kd.distill(make_job(teachers=["bm25"], architectures=["bert_dot"], k=k))
        runs.append(kd.read_run(out / "rankings/bm25/run.trec"))
    assert [max(map(len, run.values())) for run in runs] == [4, 8]


def test_rows_of_scores_are_trained_on_as_they_are(make_job, trainings, tmp_path, out):
    rng = np.random.default_rng(0)
    lines = [f"{rng.normal():.3f}\t{rng.normal():.3f}\tq{i}\td{i}\td{(i + 7) % 60}\n" for i in range(40)]
    (tmp_path / "scores.tsv").write_text("".join(lines))
    outcome = kd.distill(make_job(scores=[str(tmp_path / "scores.tsv")], architectures=["bert_dot"]))
    card = (out / "students/bert_dot/teacher-margin_mse/chosen/ranker/manifest.json").read_text()
    assert '"name": "scores.tsv"' in card and '"rows": 40' in card
    labels = [line.split("\t") for line in (out / "labels/rows.tsv").read_text().splitlines()]
    assert labels == [["1", "0", *line.strip().split("\t")[2:]] for line in lines]
    held_out = {split: set(kd.read_qrels(out / "judgments" / split / "qrels.txt")) for split in ("dev", "test")}
    assert held_out["dev"] | held_out["test"] == {f"q{i}" for i in range(40, 60)}
    assert outcome["queries"]["train"] == 40 and "teacher" not in outcome["test"]


def test_runs_of_other_systems_are_teachers(make_job, trainings, tmp_path, out):
    rng = random.Random(5)
    scores = {f"q{i}": {f"d{j}": rng.random() for j in (i, *rng.sample(range(60), 12))} for i in range(60)}
    shorter = {query_id: dict(list(docs.items())[:8]) for query_id, docs in scores.items()}
    for name, of_system in (("one", scores), ("two", shorter)):
        run = kd.Run({q: sorted(docs.items(), key=lambda pair: -pair[1]) for q, docs in of_system.items()})
        kd.write_run(run, tmp_path / f"{name}.trec")
    paths = [str(tmp_path / f"{name}.trec") for name in ("one", "two")]
    outcome = kd.distill(make_job(scores=paths, architectures=["bert_dot"]))
    for row in kd.load_teacher_scores(out / "scores/one.trec/rows.tsv").rows:
        (_, negative), query_id = row["doc_ids"], row["query_id"]
        assert row["teacher_scores"][1] == pytest.approx(scores[query_id][negative], abs=1e-6)
        assert negative in shorter[query_id]  # what one of them did not score is not a negative
    assert {"teacher", "teacher one.trec", "teacher two.trec"} < outcome["test"].keys()


def test_run_of_training_queries_only_is_not_in_the_table(make_job, trainings, tmp_path):
    train = Context(make_job(architectures=["bert_dot"])).splits["train"]
    rng, run = random.Random(5), kd.Run()
    for query_id in train:
        doc_ids = dict.fromkeys([query_id.replace("q", "d"), *(f"d{j}" for j in rng.sample(range(60), 5))])
        run[query_id] = [(doc_id, 1 / (1 + i)) for i, doc_id in enumerate(doc_ids)]
    kd.write_run(run, tmp_path / "one.trec")
    outcome = kd.distill(make_job(scores=[str(tmp_path / "one.trec")], architectures=["bert_dot"], force=False))
    assert "teacher" not in outcome["test"] and "bert_dot teacher" in outcome["test"]


def test_judged_documents_without_text_teach_nothing(make_job, trainings, tmp_path, out):
    with (tmp_path / "qrels.txt").open("a") as file:
        file.writelines(f"q{i} 0 gone{i} 1\n" for i in range(60))
    kd.distill(make_job(architectures=["bert_dot"], triples_per_query=20))
    assert "gone" not in (out / "labels/rows.tsv").read_text()
    assert "gone" in (out / "judgments/test/qrels.txt").read_text()


def test_better_single_teacher_is_reported(make_job, tmp_path, caplog):
    candidates = prepare(Workspace(tmp_path / "out"), Context(make_job())).candidates.values()
    runs = [kd.read_run(candidate.path / "run.trec") for candidate in candidates]
    for name, sign in (("good", 1), ("bad", -5)):  # the judged passage first, and last
        scored = {q: [(d, sign * float(d[1:] == q[1:])) for d, _ in run[q]] for run in runs for q in run}
        kd.write_run(scored, tmp_path / f"{name}.trec")
    job = make_job(scores=[str(tmp_path / f"{name}.trec") for name in ("bad", "good")])
    with caplog.at_level("WARNING"):
        prepare(Workspace(tmp_path / "other"), Context(job))
    assert "good.trec ranks the" in caplog.text
    assert "better than the mean of the teachers (RR@10 1.0000" in caplog.text


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_teachers_of_one_name_get_numbers(make_job):
    job = dataclasses.replace(make_job(), teachers=["x/a", "y/a", "z/a-0", "mean"])
    assert name_sources(job) == {"a-0": "x/a", "a-1": "y/a", "a-0-2": "z/a-0", "mean-3": "mean"}


def test_weak_teacher_stops_the_job(make_job, trainings):
    with pytest.raises(ValueError, match=r"no better than BM25 \(RR@10 [.\d]+, BM25 [.\d]+\).*--force"):
        kd.distill(make_job(force=False))
    assert trainings == []


def test_output_of_another_collection_is_kept(make_job, tmp_path, out):
    Workspace(out).claim({"collection": tmp_path / "collection.tsv", "queries": tmp_path / "queries.tsv"})
    (tmp_path / "collection.tsv").write_text("d0\tapple\n")
    for run in (kd.distill, make_plan):
        with pytest.raises(ValueError, match="out was made from another collection; give another output folder"):
            run(make_job())


def test_collection_with_a_repeated_id_is_refused(make_job, tmp_path, out):
    with (tmp_path / "collection.tsv").open("a") as file:
        file.write((tmp_path / "collection.tsv").read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"collection\.tsv has 1 documents under the id of another"):
        kd.distill(make_job())
    assert not out.exists()


def test_several_processes_are_refused(make_job, monkeypatch):
    monkeypatch.setattr(context, "processes", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="distill is one process"):
        kd.distill(make_job())


def test_second_job_in_one_output_is_refused(make_job, out, trainings):
    with locked(out), pytest.raises(ValueError, match="out is in use by process"):
        kd.distill(make_job())
    assert trainings == []


def test_files_that_no_step_wrote_are_kept(make_job, tmp_path, out, trainings):
    (out / "rankings").mkdir(parents=True)
    (tmp_path / "teacher").rename(out / "rankings/teacher")
    job = dataclasses.replace(make_job(), teachers=[str(out / "rankings/teacher")])
    for call in (make_plan, kd.distill):
        with pytest.raises(FileExistsError, match="rankings/teacher contains files that no step wrote"):
            call(job)
    assert kd.load_ranker(out / "rankings/teacher")
    (out / "best").mkdir()
    (out / "best/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="best does not hold a ranker of an earlier call"):
        kd.distill(make_job(architectures=["bert_dot"]))
    assert (out / "best/notes.txt").read_text() == "mine"
