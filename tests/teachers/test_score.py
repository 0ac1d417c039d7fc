"""Teacher rows of a model: each distinct pair once, in the order of the source, whatever interrupts the work."""

import json
import os
import random
import re
import subprocess
import sys
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.teachers import score
from hf_kd_ranking.teachers.load import Teacher, load_teacher

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
    path = tmp_path / "triples.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in ROWS))
    return path


def read(path: Path) -> list[tuple]:
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return [(np.float32(pos), np.float32(neg), *ids) for pos, neg, *ids in rows]


def wanted(rows=ROWS) -> list[tuple]:
    return [(*(hashed(QUERIES[q], DOCUMENTS[d]) for d in docs), q, *docs) for q, *docs in rows]


# ---- Rows in, rows out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs_per_block", [7, 16_384])
def test_rows_keep_their_order_and_each_distinct_pair_is_scored_once(
    triples, stores, calls, tmp_path, monkeypatch, pairs_per_block
):
    monkeypatch.setattr(score, "PAIRS_PER_BLOCK", pairs_per_block)
    counts = kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    assert read(tmp_path / "out.tsv") == wanted()
    assert calls == Counter((QUERIES[q], DOCUMENTS[d]) for q, d in PAIRS)
    assert counts == {"rows": 60, "pairs": len(PAIRS), "resumed": 0}
    assert len(PAIRS) < 100, "no pair stands twice"
    assert not (tmp_path / "out.tsv.parts").exists()


def test_scores_are_written_with_all_digits_of_float32(triples, stores, calls, tmp_path):
    kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    again = kd.load_teacher_scores(tmp_path / "out.tsv")
    assert [np.float32(value) for value in again["pos_score"]] == [row[0] for row in wanted()]


def test_the_scores_of_five_columns_are_not_read(triples, stores, calls, tmp_path):
    lines = triples.read_text().splitlines()
    triples.write_text("\n" + "".join(f"old\tnan\t{line}\n" for line in lines))
    kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    assert read(tmp_path / "out.tsv") == wanted()


@pytest.mark.parametrize("five", [False, True])
def test_a_data_set_is_scored_like_a_file(stores, calls, tmp_path, monkeypatch, five):
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


RUN = kd.Run({"q3": [("d1", 9.0), ("d2", 8.0), ("d7", 7.0)], "q0": [("d1", 3.0)]})


@pytest.mark.parametrize("source", ["run", "out.trec", "out.run"])
def test_a_run_comes_out_in_the_order_of_the_teacher(stores, calls, tmp_path, source):
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
    assert [doc for doc, _ in found["q3"]] != ["d1", "d2", "d7"], "the teacher's order tells nothing"
    assert list(found) == ["q3", "q0"]
    assert counts == {"rows": 4, "pairs": 4, "resumed": 0}


def test_scores_are_those_of_the_ranker(model, tokenizer, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "PAIRS_PER_BLOCK", 20)
    ranker = kd.Ranker(model, tokenizer, batch_size=3)
    ranker.save_pretrained(tmp_path / "model")
    stores = kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")
    kd.score_teacher(str(tmp_path / "model"), toy / "scores.tsv", *stores, tmp_path / "out.tsv")
    rows = kd.load_teacher_scores(tmp_path / "out.tsv")
    assert [rows[name][:] for name in score.TRIPLE_COLUMNS] == [
        kd.load_teacher_scores(toy / "scores.tsv")[name][:] for name in score.TRIPLE_COLUMNS
    ]
    for side in ("pos", "neg"):
        by_hand = ranker.score(stores[0][rows["query_id"][:]], stores[1][rows[f"{side}_id"][:]])
        np.testing.assert_allclose(rows[f"{side}_score"], by_hand, rtol=1e-5, atol=1e-5)


# ---- Cut off --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 1, 5])
def test_after_a_failure_only_the_open_blocks_are_scored_and_the_file_is_the_same(
    triples, stores, calls, tmp_path, monkeypatch, block
):
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


def test_after_a_failure_while_the_output_is_written_nothing_is_scored_again(
    triples, stores, calls, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(score, "tsv_lines", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    assert [path.name for path in tmp_path.glob("out.tsv*")] == ["out.tsv.parts"]
    counts = kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    assert counts["resumed"] == len(PAIRS)
    assert set(calls.values()) == {1}
    assert read(tmp_path / "out.tsv") == wanted()


def test_a_work_folder_whose_removal_was_cut_off_is_not_gone_on_with(triples, stores, calls, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda folder, **_: None)
        kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    (tmp_path / "out.tsv.parts" / "parts.json").unlink()
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
def test_unfinished_work_on_anything_else_is_refused_and_kept(
    triples, stores, calls, tmp_path, monkeypatch, change, what
):
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


KILLED = """
import json, os, random, signal, sys, time, zlib
import numpy as np
import hf_kd_ranking as kd
from hf_kd_ranking.teachers import score
from hf_kd_ranking.teachers.load import Teacher

folder, triples, queries, documents = sys.argv[1:]
stores = kd.TextStore.open(queries), kd.TextStore.open(documents)
score.PAIRS_PER_BLOCK = 4


def hashes(queries, documents):
    time.sleep(0.03)
    with open(f"{folder}/asked", "a") as file:
        file.write("".join(f"{pair[0]}|{pair[1]}\\n" for pair in zip(queries, documents)))
    pairs = zip(queries, documents)
    return np.array([zlib.crc32("|".join(pair).encode()) / 2**31 - 1 for pair in pairs], dtype=np.float32)


def start():
    child = os.fork()  # which spares each run the imports
    if child == 0:
        try:
            counts = kd.score_teacher(Teacher("hash", hashes, "hash"), triples, *stores, f"{folder}/out.tsv")
            with open(f"{folder}/counts", "w") as file:
                json.dump(counts, file)
        finally:
            os._exit(0)
    return child


killed, rng = 0, random.Random(0)
while not os.path.exists(f"{folder}/counts"):
    child = start()
    time.sleep(rng.uniform(0.02, 0.15))
    if killed < 8:
        os.kill(child, signal.SIGKILL)
    killed += os.waitpid(child, 0)[1] == signal.SIGKILL
print(killed)
"""


def test_a_run_killed_at_any_moment_goes_on_and_loses_a_block_at_most(triples, stores, calls, tmp_path):
    kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "whole.tsv")
    (tmp_path / "script.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "script.py", tmp_path, triples, *(store.folder for store in stores)]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    killed = int(result.stdout)
    assert killed >= 4, "the runs had ended before they were killed"
    assert (tmp_path / "out.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert not (tmp_path / "out.tsv.parts").exists()
    asked = Counter((tmp_path / "asked").read_text().splitlines())
    assert len(asked) == len(PAIRS)
    assert len(PAIRS) <= asked.total() <= len(PAIRS) + 4 * killed
    assert json.loads((tmp_path / "counts").read_text())["pairs"] == len(PAIRS)


SHARED_WORK = """
import sys
from accelerate import PartialState
import hf_kd_ranking as kd
from hf_kd_ranking import blocks
from hf_kd_ranking.teachers import score

model, triples, queries, documents, folder = sys.argv[1:]
state = PartialState(cpu=True)
assert state.num_processes == 2
score.PAIRS_PER_BLOCK = 16
asked, writing = [], blocks.writing
blocks.writing = lambda path, mode="w": asked.append(path.name) or writing(path, mode)
stores = kd.TextStore.open(queries), kd.TextStore.open(documents)
counts = score.score_teacher(kd.load_teacher(model, device="cpu"), triples, *stores, f"{folder}/two.tsv")
with open(f"{folder}/{state.process_index}.txt", "w") as file:
    file.write(" ".join(name for name in asked if name.startswith("block")))
state.destroy_process_group()
"""


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_share_the_blocks_and_write_the_bytes_of_one(
    encoder, tokenizer, toy, tmp_path, monkeypatch, private_cache
):
    monkeypatch.setattr(score, "PAIRS_PER_BLOCK", 16)
    model = kd.BertDot.from_encoder(str(encoder), max_query_length=8, max_document_length=16)
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "model")
    stores = kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")
    with one_thread():  # sums are rounded otherwise by several
        teacher = load_teacher(str(tmp_path / "model"), device="cpu")
        kd.score_teacher(teacher, toy / "scores.tsv", *stores, tmp_path / "one.tsv")
    (tmp_path / "script.py").write_text(SHARED_WORK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [tmp_path / "script.py", tmp_path / "model", toy / "scores.tsv"]
    arguments += [*(store.folder for store in stores), tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "two.tsv").read_bytes() == (tmp_path / "one.tsv").read_bytes()
    assert not (tmp_path / "two.tsv.parts").exists()
    shares = [(tmp_path / f"{rank}.txt").read_text().split() for rank in range(2)]
    assert min(map(len, shares)) >= 3
    assert not set(shares[0]) & set(shares[1])


# ---- Errors ---------------------------------------------------------------------------------------------------------

UNKNOWN = {
    "query": ("q0\td1\td2\n\nq9\td1\td2\n", "line 3: id 'q9' is not among the 6 texts of {}/queries.tsv"),
    "positive": ("q0\td99\td2\n", "line 1: id 'd99' is not among the 20 texts of {}/collection.tsv"),
    "negative": ("1\t2\tq0\td1\td2\n1\t2\tq0\td1\t 2\n", "line 2: id ' 2' is not among the 20 texts of"),
}


@pytest.mark.parametrize(("content", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_id_without_a_text_is_named_with_file_and_line_before_anything_is_scored(
    triples, stores, calls, tmp_path, content, message
):
    triples.write_text(content)
    with pytest.raises(KeyError) as error:
        kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    assert error.value.args[0].startswith(f"{triples} {message.format(tmp_path)}")
    assert not calls and not (tmp_path / "out.tsv").exists()


def test_an_id_of_a_run_without_a_text_is_named(stores, calls, tmp_path):
    with pytest.raises(KeyError, match="id 'd99' is not among the 20 texts of"):
        kd.score_teacher(calls.teacher(), kd.Run(RUN, q1=[("d99", 1.0)]), *stores, tmp_path / "out.trec")


def test_inputs_can_be_put_right_after_an_error(triples, stores, calls, tmp_path):
    good = triples.read_text()
    triples.write_text(good + "q0\td1\td99\n")
    with pytest.raises(KeyError, match="line 61"):
        kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    triples.write_text(good)
    kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    assert read(tmp_path / "out.tsv") == wanted()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_refused(triples, stores, tmp_path, bad):
    teacher = Teacher("broken", lambda queries, _: np.array([0.5] * (len(queries) - 1) + [bad], dtype=np.float32), "x")
    with pytest.raises(ValueError, match="broken gave a score that is not finite"):
        kd.score_teacher(teacher, triples, *stores, tmp_path / "out.tsv")
    assert not (tmp_path / "out.tsv").exists()


def test_an_existing_output_is_kept_unless_it_is_to_be_overwritten(triples, stores, calls, tmp_path):
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
def test_malformed_triples_are_named_by_file_and_line(triples, stores, calls, tmp_path, content, message):
    triples.write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{triples} {message}')}"):
        kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")


def test_missing_triples_and_missing_columns_are_refused(stores, calls, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'none.tsv'} does not exist")):
        kd.score_teacher(calls.teacher(), tmp_path / "none.tsv", *stores, tmp_path / "out.tsv")
    dataset = datasets.Dataset.from_dict({"query_id": ["q0"], "pos_id": ["d1"]})
    with pytest.raises(ValueError, match="Triples need the columns query_id, pos_id, neg_id, missing neg_id"):
        kd.score_teacher(calls.teacher(), dataset, *stores, tmp_path / "out.tsv")
    assert not (tmp_path / "out.tsv.parts").exists()
