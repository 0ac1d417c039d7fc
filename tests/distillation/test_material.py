"""The first half of a job, as a whole: from texts and teachers to the lists that students learn from."""

import random
from pathlib import Path

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.distillation.candidates import ranking
from hf_kd_ranking.distillation.context import Context
from hf_kd_ranking.distillation.job import TargetNotMetError
from hf_kd_ranking.distillation.material import Material, prepare
from hf_kd_ranking.distillation.teaching import rows_file
from hf_kd_ranking.distillation.work import Workspace


def prepared(job: kd.DistillJob) -> Material:
    """Prepare the material of a job without trained teachers."""
    return prepare(Workspace(Path(job.output)), Context(job), train_teacher=None)


def lists(data: Material, condition: str) -> list[dict]:
    return list(kd.load_teacher_scores(rows_file(data.rows[condition])).rows)


@pytest.fixture
def write_scores(tmp_path):
    """write_scores(name, query ids, sign): a run with random scores, the judged document first for sign 1."""

    def write(name: str, query_ids: list[str], sign: int = 1) -> str:
        rng, run = random.Random(name), kd.Run()
        for query_id in query_ids:
            others = [doc_id for doc_id in (f"d{j}" for j in rng.sample(range(60), 8)) if doc_id[1:] != query_id[1:]]
            scored = [(doc_id, rng.random()) for doc_id in others] + [(f"d{query_id[1:]}", 2.0 * sign)]
            run[query_id] = sorted(scored, key=lambda pair: -pair[1])
        kd.write_run(run, tmp_path / f"{name}.trec")
        return str(tmp_path / f"{name}.trec")

    return write


def test_weak_teacher_stops_before_its_long_work(make_job, out):
    with pytest.raises(TargetNotMetError, match=r"no better than their candidates were ranked \(RR@10 0\.\d+, first"):
        prepared(make_job(force=False))
    assert (out / "teacher_scores/teacher/dev").exists() and not (out / "teacher_scores/teacher/train").exists()


def test_bm25_teaches_with_judgments(make_job):
    data = prepared(make_job(teachers=["bm25"]))
    found = {query_id: dict(scored) for query_id, scored in ranking(data.bm25["train"]).items()}
    for row in lists(data, "teacher"):
        lowest = min(found[row["query_id"]].values())
        expected = [found[row["query_id"]].get(doc_id, lowest) for doc_id in row["doc_ids"]]
        assert row["teacher_scores"] == pytest.approx(expected)
    with pytest.raises(TargetNotMetError, match="no better than their candidates"):
        prepared(make_job(teachers=["bm25"], force=False))


def test_runs_of_other_systems_are_teachers(make_job, write_scores):
    every = [f"q{i}" for i in range(60)]
    paths = [write_scores("one", every), write_scores("two", every)]
    data = prepared(make_job(scores=paths, conditions=["no_teacher", "first_teacher", "teacher"]))
    assert data.candidates.keys() == {"dev", "test"} and data.scores["train"].keys() == {
        "one.trec",
        "two.trec",
        "mean",
    }
    one = {query_id: dict(scored) for query_id, scored in kd.read_run(paths[0]).items()}
    for row in lists(data, "first_teacher"):
        assert row["teacher_scores"] == pytest.approx([one[row["query_id"]][doc_id] for doc_id in row["doc_ids"]])
    mean = {query_id: dict(scored) for query_id, scored in ranking(data.scores["train"]["mean"]).items()}
    for row in lists(data, "teacher"):
        assert row["teacher_scores"] == pytest.approx([mean[row["query_id"]][doc_id] for doc_id in row["doc_ids"]])
    for row in lists(data, "no_teacher"):
        assert row["doc_ids"][0] == f"d{row['query_id'][1:]}" and row["teacher_scores"][:2] == [1.0, 0.0]
        assert set(row["doc_ids"]) <= one[row["query_id"]].keys()


def test_run_of_training_queries_only_is_learnt_from(make_job, write_scores):
    train = Context(make_job()).splits["train"]
    data = prepared(make_job(scores=[write_scores("one", train)], force=False))  # nothing to check it on
    assert {row["query_id"] for row in lists(data, "teacher")} <= set(train)
    assert ranking(data.scores["test"]["mean"]) == {} and len(ranking(data.candidates["test"])) > 2


def test_run_that_lacks_positives_is_learnt_from(make_job, tmp_path, write_scores):
    path = write_scores("one", [f"q{i}" for i in range(60)])
    lines = Path(path).read_text().splitlines(keepends=True)
    lacking = [line for line in lines if line.split()[0][1:] != line.split()[2][1:] or line.startswith("q1")]
    Path(path).write_text("".join(lacking))
    assert lists(prepared(make_job(scores=[path])), "teacher")


def test_rows_of_triples_are_trained_on_as_they_are(make_job, tmp_path):
    rng = random.Random(0)
    for name in ("one", "two"):
        lines = [f"{rng.gauss(1, 1):.3f}\t{rng.gauss(0, 1):.3f}\tq{i}\td{i}\td{(i + 7) % 60}\n" for i in range(40)]
        (tmp_path / f"{name}.tsv").write_text("".join(lines))
    paths = [str(tmp_path / f"{name}.tsv") for name in ("one", "two")]
    data = prepared(make_job(scores=paths[:1]))
    assert data.rows["teacher"] == Path(paths[0]) and data.scores == {}
    assert [row["teacher_scores"] for row in lists(data, "no_teacher")] == [[1.0, 0.0]] * 40
    data = prepared(make_job(scores=paths, conditions=["first_teacher", "teacher"]))
    assert data.rows["first_teacher"] == Path(paths[0])
    assert [row["doc_ids"] for row in lists(data, "teacher")] == [[f"d{i}", f"d{(i + 7) % 60}"] for i in range(40)]


def test_without_judgments_the_teacher_judges(make_job):
    data = prepared(make_job(qrels=None))
    for split in ("dev", "test"):
        scored = ranking(data.scores[split]["teacher"])
        for query_id, grades in kd.read_qrels(data.judgments[split].path / "qrels.txt").items():
            assert grades == {doc_id: 3 - place for place, (doc_id, _) in enumerate(scored[query_id][:3])}
    assert data.rows.keys() == {"teacher"}


def test_candidates_of_the_user_are_reranked_and_mixed_for_training(make_job, tmp_path, encoder, tokenizer):
    model = kd.load_ranker(encoder, "bert_dot", max_query_length=8, max_document_length=16)
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "dense")
    run = {f"q{i}": [(f"d{(i + j) % 60}", -float(j)) for j in range(20)] for i in range(60)}
    kd.write_run(run, tmp_path / "mine.trec")
    sources = ["candidates:0.5", "dense:0.5"]
    job = make_job(candidates=str(tmp_path / "mine.trec"), sources=sources, dense_model=str(tmp_path / "dense"))
    data = prepared(job)
    assert ranking(data.candidates["test"]) == {query: run[query][:8] for query in ranking(data.candidates["test"])}
    dense = kd.read_run(Path(job.output) / "dense_search/run.trec")
    for query_id, mixed in ranking(data.candidates["train"]).items():
        # Half of the eight that each finds, spread over the ranks; then the positive, which is in the run.
        doc_ids = [doc_id for doc_id, _ in run[query_id][:8:2] + dense[query_id][::2]]
        assert [doc_id for doc_id, _ in mixed] == list(dict.fromkeys(doc_ids))


def test_scores_survive_another_number_of_pairs_at_a_time(make_job, monkeypatch):
    from hf_kd_ranking.distillation import teaching

    before = prepared(make_job()).scores["train"]["mean"]
    monkeypatch.setattr(teaching, "score_teacher", None)
    assert prepared(make_job(teacher_batch_size=7)).scores["train"]["mean"] == before
