"""`distill` without queries, or with generated training queries and real ones to measure on."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.cli import main
from hf_kd_ranking.data.passages import split_documents
from hf_kd_ranking.data.runs import write_qrels
from hf_kd_ranking.distillation.context import Context
from hf_kd_ranking.distillation.generation import with_queries
from hf_kd_ranking.distillation.pipeline import make_plan
from hf_kd_ranking.errors import InputError


@pytest.fixture
def job(make_job, tmp_path) -> kd.DistillJob:
    """A job without queries, on documents of two sentences."""
    lines = []
    for line in (tmp_path / "collection.tsv").read_text().splitlines():
        doc_id, text = line.split("\t")
        words = text.split()
        lines.append(f"{doc_id}\t{' '.join(words[:5])}. {' '.join(words[5:])} and water.\n")
    (tmp_path / "collection.tsv").write_text("".join(lines))
    return replace(make_job(qrels=None, force=False, conditions=["teacher"]), queries=None)


@pytest.fixture
def real(job, tmp_path) -> kd.DistillJob:
    """The same job, with real queries to test on."""
    tested = {f"q{i}": {f"d{i}": 1} for i in range(0, 60, 3)}
    write_qrels(tested, tmp_path / "test.txt")
    files = {"queries": str(tmp_path / "queries.tsv"), "test_qrels": str(tmp_path / "test.txt")}
    return replace(job, **files, query_generator="first_sentence")


def test_queries_are_generated_once_and_split_by_document(job):
    made = with_queries(job)
    texts = kd.TextStore.from_tsv(job.collection)
    queries = kd.TextStore.from_tsv(made.queries)
    for query_id, text in queries.items():
        assert texts[query_id.removesuffix("-q1")].startswith(text)
    written = Path(made.queries).stat().st_mtime_ns
    assert with_queries(job) == made and Path(made.queries).stat().st_mtime_ns == written
    assert with_queries(replace(job, query_documents=30)).queries != made.queries
    assert (made.synthetic_splits, made.agreement_splits) == (["train", "dev", "test"], ["dev", "test"])
    context = Context(made)
    assert min(map(len, context.splits.values())) > 5
    assert context.overlaps["positives of train and test"] == 0


def test_all_queries_of_a_document_are_in_one_split(job, tmp_path):
    """Also if their texts differ; the file is one that `teacher queries` wrote."""
    queries = {f"d{i}-q{n}": f"{n} of {i}" for i in range(60) for n in (1, 2, 3)}
    (tmp_path / "own.tsv").write_text("".join(f"{query_id}\t{text}\n" for query_id, text in queries.items()))
    write_qrels({query_id: {query_id[:-3]: 1} for query_id in queries}, tmp_path / "own.qrels.txt")
    made = with_queries(replace(job, query_generator=str(tmp_path / "own.tsv")))
    assert made.queries == str(tmp_path / "own.tsv")
    of_document = {}
    for split, query_ids in Context(made).splits.items():
        for query_id in query_ids:
            of_document.setdefault(query_id[:-3], []).append(split)
    assert {len(splits) for splits in of_document.values()} == {3}
    assert {len(set(splits)) for splits in of_document.values()} == {1}


def test_real_queries_are_only_measured_on(real):
    made = with_queries(real)
    assert (made.synthetic_splits, made.agreement_splits) == (["train", "dev"], ["dev"])
    context = Context(made)
    assert context.splits["test"] == [f"q{i}" for i in range(0, 60, 3)]
    for split in ("train", "dev"):
        assert all(query_id.endswith("-q1") for query_id in context.splits[split])
    assert "q1" not in context.queries  # it is not judged


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qrels": "qrels.txt", "query_generator": "first_sentence"}, "leave out --qrels and --scores"),
        ({"qrels": "qrels.txt"}, "Give --queries: --qrels and --scores name queries"),
        ({"query_generator": "nothing.tsv"}, "The generated queries file nothing.tsv does not exist"),
        (
            {"query_generator": "queries.tsv"},
            r"judgments of generated queries file .*queries.qrels.txt does not exist",
        ),
        ({"query_generator": "./no/model"}, "The model ./no/model does not exist"),
        ({"queries_per_document": 0}, "Options must be above 0, got queries_per_document 0"),
        ({"teachers": ["bm25"]}, "The teacher bm25 needs judgments"),
        ({"teachers": ["bert_cat"]}, "A teacher is trained on judgments"),
        ({"query_generator": "title"}, "has no titles"),
    ],
)
def test_what_cannot_work_is_refused(job, tmp_path, changes, message):
    for name in ("qrels", "query_generator"):
        value = changes.get(name)
        if value in ("qrels.txt", "queries.tsv"):
            changes = {**changes, name: str(tmp_path / value)}
    with pytest.raises((InputError, FileNotFoundError), match=message):
        with_queries(replace(job, **changes))


def test_real_and_generated_queries_have_different_ids(real, tmp_path):
    (tmp_path / "queries.tsv").write_text("d1-q1\tmoon\n")
    write_qrels({"d1-q1": {"d1": 1}}, tmp_path / "test.txt")
    with pytest.raises(InputError, match=r"The id 'd1-q1' is one of .* and of a generated query"):
        with_queries(real)
    write_qrels({"other": {"d1": 1}}, tmp_path / "test.txt")
    with pytest.raises(InputError, match="None of the queries of --dev-qrels and --test-qrels has a text"):
        with_queries(real)


def test_plan_does_not_let_a_model_write(job):
    with pytest.raises(InputError, match=r"A plan needs the queries, which 127\.0\.0\.1-9 has not written"):
        make_plan(replace(job, query_generator="http://127.0.0.1:9"))


def test_figures_on_generated_queries_are_synthetic(job, monkeypatch, capsys, tmp_path):
    arguments = ["distill", "--collection", job.collection, "--output", job.output, "--teacher", job.teachers[0]]
    arguments += ["--model", job.model_name, "--k", "8", "--candidates-per-query", "8", "--candidate-depth", "8"]
    arguments += ["--held-out", "0.5", "--learning-rates", "1e-3", "--max-query-length", "8", "--measure", "RR@10"]
    arguments += ["--max-document-length", "16", "--batch-size", "8", "--architectures", "bert_dot"]
    monkeypatch.setattr("sys.argv", ["hf-kd-ranking", *arguments, "--conditions", "teacher"])
    with pytest.raises(SystemExit) as exit_:
        main()
    printed = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "Synthetic: the queries of train, dev, test are generated (first_sentence, weak)" in printed
    head = (
        "| RR@10, test, synthetic (agreement with the teacher, not relevance) | with BM25 | dev, synthetic (agreement"
    )
    assert head in printed and "| pipeline | RR@10, dev, synthetic (agreement" in printed
    assert re.search(r"Chosen on dev, synthetic: .* On the \d+ test queries, synthetic: RR@10", printed)
    findings = [line for line in printed.splitlines() if "corrected" in line]
    assert findings and all(line.endswith("queries, synthetic.") for line in findings)
    page = (Path(job.output) / "report.html").read_text()
    assert "collection.tsv (synthetic queries)" in page and "Synthetic: the queries of train, dev, test" in page
    card = next((Path(job.output) / "students").rglob("README.md")).read_text()
    assert "collection.tsv (synthetic queries)" in card


def test_figures_on_real_queries_are_not_synthetic(real):
    outcome = kd.distill(replace(real, architectures=["bert_dot"]))
    assert (outcome["synthetic"], outcome["agreement"]) == (["train", "dev"], ["dev"])
    assert re.search(r"Chosen on dev, synthetic: .* On the 20 test queries: RR@10", outcome["verdict"])
    card = next((Path(real.output) / "students").rglob("README.md")).read_text()
    assert "of collection.tsv (synthetic queries)" in card and "| held-out queries of collection.tsv |" in card
    judged = kd.read_qrels(Path(real.output) / "judgments" / "test" / "qrels.txt")
    assert judged == {f"q{i}": {f"d{i}": 1} for i in range(0, 60, 3)}
    assert json.loads(Path(with_queries(real).qrels).with_name("queries.json").read_text())["is_weak"]


def test_queries_of_passages_are_judged_by_document(job, tokenizer, tmp_path):
    lines = []
    for line in Path(job.collection).read_text().splitlines():
        doc_id, text = line.replace(".", "").split("\t")
        words = text.split()
        parts = [f"{' '.join(part).capitalize()}. Moon water." for part in (words[:6], words[4:])]
        lines.append(f"{doc_id}\t{' '.join(parts)}\n")
    Path(job.collection).write_text("".join(lines))
    split = split_documents(kd.TextStore.from_tsv(job.collection), tokenizer, "10/10", tmp_path / "split")
    assert len(split) == 120
    job = replace(job, collection=str(split.folder), architectures=["bert_dot"])
    made = with_queries(job)
    counts = json.loads(Path(made.queries).with_suffix(".json").read_text())
    assert (counts["documents"], counts["documents_without_query"] < 5) == (60, True)  # by near-duplicates
    assert (counts["generated"], counts["queries"] > 60) == (120, True)  # of both passages
    for query_id, grades in kd.read_qrels(made.qrels).items():
        assert grades == {query_id.partition("-")[0]: 1}
    outcome = kd.distill(job)
    assert outcome["overlaps"]["positives of train and test"] == 0
    rows = kd.load_teacher_scores(Path(job.output, "lists/teacher/rows.jsonl")).rows
    trained = set(Context(made).splits["train"])
    assert len(rows) > 20
    for row in rows:
        assert row["query_id"] in trained
        assert row["doc_ids"][0].partition("#")[0] == row["query_id"].partition("-")[0]
