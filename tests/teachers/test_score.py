"""Teacher rows of a model: each distinct pair once, in the order of the source, whatever interrupts the work."""

import json
import random
import re
import zlib
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import datasets
import numpy as np
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking import artifacts
from hf_kd_ranking.teachers import score
from hf_kd_ranking.teachers.load import Teacher

QUERIES = {f"q{i}": f"query {i}" for i in range(6)}
DOCUMENTS = {f"d{i}": f"document {i}" for i in range(20)}


def hashed(query: str, document: str) -> float:
    return np.float32(zlib.crc32(f"{query}|{document}".encode()) / 2**31 - 1)


class Calls(Counter):
    """A teacher whose score is a hash of the texts, and how often it was asked for each pair."""

    def teacher(self, fingerprint: str = "hash", fail_at: int | None = None) -> Teacher:
        asked = []

        def scores(queries, documents) -> np.ndarray:
            if len(asked) == fail_at:
                raise RuntimeError("the machine is gone")
            asked.append(len(queries))
            self.update(zip(queries, documents, strict=True))
            return np.array([hashed(*pair) for pair in zip(queries, documents, strict=True)], dtype=np.float32)

        return Teacher("hash", scores, fingerprint)


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def stores(tmp_path, private_cache) -> tuple[kd.TextStore, kd.TextStore]:
    return make_stores(tmp_path)


def make_stores(folder: Path, documents: dict[str, str] = DOCUMENTS) -> tuple[kd.TextStore, kd.TextStore]:
    for name, texts in {"queries": QUERIES, "collection": documents}.items():
        (folder / f"{name}.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in texts.items()))
    return tuple(kd.TextStore.from_file(folder / f"{name}.tsv") for name in ("queries", "collection"))


rng = random.Random(0)
ROWS = [(f"q{rng.randrange(6)}", *(f"d{i}" for i in rng.sample(range(20), 2))) for _ in range(60)]
PAIRS = {(query, doc) for query, *docs in ROWS for doc in docs}


@pytest.fixture
def triples(tmp_path) -> Path:
    return write_triples(tmp_path)


def write_triples(folder: Path) -> Path:
    path = folder / "triples.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in ROWS))
    return path


def read(path: Path) -> list[tuple]:
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return [(np.float32(pos), np.float32(neg), *ids) for pos, neg, *ids in rows]


def wanted(rows=ROWS) -> list[tuple]:
    return [(*(hashed(QUERIES[q], DOCUMENTS[d]) for d in docs), q, *docs) for q, *docs in rows]


# ---- Rows in, rows out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs_per_block", [7, 16_384])
def test_each_distinct_pair_is_scored_once(triples, stores, calls, tmp_path, monkeypatch, pairs_per_block):
    monkeypatch.setattr(score, "PAIRS_PER_BLOCK", pairs_per_block)
    counts = kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    assert read(tmp_path / "out.tsv") == wanted()
    assert calls == Counter((QUERIES[q], DOCUMENTS[d]) for q, d in PAIRS)
    assert counts == {"rows": 60, "pairs": len(PAIRS), "resumed": 0}
    assert len(PAIRS) < 100, "no pair appears twice"
    assert not (tmp_path / "out.tsv.parts").exists()


def test_each_document_is_read_once_except_where_blocks_meet(triples, stores, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "PAIRS_PER_BLOCK", 7)
    documents_of_calls = []

    def scores(queries, documents) -> np.ndarray:
        documents_of_calls.append(set(documents))
        return np.zeros(len(queries), np.float32)

    kd.score_teacher(Teacher("zero", scores, "zero"), triples, *stores, tmp_path / "out.tsv")
    assert len(documents_of_calls) > 10
    distinct = set().union(*documents_of_calls)
    assert sum(map(len, documents_of_calls)) < len(distinct) + len(documents_of_calls)


def test_scores_have_all_digits_of_float32(triples, stores, calls, tmp_path):
    kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    rows = kd.load_teacher_scores(tmp_path / "out.tsv").rows
    assert [np.float32(pair[0]) for pair in rows["teacher_scores"]] == [row[0] for row in wanted()]


def test_scores_of_the_source_are_ignored(triples, stores, calls, tmp_path):
    lines = triples.read_text().splitlines()
    triples.write_text("\n" + "".join(f"0.5\t1e9\t{line}\n" for line in lines))
    kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    assert read(tmp_path / "out.tsv") == wanted()


@pytest.mark.parametrize("five", [False, True])
def test_data_set_is_scored_like_a_file(stores, calls, tmp_path, monkeypatch, five):
    monkeypatch.setattr(score, "ROWS_AT_ONCE", 13)
    columns = dict(zip(("query_id", "pos_id", "neg_id"), zip(*ROWS, strict=True), strict=True))
    columns |= {"pos_score": [0.0] * 60, "neg_score": [0.0] * 60} if five else {}
    dataset = datasets.Dataset.from_dict(columns)
    dataset = dataset.select(range(59, -1, -1))  # rows by an index, as after a shuffle
    counts = kd.score_teacher(calls.teacher(), dataset, *stores, tmp_path / "out.tsv")
    assert read(tmp_path / "out.tsv") == wanted(ROWS[::-1])
    assert counts["rows"] == 60


def test_integer_ids_of_a_data_set_find_their_texts(tmp_path, calls):
    (tmp_path / "texts.tsv").write_text("7\tquery 1\n40\tdocument 1\n-3\tdocument 2\n")
    store = kd.TextStore.from_file(tmp_path / "texts.tsv")
    dataset = datasets.Dataset.from_dict({"query_id": [7], "pos_id": [40], "neg_id": [-3]})
    kd.score_teacher(calls.teacher(), dataset, store, store, tmp_path / "out.tsv")
    assert read(tmp_path / "out.tsv") == [
        (hashed("query 1", "document 1"), hashed("query 1", "document 2"), "7", "40", "-3")
    ]


LISTS = [{"query_id": q, "doc_ids": list(dict.fromkeys(docs))} for q, *docs in ROWS[:5]]
LISTS.append({"query_id": "q1", "doc_ids": ["d3", "d1", "d4", "d2"]})


@pytest.mark.parametrize("form", ["jsonl", "rows"])
def test_lists_are_scored_and_written_as_lists(stores, calls, tmp_path, form):
    source = kd.load_teacher_scores(datasets.Dataset.from_list(LISTS))
    if form == "jsonl":
        source = tmp_path / "lists.jsonl"
        lists = [row | {"teacher_scores": [0] * len(row["doc_ids"])} for row in LISTS]
        source.write_text("".join(json.dumps(row) + "\n" for row in lists))
    counts = kd.score_teacher(calls.teacher(), source, *stores, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert counts["rows"] == len(LISTS)
    for row, given in zip(rows, LISTS, strict=True):
        scores = [float(hashed(QUERIES[row["query_id"]], DOCUMENTS[doc])) for doc in given["doc_ids"]]
        assert row == given | {"teacher_scores": scores}
    with pytest.raises(ValueError, match=r"more than two documents do not fit into TSV; give a \.jsonl file"):
        kd.score_teacher(Calls().teacher(), source, *stores, tmp_path / "out.tsv")
    assert not (tmp_path / "out.tsv.parts").exists()


RUN = kd.Run({"q3": [("d1", 9.0), ("d2", 8.0), ("d7", 7.0)], "q0": [("d1", 3.0)]})


@pytest.mark.parametrize("source", ["run", "out.trec", "out.run"])
def test_run_is_ordered_by_the_teacher(stores, calls, tmp_path, source):
    given = RUN
    if source != "run":
        given = tmp_path / source.replace("out", "in")
        kd.write_run(RUN, given)
    counts = kd.score_teacher(calls.teacher(), given, *stores, tmp_path / "out.trec")
    found = kd.read_run(tmp_path / "out.trec")
    assert {query: dict(ranking) for query, ranking in found.items()} == {
        query: {doc: float(hashed(QUERIES[query], DOCUMENTS[doc])) for doc, _ in ranking}
        for query, ranking in RUN.items()
    }
    assert [doc for doc, _ in found["q3"]] != ["d1", "d2", "d7"], "the order of the teacher is that of the run"
    assert list(found) == ["q3", "q0"]
    assert counts == {"rows": 4, "pairs": 4, "resumed": 0}


def test_scores_equal_those_of_the_ranker(model, tokenizer, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "PAIRS_PER_BLOCK", 20)
    ranker = kd.Ranker(model, tokenizer, batch_size=3)
    ranker.save_pretrained(tmp_path / "model")
    stores = kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")
    kd.score_teacher(str(tmp_path / "model"), toy / "scores.tsv", *stores, tmp_path / "out.tsv")
    rows = kd.load_teacher_scores(tmp_path / "out.tsv").rows[:]
    source = kd.load_teacher_scores(toy / "scores.tsv").rows[:]
    assert (rows["query_id"], rows["doc_ids"]) == (source["query_id"], source["doc_ids"])
    doc_ids, scores = np.array(rows["doc_ids"]), np.array(rows["teacher_scores"])
    for side in (0, 1):
        by_hand = ranker.score(stores[0][rows["query_id"]], stores[1][doc_ids[:, side]])
        np.testing.assert_allclose(scores[:, side], by_hand, rtol=1e-5, atol=1e-5)


# ---- Interruptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 1, 5])
def test_failed_run_resumes_with_the_finished_blocks(triples, stores, calls, tmp_path, monkeypatch, block):
    monkeypatch.setattr(score, "PAIRS_PER_BLOCK", 8)
    kd.score_teacher(Calls().teacher(), triples, *stores, tmp_path / "whole.tsv")
    with pytest.raises(RuntimeError, match="the machine is gone"):
        kd.score_teacher(calls.teacher(fail_at=block), triples, *stores, tmp_path / "out.tsv")
    assert not (tmp_path / "out.tsv").exists()
    assert sum(calls.values()) == 8 * block
    counts = kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    assert counts == {"rows": 60, "pairs": len(PAIRS), "resumed": 8 * block}
    assert set(calls.values()) == {1}, "a pair was scored twice"
    assert (tmp_path / "out.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert not (tmp_path / "out.tsv.parts").exists()


@pytest.mark.parametrize("step", range(10))
def test_run_stopped_at_any_write_resumes(triples, stores, calls, tmp_path, monkeypatch, step):
    monkeypatch.setattr(score, "PAIRS_PER_BLOCK", 16)
    kd.load_teacher_scores(triples)  # its table is not counted among the writes
    put_in_place, written = artifacts._put_in_place, []

    def stop(temporary, path):
        if len(written) == step:
            raise OSError(28, "No space left on device")
        written.append(path)
        put_in_place(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "_put_in_place", stop)
        is_stopped = step <= 1 + len(PAIRS) // 16 + 1  # the description, the blocks, the output
        with pytest.raises(OSError, match="No space left") if is_stopped else nullcontext():
            kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").exists() is not is_stopped
    if is_stopped:
        counts = kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
        assert counts["resumed"] == min(max(step - 1, 0) * 16, len(PAIRS))
    assert read(tmp_path / "out.tsv") == wanted()


def test_work_folder_without_description_is_not_resumed(triples, stores, calls, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda folder, **_: None)
        kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    (tmp_path / "out.tsv.parts" / artifacts.DESCRIPTION).unlink()
    counts = kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv", overwrite=True)
    assert counts["resumed"] == 0


def other_rows(folder: Path, triples: Path, teacher: Teacher) -> tuple:
    triples.write_text("".join("\t".join(row) + "\n" for row in ROWS[::-1]))
    return teacher, triples, *make_stores(folder)


def other_texts(folder: Path, triples: Path, teacher: Teacher) -> tuple:
    return teacher, triples, *make_stores(folder, DOCUMENTS | {"d7": "another text"})


def other_teacher(folder: Path, triples: Path, teacher: Teacher) -> tuple:
    return Calls().teacher("other weights"), triples, *make_stores(folder)


@pytest.mark.parametrize(
    ("change", "what"), [(other_rows, "pairs"), (other_texts, "pairs"), (other_teacher, "teacher")]
)
def test_unfinished_work_of_other_inputs_is_kept(triples, stores, calls, tmp_path, monkeypatch, change, what):
    monkeypatch.setattr(score, "PAIRS_PER_BLOCK", 8)
    with pytest.raises(RuntimeError):
        kd.score_teacher(calls.teacher(fail_at=3), triples, *stores, tmp_path / "out.tsv")
    old = triples.read_text()
    message = f"{tmp_path}/out.tsv.parts holds the unfinished work of another {what};"
    with pytest.raises(ValueError, match=re.escape(message)):
        kd.score_teacher(*change(tmp_path, triples, calls.teacher()), tmp_path / "out.tsv")
    triples.write_text(old)
    counts = kd.score_teacher(calls.teacher(), triples, *make_stores(tmp_path), tmp_path / "out.tsv")
    assert counts["resumed"] == 24
    assert read(tmp_path / "out.tsv") == wanted()


# ---- Errors ---------------------------------------------------------------------------------------------------------

UNKNOWN = {
    "query": ("q0\td1\td2\n\nq9\td1\td2\n", "line 3: id 'q9' is not among the 6 texts of {}/queries.tsv"),
    "positive": ("q0\td99\td2\n", "line 1: id 'd99' is not among the 20 texts of {}/collection.tsv"),
    "negative": ("1\t2\tq0\td1\td2\n1\t2\tq0\td1\t 2\n", "line 2: id ' 2' is not among the 20 texts of"),
}


@pytest.mark.parametrize(("content", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_id_without_a_text_is_named_before_scoring(triples, stores, calls, tmp_path, content, message):
    triples.write_text(content)
    with pytest.raises(KeyError) as error:
        kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    assert error.value.args[0].startswith(f"{triples} {message.format(tmp_path)}")
    assert not calls and not (tmp_path / "out.tsv").exists()


def test_id_of_a_run_without_a_text_is_named(stores, calls, tmp_path):
    with pytest.raises(KeyError, match="id 'd99' is not among the 20 texts of"):
        kd.score_teacher(calls.teacher(), kd.Run(RUN, q1=[("d99", 1.0)]), *stores, tmp_path / "out.trec")


def test_inputs_can_be_corrected_after_an_error(triples, stores, calls, tmp_path):
    good = triples.read_text()
    triples.write_text(good + "q0\td1\td99\n")
    with pytest.raises(KeyError, match="line 61"):
        kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    triples.write_text(good)
    kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    assert read(tmp_path / "out.tsv") == wanted()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_score_that_is_not_finite_is_refused(triples, stores, tmp_path, bad):
    teacher = Teacher("broken", lambda queries, _: np.array([0.5] * (len(queries) - 1) + [bad], dtype=np.float32), "x")
    with pytest.raises(ValueError, match="broken gave a score that is not finite"):
        kd.score_teacher(teacher, triples, *stores, tmp_path / "out.tsv")
    assert not (tmp_path / "out.tsv").exists()


def test_existing_output_needs_overwrite(triples, stores, calls, tmp_path):
    (tmp_path / "out.tsv").write_text("old")
    with pytest.raises(FileExistsError, match=re.escape(f"{tmp_path / 'out.tsv'} exists")):
        kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").read_text() == "old" and not calls
    kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv", overwrite=True)
    assert read(tmp_path / "out.tsv") == wanted()


BAD_TRIPLES = {
    "two columns": ("q0\td1\n", "line 1: needed 5 tab-separated columns"),
    "another width": (
        "q0\td1\td2\nq0\td1\n",
        "line 2: needed 3 tab-separated columns (query_id, pos_id",
    ),
    "four columns": ("1\t2\tq0\td1\td2\n1\tq0\td1\td2\n", "line 2: needed 5 tab-separated columns"),
}


@pytest.mark.parametrize(("content", "message"), BAD_TRIPLES.values(), ids=BAD_TRIPLES)
def test_malformed_triples_are_named_by_line(triples, stores, calls, tmp_path, content, message):
    triples.write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{triples} {message}')}"):
        kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")


def test_missing_triples_and_columns_are_refused(stores, calls, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'none.tsv'} does not exist")):
        kd.score_teacher(calls.teacher(), tmp_path / "none.tsv", *stores, tmp_path / "out.tsv")
    dataset = datasets.Dataset.from_dict({"query_id": ["q0"], "pos_id": ["d1"]})
    with pytest.raises(ValueError, match="has the columns query_id, pos_id; needed"):
        kd.score_teacher(calls.teacher(), dataset, *stores, tmp_path / "out.tsv")
    assert not (tmp_path / "out.tsv.parts").exists()
