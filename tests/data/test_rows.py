"""Teacher rows: exact values in file order, ids as written, one Arrow file; every bad line named; sampled triples."""

import gzip
import json
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.data.rows import (
    LIST_COLUMNS,
    TEACHER_COLUMNS,
    has_only_margins,
    row_name,
    write_teacher_scores,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "teacher_scores.tsv"
ROW = "1.5\t-2\t7\t12\t3\n"
LIST_ROW = {"query_id": 7, "doc_ids": [12, 3, 5], "teacher_scores": [1.5, -2, 0.1]}
PAIRS = {"pos_score": [1.5, 0.0], "neg_score": [-2.0, 1.0], "query_id": [7, 8], "pos_id": [12, 1], "neg_id": [3, 2]}
MARGINS = {"query_id": [7, 8], "positive_id": [12, 1], "negative_id": [3, 2], "score": [3.5, -1.0]}


def written(tmp_path, content: str | bytes | list[dict]):
    path = tmp_path / ("scores.jsonl" if isinstance(content, list) else "scores.tsv")
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda b: b, lambda b: b.replace(b"\n", b"\r\n"), lambda b: b[:-1]])
def test_a_published_file_equals_its_plain_parse_in_every_row(tmp_path, change):
    dataset = kd.load_teacher_scores(written(tmp_path, change(GOLDEN.read_bytes())))
    lines = [line.split("\t") for line in GOLDEN.read_text().splitlines()]
    expected = [(*(float(np.float32(field)) for field in line[:2]), *map(int, line[2:])) for line in lines]
    assert len(expected) == 40
    assert [tuple(row[name] for name in TEACHER_COLUMNS) for row in dataset] == expected


def test_scores_are_float32_and_plain_integer_ids_int64(tmp_path):
    dataset = kd.load_teacher_scores(written(tmp_path, "0.1\t16777217\t7\t123456789012345678\t-3\n"))
    kinds = {name: feature.dtype for name, feature in dataset.features.items()}
    assert kinds == dict.fromkeys(TEACHER_COLUMNS[:2], "float32") | dict.fromkeys(TEACHER_COLUMNS[2:], "int64")
    assert tuple(dataset[0].values()) == (float(np.float32(0.1)), 16777216.0, 7, 123456789012345678, -3)


@pytest.mark.parametrize("id_", ["007", "-0", "+3", "7 ", "d7", "1" * 19, "a b", "文書"])
def test_one_id_that_is_no_plain_integer_keeps_all_as_they_were_written(tmp_path, id_):
    dataset = kd.load_teacher_scores(written(tmp_path, ROW + f"1\t2\t8\t{id_}\t5\n" + ROW))
    assert [dataset[i]["pos_id"] for i in range(3)] == ["12", id_, "12"]
    assert [dataset[i]["query_id"] for i in range(3)] == ["7", "8", "7"]


def test_blank_lines_give_no_row_and_a_row_is_named_by_its_line(tmp_path):
    path = written(tmp_path, "\n" + ROW + "\n\n" + "4\t5\t8\t1\t2\n")
    dataset = kd.load_teacher_scores(path)
    assert dataset["query_id"][:] == [7, 8]
    assert [row_name(dataset, row) for row in (0, 1)] == [f"{path} line 2", f"{path} line 5"]


def test_lists_keep_their_order_ids_and_scores(tmp_path):
    dataset = kd.load_teacher_scores(written(tmp_path, [LIST_ROW, LIST_ROW | {"query_id": 8}]))
    assert dataset[0] == LIST_ROW | {"teacher_scores": [1.5, -2.0, float(np.float32(0.1))]}
    assert (len(dataset), dataset[1]["query_id"]) == (2, 8)


def test_lists_with_one_string_id_have_string_ids(tmp_path):
    dataset = kd.load_teacher_scores(written(tmp_path, [LIST_ROW, LIST_ROW | {"doc_ids": [1, "007", 2]}]))
    assert [row["doc_ids"] for row in dataset] == [["12", "3", "5"], ["1", "007", "2"]]
    assert dataset[0]["query_id"] == "7"


def test_parquet_files_and_data_sets_are_taken_as_they_are(tmp_path):
    dataset = datasets.Dataset.from_dict(PAIRS)
    dataset.to_parquet(tmp_path / "scores.parquet")
    assert kd.load_teacher_scores(dataset)[:] == PAIRS
    assert kd.load_teacher_scores(tmp_path / "scores.parquet")[:] == PAIRS


def test_margins_become_pairs_with_the_margin_kept_and_are_marked():
    margins = datasets.Dataset.from_dict(MARGINS)
    dataset = kd.load_teacher_scores(margins)
    assert dataset[:] == PAIRS | {"pos_score": [3.5, -1.0], "neg_score": [0.0, 0.0]}
    assert has_only_margins(dataset)
    assert not has_only_margins(margins)  # the caller's own is left alone
    assert not has_only_margins(kd.load_teacher_scores(datasets.Dataset.from_dict(PAIRS)))


# ---- The Arrow file -------------------------------------------------------------------------------------------------


def test_rows_are_mapped_from_an_arrow_file_that_is_built_once(tmp_path, monkeypatch):
    path = written(tmp_path, ROW)
    first = kd.load_teacher_scores(path, cache_dir=tmp_path / "mine")
    (file,) = [Path(entry["filename"]) for entry in first.cache_files]
    assert file.is_relative_to(tmp_path / "mine")
    monkeypatch.setattr("hf_kd_ranking.data.rows.write_arrow", lambda *_: pytest.fail("built twice"))
    second = kd.load_teacher_scores(path, cache_dir=tmp_path / "mine")
    assert second.cache_files == first.cache_files
    assert second[:] == first[:]


def test_a_file_changed_in_place_is_built_anew(tmp_path):
    path = written(tmp_path, ROW)
    assert kd.load_teacher_scores(path)[0]["pos_score"] == 1.5
    path.write_text(ROW.replace("1.5", "2.5"))  # the same size
    os.utime(path, ns=(0, 0))
    assert kd.load_teacher_scores(path)[0]["pos_score"] == 2.5


def test_a_refused_file_leaves_nothing_in_the_cache(tmp_path):
    path = written(tmp_path, ROW + "1\t2\t3\n")
    with pytest.raises(ValueError, match="line 2"):
        kd.load_teacher_scores(path, cache_dir=tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


# ---- Errors ---------------------------------------------------------------------------------------------------------

LAYOUT = "tab-separated columns (pos_score, neg_score, query_id, pos_id, neg_id)"
SHORT = {"doc_ids": [1, 2], "teacher_scores": [1, 2]}
BAD_FILES = {
    "four columns": (ROW + "1\t2\t3\t4\n", f"line 2: needed 5 {LAYOUT}, got 4: '1\\t2\\t3\\t4'"),
    "six columns": ("1\t2\t3\t4\t5\t6\n" + ROW, f"line 1: needed 5 {LAYOUT}, got 6"),
    "blanks": (ROW + "  \n", f"line 2: needed 5 {LAYOUT}, got 1"),
    "word": (ROW + "abc\t2\t7\t1\t3\n", "line 2: pos_score must be a finite number, got 'abc'"),
    "no score": (ROW + "1\t\t7\t1\t3\n", "line 2: neg_score must be a finite number, got ''"),
    "NaN": ("nan\t2\t7\t1\t3\n", "line 1: pos_score must be a finite number, got 'nan'"),
    "inf": (ROW + "1\t-inf\t7\t1\t3\n", "line 2: neg_score must be a finite number, got '-inf'"),
    "bad UTF-8": (ROW.encode() + b"1\t2\t7\t\xe9\t3\n", "line 2: byte 0xe9 at column 7 is not UTF-8"),
    "blank lines only": ("\n\n", "holds no rows"),
    "ragged lists": (
        [LIST_ROW, LIST_ROW | SHORT],
        "line 2: 2 doc_ids and 2 teacher_scores, where the file's lists have 3; all lists must have one length",
    ),
    "fewer scores": ([LIST_ROW | {"teacher_scores": [1, 2]}], "line 1: 3 doc_ids and 2 teacher_scores"),
    "no negative": ([LIST_ROW | {"doc_ids": [1], "teacher_scores": [1]}], "line 1: 1 doc_ids and 1 teacher_scores"),
    "no scores": (
        [LIST_ROW, {"query_id": 1, "doc_ids": [1, 2, 3]}],
        f"line 2: needed {', '.join(LIST_COLUMNS)}, missing",
    ),
    "no list of ids": ([LIST_ROW, LIST_ROW | {"doc_ids": None}], "line 2: doc_ids and teacher_scores must be lists"),
    "one score": ([LIST_ROW | {"teacher_scores": 3}], "line 1: doc_ids and teacher_scores must be lists, got [12, 3"),
    "NaN in a list": ([LIST_ROW | {"teacher_scores": [1, float("nan"), 2]}], "line 1: teacher_scores must be finite"),
}
HARD_TO_LOCATE = {
    "a blank line is blamed": (ROW + "\nabc\t2\t7\t1\t3\n", "line 3: pos_score must be a finite number, got 'abc'"),
    "float32 overflow": (ROW + "1e39\t2\t7\t1\t3\n", "line 2: pos_score"),
    "bare CR ends a line": (ROW + "1\t2\t7\ra\t1\t3\n", "line 2"),
    "word in a list": ([LIST_ROW | {"teacher_scores": [1, "high", 2]}], "line 1: teacher_scores must be finite"),
}


@pytest.mark.parametrize(
    ("content", "message"),
    [pytest.param(*case, id=name) for name, case in BAD_FILES.items()]
    + [pytest.param(*case, id=name) for name, case in HARD_TO_LOCATE.items()],
)
def test_a_bad_file_is_refused_with_its_name_and_line(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path} {message}')}"):
        kd.load_teacher_scores(path)


def test_a_row_of_a_data_set_with_a_long_description_has_a_name():
    dataset = datasets.Dataset.from_dict({"pos_score": [1.0]})
    dataset.info.description = "scores " * 100
    assert row_name(dataset, 3) == "row 3 of the teacher scores"


def test_a_missing_and_an_empty_file_are_told_apart(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"The teacher scores file {tmp_path / 'no'} does not exist")
    ):
        kd.load_teacher_scores(tmp_path / "no")
    path = written(tmp_path, "")
    with pytest.raises(ValueError, match=re.escape(f"The teacher scores file {path} is empty")):
        kd.load_teacher_scores(path)


@pytest.mark.parametrize("left_out", [TEACHER_COLUMNS[1], TEACHER_COLUMNS[4]])
def test_a_data_set_without_the_columns_is_refused_naming_what_it_has_and_what_is_needed(left_out):
    dataset = datasets.Dataset.from_dict(PAIRS).remove_columns(left_out)
    with pytest.raises(ValueError) as error:
        kd.load_teacher_scores(dataset)
    assert f"has the columns {', '.join(name for name in PAIRS if name != left_out)};" in str(error.value)
    assert f"need {', '.join(TEACHER_COLUMNS)} or {', '.join(LIST_COLUMNS)}" in str(error.value)


def test_a_data_set_without_rows_is_refused():
    with pytest.raises(ValueError, match="the data set holds no teacher rows"):
        kd.load_teacher_scores(datasets.Dataset.from_dict({name: [] for name in TEACHER_COLUMNS}))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), None])
@pytest.mark.parametrize("name", ["pos_score", "neg_score", "teacher_scores"])
def test_a_table_with_a_score_that_is_no_finite_number_is_refused_with_its_row(tmp_path, name, bad):
    ids = {"query_id": [7, 8], "doc_ids": [[1, 2, 3]] * 2} if name == "teacher_scores" else PAIRS
    values = [[0.5, 1.0, 2.0], [0.5, 1.0, bad]] if name == "teacher_scores" else [0.5, bad]
    dataset = datasets.Dataset.from_dict(ids | {name: values})
    dataset.to_parquet(tmp_path / "scores.parquet")
    for source, table in {
        "the data set": dataset,
        str(tmp_path / "scores.parquet"): tmp_path / "scores.parquet",
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(source)} row 1: {name} must be finite numbers"):
            kd.load_teacher_scores(table)


# ---- Sampling -------------------------------------------------------------------------------------------------------

RUN = kd.Run({q: [(f"d{i}", 20.0 - i) for i in range(12)] for q in ("q2", "q1", "unjudged", "only-zeros")})
QRELS = {
    "q1": {"d3": 1, "d5": 2, "far": 1, "d7": 0},
    "q2": {"d0": 3},
    "only-zeros": {"d1": 0},
    "not-in-run": {"d1": 1},
}


@pytest.mark.parametrize("seed", range(5))
def test_a_sampled_positive_is_judged_relevant_and_a_negative_is_a_candidate_that_is_not(seed):
    rows = list(kd.sample_triples(RUN, QRELS, per_query=8, seed=seed))
    assert [row["query_id"] for row in rows] == ["q2"] * 8 + ["q1"] * 8  # the run's order; none without a positive
    for row in rows:
        positives = {doc_id for doc_id, grade in QRELS[row["query_id"]].items() if grade >= 1}
        assert row["pos_id"] in positives
        assert row["neg_id"] in {doc_id for doc_id, _ in RUN[row["query_id"]]} - positives
    assert len({tuple(row.values()) for row in rows}) == 16


def test_more_triples_than_there_are_gives_every_pair_once():
    rows = kd.sample_triples(RUN, QRELS, per_query=1000)
    assert sorted(rows.filter(lambda row: row["query_id"] == "q2")["neg_id"]) == sorted(f"d{i}" for i in range(1, 12))
    assert len({tuple(row.values()) for row in rows}) == len(rows) == 1 * 11 + 3 * 10


def test_from_a_minimum_grade_on_lower_grades_are_neither_positives_nor_negatives():
    rows = kd.sample_triples(RUN, QRELS, per_query=1000, minimum_grade=2)
    pairs = {(row["pos_id"], row["neg_id"]) for row in rows if row["query_id"] == "q1"}
    assert pairs == {("d5", f"d{i}") for i in range(12) if QRELS["q1"].get(f"d{i}", 0) <= 0}


def test_sampling_depends_on_the_seed_and_the_query_alone():
    sample = kd.sample_triples(RUN, QRELS, per_query=3)[:]
    assert kd.sample_triples(kd.Run(reversed(RUN.items())), QRELS, per_query=3)[3:]["neg_id"] == sample["neg_id"][:3]
    assert kd.sample_triples(RUN, QRELS, per_query=3)[:] == sample
    assert kd.sample_triples(RUN, QRELS, per_query=3, seed=43)[:] != sample


def test_nothing_to_sample_is_an_error_with_count_and_grade():
    with pytest.raises(
        ValueError, match=r"No triple: none of the 4 queries of the run has both a document of grade >= 4"
    ):
        kd.sample_triples(RUN, QRELS, minimum_grade=4)


RANKED = kd.Run({"q": [(f"d{i}", 20.0 - i) for i in range(1, 11)]})
JUDGED = {"q": {"d2": 1, "d9": 1}}


def negatives(**options) -> set[str]:
    return set(kd.sample_triples(RANKED, JUDGED, per_query=1000, **options)["neg_id"])


@pytest.mark.parametrize(
    ("ranks", "wanted"),
    [(None, range(1, 11)), ((1, 3), (1, 3)), ((3, 3), (3,)), ((8, 10), (8, 10)), ((7, 99), (7, 8, 10))],
)
def test_negatives_come_from_the_ranks_of_the_run(ranks, wanted):
    assert negatives(ranks=ranks) == {f"d{rank}" for rank in wanted} - set(JUDGED["q"])


def test_positives_come_from_any_rank_or_none():
    rows = kd.sample_triples(RANKED, {"q": {"d9": 1, "far": 1}}, per_query=1000, ranks=(1, 1))
    assert {tuple(row.values()) for row in rows} == {("q", "d9", "d1"), ("q", "far", "d1")}


def test_ranks_without_an_unjudged_document_give_no_triple():
    with pytest.raises(ValueError, match="No triple: none of the 1 queries"):
        negatives(ranks=(2, 2))
    with pytest.raises(ValueError, match="No triple"):
        negatives(ranks=(11, 20))


@pytest.mark.parametrize("ranks", [(0, 5), (-1, 5), (5, 4)])
def test_ranks_that_are_none_are_refused(ranks):
    with pytest.raises(ValueError, match=re.escape(f"a first and a last rank from 1 on, got {ranks}")):
        negatives(ranks=ranks)


TEACHER = kd.Run({"q": [("d2", 5.0), ("d9", 3.0), ("d1", 5.5), ("d3", 5.0), ("d4", 4.0), ("d5", 3.0), ("d6", 2.0)]})
SCORED = kd.Run({"q": RANKED["q"][:6]})  # the candidates that TEACHER has scored


@pytest.mark.parametrize(
    ("margin", "wanted"),
    [
        (0.0, {"d2": "d3 d4 d5 d6", "d9": "d5 d6"}),
        (1.0, {"d2": "d4 d5 d6", "d9": "d6"}),
        (1.5, {"d2": "d5 d6", "d9": ""}),
        (-0.5, {"d2": "d1 d3 d4 d5 d6", "d9": "d5 d6"}),
    ],
)
def test_negatives_above_their_own_positive_minus_the_margin_are_left_out(margin, wanted):
    rows = kd.sample_triples(SCORED, JUDGED, per_query=1000, teacher=TEACHER, teacher_margin=margin)
    pairs = {(positive, negative) for positive, names in wanted.items() for negative in names.split()}
    assert {(row["pos_id"], row["neg_id"]) for row in rows} == pairs


def test_a_margin_that_no_negative_keeps_gives_no_triple():
    with pytest.raises(ValueError, match="No triple"):
        kd.sample_triples(SCORED, JUDGED, teacher=TEACHER, teacher_margin=10)


def test_a_document_that_the_teacher_did_not_score_is_named_where_it_is_needed():
    assert negatives(ranks=(1, 6), teacher=TEACHER)  # d7, d8 and d10 are not needed
    with pytest.raises(KeyError) as error:
        negatives(ranks=(6, 7), teacher=TEACHER)
    assert error.value.args[0].startswith(
        "The teacher did not score document 'd7' of query 'q' (1 are missing); score"
    )
    with pytest.raises(KeyError, match="document 'd9' of query 'q'"):
        kd.sample_triples(SCORED, JUDGED, teacher=kd.Run({"q": [("d2", 1.0), *TEACHER["q"][2:]]}))
    with pytest.raises(KeyError, match="of query 'q'"):
        kd.sample_triples(SCORED, JUDGED, teacher=kd.Run({"other": TEACHER["q"]}))


def test_queries_that_give_no_triple_need_no_teacher_scores():
    run = kd.Run(SCORED | {"unjudged": [("d1", 1.0)]})
    rows = kd.sample_triples(run, JUDGED, per_query=1000, teacher=TEACHER)
    assert set(rows["query_id"]) == {"q"}


# ---- Writing --------------------------------------------------------------------------------------------------------

STRING_IDS = {"query_id": ["q 1", "ü"], "pos_id": ["007", "a"], "neg_id": ["文書", "b"]}
NUMBERS = [1 / 3, -1e-12, 3e38, 16777217.0]


@pytest.mark.parametrize("suffix", ["tsv", "parquet"])
@pytest.mark.parametrize("ids", [{name: PAIRS[name] for name in STRING_IDS}, STRING_IDS], ids=["integers", "strings"])
def test_rows_read_back_as_they_were_written(tmp_path, suffix, ids):
    scores = {"pos_score": NUMBERS[:2], "neg_score": NUMBERS[2:]}
    features = {name: datasets.Value("float32") for name in scores}
    features |= {name: datasets.Value("int64" if ids is not STRING_IDS else "string") for name in ids}
    dataset = datasets.Dataset.from_dict(scores | ids, datasets.Features(features))
    write_teacher_scores(dataset, tmp_path / f"scores.{suffix}")
    again = kd.load_teacher_scores(tmp_path / f"scores.{suffix}")
    assert again[:] == dataset[:]
    assert again.features == dataset.features


def test_tsv_has_the_published_columns_whatever_the_order_of_the_data_set(tmp_path):
    dataset = datasets.Dataset.from_dict({"note": ["x", "y"]} | dict(reversed(PAIRS.items())))
    write_teacher_scores(dataset, tmp_path / "scores.tsv")
    assert (tmp_path / "scores.tsv").read_bytes() == b"1.5\t-2\t7\t12\t3\n0\t1\t8\t1\t2\n"


def test_a_selection_is_written_in_its_own_order(tmp_path):
    write_teacher_scores(datasets.Dataset.from_dict(PAIRS).select([1, 0, 1]), tmp_path / "scores.tsv")
    assert kd.load_teacher_scores(tmp_path / "scores.tsv")["query_id"][:] == [8, 7, 8]


def test_triples_have_three_columns(tmp_path):
    rows = kd.sample_triples(RANKED, JUDGED, per_query=2)
    write_teacher_scores(rows, tmp_path / "triples.tsv")
    lines = (tmp_path / "triples.tsv").read_text().splitlines()
    assert [tuple(line.split("\t")) for line in lines] == [tuple(row.values()) for row in rows]


LISTS = {"query_id": ["q 1", "ü"], "doc_ids": [["007", "a", "b"], ["文書", "c", "d"]]}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("ids", [{"query_id": [7, 8], "doc_ids": [[1, 2, 3], [4, -5, 6]]}, LISTS], ids=["int", "str"])
def test_lists_read_back_as_they_were_written(tmp_path, suffix, ids):
    dataset = datasets.Dataset.from_dict(ids | {"teacher_scores": [[1.5, -2.0, 0.25], [1e8, 0.0, -0.5]]})
    write_teacher_scores(dataset, tmp_path / f"lists.{suffix}")
    assert kd.load_teacher_scores(tmp_path / f"lists.{suffix}")[:] == dataset[:]


def test_lists_do_not_fit_into_tsv(tmp_path):
    dataset = datasets.Dataset.from_dict(LISTS | {"teacher_scores": [[1.0, 2.0, 3.0]] * 2})
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'lists.tsv'}: lists do not fit into columns; write")):
        write_teacher_scores(dataset, tmp_path / "lists.tsv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["tsv", "parquet"])
def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"scores.{suffix}"
    path.write_text("old")
    dataset = datasets.Dataset.from_dict(PAIRS)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("to_parquet", "to_json"):
        monkeypatch.setattr(datasets.Dataset, name, fail)
    monkeypatch.setattr("hf_kd_ranking.data.rows.tsv_lines", fail)
    with pytest.raises(OSError, match="No space left"):
        write_teacher_scores(dataset, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_compressed_lists_are_lists(tmp_path):
    path, row = tmp_path / "lists.jsonl.gz", {"query_id": 1, "doc_ids": [2, 3], "teacher_scores": [1.5, 0.5]}
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    assert kd.load_teacher_scores(path)[0] == row
