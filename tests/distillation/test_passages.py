"""`distill` on a collection of passages: judgments are of documents, students learn from passages."""

from pathlib import Path

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.data.passages import split_documents
from hf_kd_ranking.distillation.wording import outcome_text


@pytest.fixture
def split(make_job, tokenizer, tmp_path) -> kd.TextStore:
    """Documents of 8 tokens in passages of 4."""
    whole = kd.TextStore.from_tsv(tmp_path / "collection.tsv")
    return split_documents(whole, tokenizer, "4/3", tmp_path / "split")


def document(passage_id: str) -> str:
    return passage_id.partition("#")[0]


def check_documents(runs: list[Path]) -> None:
    """Assert that runs are of documents."""
    assert runs
    for path in runs:
        for ranking in kd.read_run(path).values():
            assert all("#" not in doc_id for doc_id, _ in ranking), path


@pytest.mark.parametrize("purpose", ["rerank", "search"])
def test_passages_are_taught_and_documents_measured(make_job, split, out, tmp_path, purpose):
    settings = {"architectures": ["bert_dot"], "collection": str(split.folder), "purpose": purpose}
    teachers = [str(tmp_path / "teacher"), "bm25"] if purpose == "search" else [str(tmp_path / "teacher")]
    job = make_job()
    if purpose == "search":
        settings |= {"max_document_length": 5, "fusion": False}
    for name, value in (settings | {"teachers": teachers}).items():
        setattr(job, name, value)
    outcome = kd.distill(job)
    # The two passages of 4 tokens are cut where the limit is 5 with special tokens; the third has 2 tokens.
    expected = 2 / 3 if purpose == "search" else 0.0
    assert outcome["cuts"]["bert_dot teacher"]["cut_texts"] == pytest.approx(expected, abs=1e-4)
    sentence = "of the documents are cut"
    card = Path(outcome["folders"]["bert_dot teacher"], "README.md").read_text()
    assert sentence in outcome_text(outcome, job) and sentence in Path(outcome["page"]).read_text()
    assert "% of the documents and leaves out" in card
    check_documents([path for path in out.rglob("run.trec") if path.stat().st_size])
    qrels = kd.read_qrels(out / "judgments/test/qrels.txt")
    queries = kd.TextStore.from_tsv(tmp_path / "queries.tsv")
    pipeline = kd.load_pipeline(outcome["folder"])
    run = pipeline.search_run({query_id: queries[query_id] for query_id in qrels}, k=8)
    assert kd.evaluate_run(run, qrels, ("RR@10",))["RR@10"] == pytest.approx(outcome["test"][outcome["chosen"]])

    bm25 = kd.BM25Index.build(split)
    teacher = kd.Ranker.from_pretrained(tmp_path / "teacher")
    for row in kd.load_teacher_scores(out / "lists/no_teacher/rows.jsonl").rows:
        assert document(row["doc_ids"][0]) == row["query_id"].replace("q", "d")
        [found] = bm25._rank([queries[row["query_id"]]], len(split))
        best = next(id_ for id_, _ in found if document(id_) == document(row["doc_ids"][0]))
        assert row["doc_ids"][0] == best
    if purpose == "rerank":
        for row in kd.load_teacher_scores(out / "lists/teacher/rows.jsonl").rows:
            assert document(row["doc_ids"][0]) == row["query_id"].replace("q", "d")
            for passage_id, score in zip(row["doc_ids"], row["teacher_scores"], strict=True):
                passages = [id_ for id_ in split.ids() if document(id_) == document(passage_id)]
                scores = teacher.score(queries[row["query_id"]], split[passages])
                assert score == pytest.approx(scores.max(), abs=1e-4)
                assert score == pytest.approx(scores[passages.index(passage_id)], abs=1e-4)
