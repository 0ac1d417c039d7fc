"""Teacher rows: every layout becomes lists, values stay exact, files read back byte for byte, bad lines are named."""

import gzip
import json
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.data.rows import LIST_COLUMNS, PAIR_COLUMNS, TeacherRows, as_pairs, write_teacher_scores

GOLDEN = Path(__file__).parent.parent / "golden" / "teacher_scores.tsv"
ROW = "1.5\t-2\t7\t12\t3\n"
LIST_ROW = {"query_id": 7, "doc_ids": [12, 3, 5], "teacher_scores": [1.5, -2.0, 0.25]}
SHORT_ROW = {"query_id": 8, "doc_ids": [1, 2], "teacher_scores": [0.5, 1.0]}
PAIRS = {"pos_score": [1.5, 0.0], "neg_score": [-2.0, 1.0], "query_id": [7, 8], "pos_id": [12, 1], "neg_id": [3, 2]}
TRIPLES = {name: PAIRS[name] for name in ("query_id", "pos_id", "neg_id")}
MARGINS = {"query_id": [7, 8], "positive_id": [12, 1], "negative_id": [3, 2], "score": [3.5, -1.0]}
AS_LISTS = {"query_id": [7, 8], "doc_ids": [[12, 3], [1, 2]], "teacher_scores": [[1.5, -2.0], [0.0, 1.0]]}


def written(tmp_path, content: str | bytes | list[dict], name: str = "") -> Path:
    path = tmp_path / (name or ("scores.jsonl" if isinstance(content, list) else "scores.tsv"))
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda b: b, lambda b: b.replace(b"\n", b"\r\n"), lambda b: b[:-1]])
def test_published_file_equals_its_plain_parse(tmp_path, change):
    rows = kd.load_teacher_scores(written(tmp_path, change(GOLDEN.read_bytes())))
    wanted = []
    for line in GOLDEN.read_text().splitlines():
        pos_score, neg_score, query_id, pos_id, neg_id = line.split("\t")
        scores = [float(np.float32(pos_score)), float(np.float32(neg_score))]
        wanted.append({"query_id": int(query_id), "doc_ids": [int(pos_id), int(neg_id)], "teacher_scores": scores})
    assert len(rows) == 40
    assert list(rows) == wanted


def test_scores_are_float32_and_plain_integer_ids_int64(tmp_path):
    rows = kd.load_teacher_scores(written(tmp_path, "0.1\t16777217\t7\t123456789012345678\t-3\n"))
    features = rows.rows.features
    types = features["query_id"].dtype, features["doc_ids"].feature.dtype, features["teacher_scores"].feature.dtype
    assert types == ("int64", "int64", "float32")
    assert rows[0] == {
        "query_id": 7,
        "doc_ids": [123456789012345678, -3],
        "teacher_scores": [float(np.float32(0.1)), 16777216.0],
    }


@pytest.mark.parametrize("id_", ["007", "-0", "+3", "7 ", "d7", "1" * 19, "a b", "文書"])
def test_one_other_id_keeps_all_ids_strings(tmp_path, id_):
    rows = kd.load_teacher_scores(written(tmp_path, ROW + f"1\t2\t8\t{id_}\t5\n" + ROW))
    assert rows.rows["doc_ids"][:] == [["12", "3"], [id_, "5"], ["12", "3"]]
    assert rows.rows["query_id"][:] == ["7", "8", "7"]


def test_rows_are_named_by_their_lines(tmp_path):
    path = written(tmp_path, "\n" + ROW + "\n\n" + "4\t5\t8\t1\t2\n")
    rows = kd.load_teacher_scores(path)
    assert rows.rows["query_id"][:] == [7, 8]
    assert [rows.row_name(row) for row in (0, 1)] == [f"{path} line 2", f"{path} line 5"]
    assert rows.select([1]).row_name(0) == f"the selection from {path} row 0"


def test_triples_have_no_scores(tmp_path):
    rows = kd.load_teacher_scores(written(tmp_path, "7\t12\t3\n8\t1\t2\n"))
    assert not rows.has_scores
    assert list(rows) == [{"query_id": 7, "doc_ids": [12, 3]}, {"query_id": 8, "doc_ids": [1, 2]}]


def test_uneven_lists_keep_order_ids_and_scores(tmp_path):
    rows = kd.load_teacher_scores(written(tmp_path, [LIST_ROW, SHORT_ROW]))
    assert list(rows) == [LIST_ROW, SHORT_ROW]
    assert rows.has_scores and not rows.has_only_margins


def test_lists_with_one_string_id_have_string_ids(tmp_path):
    rows = kd.load_teacher_scores(written(tmp_path, [LIST_ROW, LIST_ROW | {"doc_ids": [1, "007", 2]}]))
    assert rows.rows["doc_ids"][:] == [["12", "3", "5"], ["1", "007", "2"]]
    assert rows[0]["query_id"] == "7"


def test_compressed_lists_are_lists(tmp_path):
    path = written(tmp_path, gzip.compress(json.dumps(SHORT_ROW).encode()), "lists.jsonl.gz")
    assert kd.load_teacher_scores(path)[0] == SHORT_ROW


@pytest.mark.parametrize("is_file", [True, False])
@pytest.mark.parametrize("columns", [PAIRS, MARGINS, TRIPLES, AS_LISTS], ids=["pairs", "margins", "triples", "lists"])
def test_tables_of_every_layout_become_lists(tmp_path, columns, is_file):
    table = datasets.Dataset.from_dict(columns | {"note": ["x", "y"]})
    table.to_parquet(tmp_path / "scores.parquet")
    rows = kd.load_teacher_scores(tmp_path / "scores.parquet" if is_file else table)
    wanted = dict(AS_LISTS)
    if columns is MARGINS:
        wanted["teacher_scores"] = [[3.5, 0.0], [-1.0, 0.0]]
    if columns is TRIPLES:
        del wanted["teacher_scores"]
    assert {name: rows.rows[name][:] for name in rows.rows.column_names} == wanted
    assert rows.has_only_margins == (columns is MARGINS)
    assert rows.row_name(1) == f"{tmp_path / 'scores.parquet' if is_file else 'the data set'} row 1"
    assert kd.load_teacher_scores(rows) is rows


def test_columns_of_integers_and_strings_keep_their_ids():
    table = datasets.Dataset.from_dict(PAIRS | {"neg_id": ["007", "7"]})
    assert kd.load_teacher_scores(table).rows["doc_ids"][:] == [["12", "007"], ["1", "7"]]


def test_batches_cover_all_rows_in_order(tmp_path):
    rows = kd.load_teacher_scores(written(tmp_path, [LIST_ROW, SHORT_ROW, LIST_ROW]))
    batches = list(rows.batches(["doc_ids"], size=2))
    assert [start for start, _ in batches] == [0, 2]
    assert [batch["doc_ids"].to_pylist() for _, batch in batches] == [[[12, 3, 5], [1, 2]], [[12, 3, 5]]]
    pairs = as_pairs(next(kd.load_teacher_scores(written(tmp_path, ROW)).batches())[1])
    assert {name: values.to_pylist() for name, values in pairs.items()} == {name: PAIRS[name][:1] for name in PAIRS}


@pytest.mark.parametrize("row", [ROW, ROW.split("\t", 2)[2], json.dumps(LIST_ROW) + "\n"])
def test_byte_order_marks_of_joined_files_are_not_read(tmp_path, row):
    name = "lists.jsonl" if row.startswith("{") else "scores.tsv"
    plain = kd.load_teacher_scores(written(tmp_path, row * 2, name)).rows[:]
    assert kd.load_teacher_scores(written(tmp_path, f"\ufeff{row}" * 2, name)).rows[:] == plain


# ---- The Arrow file -------------------------------------------------------------------------------------------------


def test_arrow_file_is_built_once(tmp_path, monkeypatch):
    path = written(tmp_path, ROW)
    first = kd.load_teacher_scores(path, cache_dir=tmp_path / "mine").rows
    (file,) = [Path(entry["filename"]) for entry in first.cache_files]
    assert file.is_relative_to(tmp_path / "mine")
    monkeypatch.setattr("hf_kd_ranking.data.rows.write_arrow", lambda *_: pytest.fail("built twice"))
    second = kd.load_teacher_scores(path, cache_dir=tmp_path / "mine").rows
    assert second.cache_files == first.cache_files
    assert second[:] == first[:]


def test_file_changed_in_place_is_built_anew(tmp_path):
    path = written(tmp_path, ROW)
    assert kd.load_teacher_scores(path)[0]["teacher_scores"][0] == 1.5
    path.write_text(ROW.replace("1.5", "2.5"))  # the same size
    os.utime(path, ns=(0, 0))
    assert kd.load_teacher_scores(path)[0]["teacher_scores"][0] == 2.5


def test_refused_file_leaves_nothing_in_the_cache(tmp_path):
    path = written(tmp_path, ROW + "1\t2\t3\n")
    with pytest.raises(ValueError, match="line 2"):
        kd.load_teacher_scores(path, cache_dir=tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


# ---- Errors ---------------------------------------------------------------------------------------------------------

LAYOUT = "tab-separated columns (pos_score, neg_score, query_id, pos_id, neg_id)"
BAD_FILES = {
    "four columns": (ROW + "1\t2\t3\t4\n", f"line 2: needed 5 {LAYOUT}, got 4: '1\\t2\\t3\\t4'"),
    "six columns": ("1\t2\t3\t4\t5\t6\n" + ROW, f"line 1: needed 5 {LAYOUT}, got 6"),
    "scores in triples": ("7\t1\t2\n" + ROW, "line 2: needed 3 tab-separated columns (query_id, pos_id, neg_id), got"),
    "blanks": (ROW + "  \n", f"line 2: needed 5 {LAYOUT}, got 1"),
    "word": (ROW + "abc\t2\t7\t1\t3\n", "line 2: pos_score must be a finite number, got 'abc'"),
    "no score": (ROW + "1\t\t7\t1\t3\n", "line 2: neg_score must be a finite number, got ''"),
    "NaN": ("nan\t2\t7\t1\t3\n", "line 1: pos_score must be a finite number, got 'nan'"),
    "inf": (ROW + "1\t-inf\t7\t1\t3\n", "line 2: neg_score must be a finite number, got '-inf'"),
    "bad UTF-8": (ROW.encode() + b"1\t2\t7\t\xe9\t3\n", "line 2: byte 0xe9 at column 7 is not UTF-8"),
    "blank lines only": ("\n\n", "holds no rows"),
    "after a blank line": (ROW + "\nabc\t2\t7\t1\t3\n", "line 3: pos_score must be a finite number, got 'abc'"),
    "float32 overflow": (ROW + "1e39\t2\t7\t1\t3\n", "line 2: pos_score"),
    "bare CR ends a line": (ROW + "1\t2\t7\ra\t1\t3\n", "line 2"),
    "fewer scores": ([LIST_ROW | {"teacher_scores": [1, 2]}], "line 1: 3 doc_ids and 2 teacher_scores"),
    "no negative": ([LIST_ROW | {"doc_ids": [1], "teacher_scores": [1]}], "line 1: 1 doc_ids and 1 teacher_scores"),
    "no scores": (
        [LIST_ROW, {"query_id": 1, "doc_ids": [1, 2, 3]}],
        f"line 2: needed {', '.join(LIST_COLUMNS)}, missing",
    ),
    "no list of ids": ([LIST_ROW, LIST_ROW | {"doc_ids": None}], "line 2: doc_ids and teacher_scores must be lists"),
    "one score": ([LIST_ROW | {"teacher_scores": 3}], "line 1: doc_ids and teacher_scores must be lists, got [12, 3"),
    "NaN in a list": ([LIST_ROW | {"teacher_scores": [1, float("nan"), 2]}], "line 1: teacher_scores must be finite"),
    "number as a word": ([LIST_ROW | {"teacher_scores": [1, "2", 3]}], "line 1: teacher_scores must be finite"),
    "huge integer": ([LIST_ROW | {"teacher_scores": [1, 10**400, 3]}], "line 1: teacher_scores must be finite"),
    "a missing id": (
        [LIST_ROW, LIST_ROW | {"query_id": None}],
        "line 2: query_id must be a string or an integer, got",
    ),
    "a list as id": ([LIST_ROW | {"doc_ids": [1, [2], 3]}], "line 1: doc_ids must be a string or an integer, got [2]"),
    "a truth value": ([LIST_ROW | {"teacher_scores": [1, True, 3]}], "line 1: teacher_scores must be finite"),
    "underscore": (ROW + "1_0\t2\t7\t1\t3\n", "line 2: pos_score must be a finite number, got '1_0'"),
    "word in a list": ([LIST_ROW | {"teacher_scores": [1, "high", 2]}], "line 1: teacher_scores must be finite"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_refused_with_its_name_and_line(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path} {message}')}"):
        kd.load_teacher_scores(path)


def test_missing_and_empty_files_are_refused(tmp_path):
    message = re.escape(f"The teacher scores file {tmp_path / 'no'} does not exist")
    with pytest.raises(FileNotFoundError, match=message):
        kd.load_teacher_scores(tmp_path / "no")
    path = written(tmp_path, "")
    with pytest.raises(ValueError, match=re.escape(f"The teacher scores file {path} is empty")):
        kd.load_teacher_scores(path)


def test_table_of_no_layout_is_refused_with_its_columns():
    table = datasets.Dataset.from_dict(PAIRS).remove_columns("neg_id")
    with pytest.raises(ValueError) as error:
        kd.load_teacher_scores(table)
    assert "has the columns pos_score, neg_score, query_id, pos_id;" in str(error.value)
    assert f"needed {', '.join(LIST_COLUMNS)}; {', '.join(PAIR_COLUMNS)}; " in str(error.value)


@pytest.mark.parametrize("columns", [PAIRS, MARGINS, TRIPLES], ids=["pairs", "margins", "triples"])
def test_other_layouts_in_teacher_rows_name_the_function_that_reads_them(columns):
    with pytest.raises(ValueError, match=r"TeacherRows needs .*, got .*; load_teacher_scores\(dataset\) reads pairs"):
        TeacherRows(datasets.Dataset.from_dict(columns))


def test_table_without_rows_is_refused():
    with pytest.raises(ValueError, match="the data set holds no teacher rows"):
        kd.load_teacher_scores(datasets.Dataset.from_dict({name: [] for name in PAIR_COLUMNS}))


def lists(doc_ids: list, scores: list) -> dict:
    return {"query_id": [100] * len(doc_ids), "doc_ids": doc_ids, "teacher_scores": scores}


NAN = float("nan")
BAD_TABLES = {
    "NaN": (PAIRS | {"pos_score": [0.5, NAN]}, "row 1: pos_score must be finite numbers"),
    "inf": (PAIRS | {"neg_score": [0.5, -np.inf]}, "row 1: neg_score must be finite numbers"),
    "no score": (PAIRS | {"neg_score": [0.5, None]}, "row 1: neg_score has a missing value"),
    "no id": (PAIRS | {"query_id": [7, None]}, "row 1: query_id has a missing value"),
    "NaN in lists": (lists([[1, 2, 3], [3, 4]], [[1.0, 2.0, 3.0], [1.0, NAN]]), "row 1: teacher_scores must be fin"),
    "fewer scores": (lists([[1, 2], [3, 4]], [[1.0, 2.0], [1.0]]), "row 1: 2 doc_ids and 1 teacher_scores"),
    "no negative": (lists([[1, 2], [3]], [[1.0, 2.0], [1.0]]), "row 1: 1 doc_ids and 1 teacher_scores"),
    "no list": (lists([[1, 2], None], [[1.0, 2.0]] * 2), "row 1: doc_ids has a missing value"),
    "no lists": (
        PAIRS | {"doc_ids": [1, 2], "teacher_scores": [1.0, 2.0]},
        "row 0: doc_ids must be a list, got int64",
    ),
    "no id in a list": (lists([[1, 2], [3, None]], [[1.0, 2.0]] * 2), "row 1: doc_ids has a missing value"),
}


@pytest.mark.parametrize("is_file", [True, False])
@pytest.mark.parametrize(("columns", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_table_is_refused_with_its_row(tmp_path, columns, message, is_file):
    table = datasets.Dataset.from_dict(columns)
    table.to_parquet(tmp_path / "scores.parquet")
    source = tmp_path / "scores.parquet" if is_file else "the data set"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{source} {message}')}"):
        kd.load_teacher_scores(source if is_file else table)


def test_ids_that_are_not_text_are_refused(tmp_path):
    columns = {"query_id": [1], "positive_id": [b"\xff"], "negative_id": ["b"], "score": [1.0]}
    pq.write_table(pa.table(columns), tmp_path / "scores.parquet")
    with pytest.raises(kd.InputError, match=r"scores\.parquet is not a Parquet file, or is damaged: Invalid UTF8"):
        kd.load_teacher_scores(tmp_path / "scores.parquet")


# ---- Writing --------------------------------------------------------------------------------------------------------

STRING_IDS = {"query_id": ["q 1", "ü"], "pos_id": ["007", "a"], "neg_id": ["文書", "b"]}
SCORES = {"pos_score": np.float32([1 / 3, -1e-12]), "neg_score": np.float32([3e38, 16777216.0])}


def test_published_pairs_are_written_byte_for_byte(tmp_path):
    rows = kd.load_teacher_scores(written(tmp_path, "1.5\t-2\t7\t12\t3\n0\t1\t8\t1\t2\n"))
    write_teacher_scores(rows, tmp_path / "again.tsv")
    assert (tmp_path / "again.tsv").read_bytes() == (tmp_path / "scores.tsv").read_bytes()
    write_teacher_scores(rows.select([1, 0, 1]), tmp_path / "selected.tsv")
    assert kd.load_teacher_scores(tmp_path / "selected.tsv").rows["query_id"][:] == [8, 7, 8]


@pytest.mark.parametrize("suffix", ["tsv", "parquet", "jsonl"])
@pytest.mark.parametrize("ids", [TRIPLES, STRING_IDS], ids=["integers", "strings"])
def test_pairs_read_back_as_they_were_written(tmp_path, suffix, ids):
    rows = kd.load_teacher_scores(datasets.Dataset.from_dict(SCORES | ids))
    write_teacher_scores(rows, tmp_path / f"scores.{suffix}")
    again = kd.load_teacher_scores(tmp_path / f"scores.{suffix}")
    assert list(again) == list(rows)
    assert again.rows.features["doc_ids"].feature.dtype == rows.rows.features["doc_ids"].feature.dtype


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("ids", [[[1, 2, 3], [4, -5]], [["007", "a", "b"], ["文書", "c"]]], ids=["int", "str"])
def test_uneven_lists_read_back_as_they_were_written(tmp_path, suffix, ids):
    rows = kd.load_teacher_scores(datasets.Dataset.from_dict(lists(ids, [[1.5, -2.0, 0.25], [1e8, 0.0]])))
    write_teacher_scores(rows, tmp_path / f"lists.{suffix}")
    again = list(kd.load_teacher_scores(tmp_path / f"lists.{suffix}"))
    assert [row["teacher_scores"] for row in again] == [row["teacher_scores"] for row in rows]
    assert [row["doc_ids"] for row in again] == ids


@pytest.mark.parametrize("suffix", ["tsv", "parquet"])
def test_triples_read_back_as_they_were_written(tmp_path, suffix):
    rows = kd.load_teacher_scores(datasets.Dataset.from_dict(STRING_IDS))
    write_teacher_scores(rows, tmp_path / f"triples.{suffix}")
    assert list(kd.load_teacher_scores(tmp_path / f"triples.{suffix}")) == list(rows)
    if suffix == "tsv":
        assert (tmp_path / "triples.tsv").read_text() == "q 1\t007\t文書\nü\ta\tb\n"


def test_margins_read_back_as_margins(tmp_path):
    rows = kd.load_teacher_scores(datasets.Dataset.from_dict(MARGINS))
    write_teacher_scores(rows, tmp_path / "margins.parquet")
    assert datasets.Dataset.from_parquet(str(tmp_path / "margins.parquet"))[:] == MARGINS
    assert kd.load_teacher_scores(tmp_path / "margins.parquet").has_only_margins


@pytest.mark.parametrize(
    ("columns", "suffix", "message"),
    [
        (lists([[1, 2, 3]], [[1.0, 2.0, 3.0]]), "tsv", "rows of more than two documents do not fit into columns"),
        (MARGINS, "tsv", "only .parquet can say that rows hold margins"),
        (MARGINS, "jsonl", "only .parquet can say that rows hold margins"),
        (TRIPLES, "jsonl", "rows without scores are written as .tsv or .parquet"),
    ],
)
def test_rows_that_a_layout_cannot_hold_are_refused(tmp_path, columns, suffix, message):
    rows = kd.load_teacher_scores(datasets.Dataset.from_dict(columns))
    path = tmp_path / f"rows.{suffix}"
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        write_teacher_scores(rows, path)
    assert not path.exists()


@pytest.mark.parametrize("suffix", ["tsv", "parquet", "jsonl"])
def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch, suffix):
    path = written(tmp_path, "old", f"scores.{suffix}")
    rows = kd.load_teacher_scores(datasets.Dataset.from_dict(PAIRS))

    def fail(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_kd_ranking.artifacts._put_in_place", fail)
    with pytest.raises(OSError, match="No space left"):
        write_teacher_scores(rows, path)
    assert path.read_text() == "old"
    assert [entry for entry in tmp_path.iterdir() if entry.name.startswith("scores")] == [path]
