"""Averages computed by hand and by the authors (golden/teacher_files); missing pairs; interruptions."""

import gzip
import json
import re
import statistics
from pathlib import Path

import datasets
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.teachers import buckets, ensemble

GOLDEN = Path(__file__).parents[1] / "golden" / "teacher_files" / "cases.json"
FILES = json.loads(GOLDEN.read_text(encoding="utf-8"))["ensemble"]
ROWS = [("q1", "a", "b"), ("q1", "a", "c"), ("q 2", "d/ü", "a"), ("q 2", "文書 1", "a")]
# A score for each pair: of a good teacher, of one on another scale, of a third.
PAIRS = list(dict.fromkeys((query, doc) for query, *docs in ROWS for doc in docs))
SCORES = {
    name: dict(zip(PAIRS, values, strict=True))
    for name, values in {
        "first": (1.5, -2.0, 0.25, 3.0, -1.0, 0.1),
        "second": (150.0, 20.0, -30.0, 70.5, 0.0, 45.0),
        "third": (0.5, 0.125, 9.0, -4.0, 2.0, 0.2),
    }.items()
}


def write_rows(path: Path, scores: dict[tuple[str, str], float], rows=ROWS) -> Path:
    lines = [f"{scores[q, p]!r}\t{scores[q, n]!r}\t{q}\t{p}\t{n}\n" for q, p, n in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def few_buckets(monkeypatch) -> None:
    """Most of 256 buckets would be empty."""
    monkeypatch.setattr(buckets, "BUCKETS", 4)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """The three teachers; the second and the third have the rows in another order."""
    orders = {"first": ROWS, "second": ROWS[::-1], "third": ROWS[2:] + ROWS[:2]}
    return [write_rows(tmp_path / f"{name}.tsv", SCORES[name], rows) for name, rows in orders.items()]


def run(files: list[Path], **options) -> list[tuple[float, float, str, str, str]]:
    output = files[0].parent / "out.tsv"
    counts = kd.ensemble_teachers(files, output, overwrite=True, **options)
    rows = [line.split("\t") for line in output.read_text(encoding="utf-8").splitlines()]
    assert counts["rows"] == len(rows)
    return [(float(pos), float(neg), *ids) for pos, neg, *ids in rows]


def by_hand(average) -> list[tuple[float, float, str, str, str]]:
    """The rows with scores by `average(query, doc)`."""
    return [(average(q, p), average(q, n), q, p, n) for q, p, n in ROWS]


def close(rows: list[tuple]) -> list[tuple]:
    return [(pytest.approx(pos, rel=1e-12), pytest.approx(neg, rel=1e-12), *ids) for pos, neg, *ids in rows]


# ---- Averages -------------------------------------------------------------------------------------------------------


def test_mean_equals_the_bytes_of_the_authors(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / f"{name}.tsv").write_text(text, encoding="utf-8")
    files = [tmp_path / f"teacher{i}.tsv" for i in range(3)]
    monkeypatch.setattr(buckets, "BUCKETS", 256)
    # The third file lacks pairs: the authors average what there is.
    counts = kd.ensemble_teachers(files, tmp_path / "ids.tsv", on_missing="average")
    assert (tmp_path / "ids.tsv").read_text(encoding="utf-8") == FILES["expected_ensemble_ids"]
    assert counts == {"rows": 25, "dropped": 0, "incomplete": 12}
    stores = kd.TextStore.from_file(tmp_path / "collection.tsv"), kd.TextStore.from_file(tmp_path / "query.tsv")
    kd.expand_ids(tmp_path / "ids.tsv", *stores, tmp_path / "text.tsv")
    assert (tmp_path / "text.tsv").read_text(encoding="utf-8") == FILES["expected_ensemble_text"]


def test_mean_does_not_depend_on_row_order(files):
    assert run(files) == by_hand(lambda *pair: sum(SCORES[name][pair] for name in SCORES) / 3)


def test_one_file_is_written_as_it_is(files):
    assert run(files[:1]) == by_hand(lambda *pair: SCORES["first"][pair])
    assert (files[0].parent / "out.tsv").read_bytes() == files[0].read_bytes()


def test_weighted_mean_is_divided_by_sum_of_weights(files):
    def average(*pair):
        return (2 * SCORES["first"][pair] + 0.5 * SCORES["second"][pair] + 0 * SCORES["third"][pair]) / 2.5

    assert run(files, weights=[2, 0.5, 0]) == close(by_hand(average))


def test_median_is_over_the_files(files):
    assert run(files, method="median") == by_hand(
        lambda *pair: statistics.median(SCORES[name][pair] for name in SCORES)
    )


@pytest.mark.parametrize("weights", [None, [1, 3, 0.5]])
def test_standardized_scores_use_moments_of_their_file(files, weights):
    # Of the file: a pair that stands in two rows counts twice.
    seen = [(q, d) for q, *docs in ROWS for d in docs]
    scores_of = {name: [SCORES[name][pair] for pair in seen] for name in SCORES}
    mean = {name: statistics.fmean(values) for name, values in scores_of.items()}
    std = {name: statistics.pstdev(values) for name, values in scores_of.items()}

    def average(*pair):
        parts = [(SCORES[name][pair] - mean[name]) / std[name] for name in SCORES]
        factors = weights or [1, 1, 1]
        return sum(factor * part for factor, part in zip(factors, parts, strict=True)) / sum(factors)

    assert run(files, method="standardized", weights=weights) == close(by_hand(average))


def test_standardized_constant_scores_are_0(tmp_path):
    path = write_rows(tmp_path / "same.tsv", dict.fromkeys(PAIRS, 7.25))
    assert run([path], method="standardized") == by_hand(lambda *pair: 0.0)


def test_moments_far_from_0_keep_their_digits(tmp_path, monkeypatch):
    far = {pair: 1e8 + score for pair, score in SCORES["first"].items()}
    monkeypatch.setattr(ensemble, "read_tsv", lambda path, types, size: READ_TSV(path, types, 40))  # several blocks
    (one, *_), (other, *_) = (
        run([write_rows(tmp_path / f"{i}.tsv", scores)], method="standardized")
        for i, scores in enumerate((SCORES["first"], far))
    )
    assert one[:2] == pytest.approx(other[:2], rel=1e-6)


READ_TSV = ensemble.read_tsv


def test_last_score_of_a_repeated_pair_is_used(tmp_path):
    rows = ["1\t10\tq\ta\tb\n", "2\t20\tq\ta\tc\n", "3\t30\tq\ta\tb\n", "4\t1\tother\ta\tb\n"]
    (tmp_path / "rows.tsv").write_text("".join(rows))
    assert [row[:2] for row in run([tmp_path / "rows.tsv"])] == [(3, 30), (3, 20), (3, 30), (4, 1)]


@pytest.mark.parametrize("count", [1, 3, 300])
@pytest.mark.parametrize("options", [{}, {"method": "standardized"}, {"method": "median"}])
def test_result_does_not_depend_on_number_of_buckets(files, monkeypatch, count, options):
    wanted = run(files, **options)
    monkeypatch.setattr(buckets, "BUCKETS", count)
    assert run(files, **options) == wanted


def test_ids_are_matched_as_they_are_written(tmp_path):
    (tmp_path / "one.tsv").write_text("1\t2\t7\t 1\t1\n3\t4\t07\t1 \t001\n")
    (tmp_path / "two.tsv").write_text("30\t40\t07\t1 \t001\n10\t20\t7\t 1\t1\n")
    wanted = [(5.5, 11.0, "7", " 1", "1"), (16.5, 22.0, "07", "1 ", "001")]
    assert run([tmp_path / "one.tsv", tmp_path / "two.tsv"]) == wanted


def test_ids_that_join_to_one_text_are_two_pairs(tmp_path):
    (tmp_path / "one.tsv").write_text("1\t2\ta b\tc\td\n3\t4\ta\tb c\td\n")
    assert [row[:2] for row in run([tmp_path / "one.tsv"])] == [(1, 2), (3, 4)]


# ---- Layouts --------------------------------------------------------------------------------------------------------


def write_pairs(path: Path, scores: dict[tuple[str, str], float]) -> Path:
    lines = [f"{query}\t{doc}\t{score!r}\n" for (query, doc), score in scores.items()]
    path.write_text("".join(lines[::-1]), encoding="utf-8")
    return path


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return path


TABLE = {"pos_score": [1.5, 2.5], "neg_score": [0.5, -1.0], "query_id": [7, 8], "pos_id": [1, 2], "neg_id": [3, 4]}


def test_rows_of_weight_0_take_the_scores_of_pairs(files, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.tsv", SCORES["third"] | {("q9", "more"): 5.0})
    assert run([files[0], pairs], weights=[0, 1]) == by_hand(lambda *pair: SCORES["third"][pair])


@pytest.mark.parametrize("name", ["doc_id", "passage_id", "corpus_id"])
def test_pairs_in_parquet_have_several_names(files, tmp_path, name):
    queries, docs = zip(*PAIRS, strict=True)
    columns = {"score": list(SCORES["second"].values()), name: list(docs), "query_id": list(queries), "note": [0] * 6}
    path = write_parquet(tmp_path / "pairs.parquet", columns)
    assert run([files[0], path], weights=[0, 1]) == by_hand(lambda *pair: SCORES["second"][pair])


def test_parquet_equals_tsv(tmp_path):
    parquet = write_parquet(tmp_path / "rows.parquet", TABLE)
    (tmp_path / "rows.tsv").write_text("-1\t3\t8\t2\t4\n0.5\t1.5\t7\t1\t3\n")
    wanted = [(1.0, 1.0, "7", "1", "3"), (0.75, 1.0, "8", "2", "4")]
    assert run([parquet, tmp_path / "rows.tsv"]) == wanted
    assert run([tmp_path / "rows.tsv", parquet]) == wanted[::-1]


def test_margins_give_rows_but_no_scores(tmp_path):
    columns = {"query_id": ["q", "r"], "positive_id": ["a", "c"], "negative_id": ["b", "d"], "score": [3.5, -1.0]}
    files = [write_parquet(tmp_path / "margins.parquet", columns)]
    files.append(tmp_path / "rows.tsv")
    files[1].write_text("9\t2\tr\tc\td\n8\t7.5\tq\ta\tb\n")
    assert run(files, weights=[0, 1]) == [(8, 7.5, "q", "a", "b"), (9, 2, "r", "c", "d")]
    with pytest.raises(ValueError, match=r"margins\.parquet holds margins, which belong to a row"):
        run(files)


def test_compressed_files_are_read(files):
    path = files[1].with_suffix(".tsv.gz")
    path.write_bytes(gzip.compress(files[1].read_bytes()))
    assert run([files[0], path]) == run(files[:2])


# ---- Missing pairs --------------------------------------------------------------------------------------------------


@pytest.fixture
def incomplete(files) -> list[Path]:
    """The second file lacks two pairs, the third one of them: those of rows 3 and 4."""
    write_rows(files[1], SCORES["second"], ROWS[:2])
    write_rows(files[2], SCORES["third"], ROWS[:3])
    return files


def test_missing_pair_is_named_with_line_and_count(incomplete):
    text = incomplete[0].read_text(encoding="utf-8").splitlines(keepends=True)
    incomplete[0].write_text("\n" + "".join(text[:2]) + "\n" + "".join(text[2:]), encoding="utf-8")
    with pytest.raises(KeyError) as error:
        run(incomplete)
    # ("q 2", "a") stands in two rows: four scores
    assert error.value.args[0].startswith(
        f"{incomplete[0]} line 5: the pair 'q 2' 'd/ü' is not in {incomplete[1]} (4 scores of the first file lack one)"
    )
    assert not (incomplete[0].parent / "out.tsv").exists()


def test_missing_pair_names_all_files_that_lack_it(incomplete):
    for path in incomplete[1:]:
        write_rows(path, SCORES["second"], ROWS[:1])
    with pytest.raises(KeyError, match=re.escape(f"'q1' 'c' is not in {incomplete[1]}, {incomplete[2]} (5 scores")):
        run(incomplete)


def test_missing_pair_of_parquet_is_named_by_row(tmp_path):
    parquet = write_parquet(tmp_path / "rows.parquet", TABLE)
    (tmp_path / "rows.tsv").write_text("1\t2\t7\t1\t3\n1\t2\t8\t2\t5\n")
    with pytest.raises(
        KeyError, match=re.escape(f"{parquet} row 1: the pair '8' '4' is not in {tmp_path}/rows.tsv (1")
    ):
        run([parquet, tmp_path / "rows.tsv"])


def test_average_uses_files_that_have_the_pair(incomplete):
    def average(query, doc):
        names = ["first", *(["third"] if doc != "文書 1" else [])] if query == "q 2" else SCORES
        return sum(SCORES[name][query, doc] for name in names) / len(names)

    assert run(incomplete, on_missing="average") == close(by_hand(average))
    counts = kd.ensemble_teachers(incomplete, incomplete[0].with_name("other.tsv"), on_missing="average")
    assert counts == {"rows": 4, "dropped": 0, "incomplete": 4}


def test_weighted_average_uses_weights_of_present_files(incomplete):
    rows = run(incomplete, weights=[1, 5, 3], on_missing="average")
    assert rows[3][0] == SCORES["first"]["q 2", "文書 1"]
    assert rows[2][0] == pytest.approx((SCORES["first"]["q 2", "d/ü"] + 3 * SCORES["third"]["q 2", "d/ü"]) / 4)


def test_pair_only_in_files_of_weight_0_is_missing(incomplete):
    with pytest.raises(KeyError, match=re.escape(f"line 3: the pair 'q 2' 'd/ü' is not in {incomplete[1]} (4 scores")):
        run(incomplete, weights=[0, 1, 0], on_missing="average")


@pytest.mark.parametrize("method", ["mean", "median"])
def test_drop_leaves_out_incomplete_rows(incomplete, method):
    rows = run(incomplete, method=method, on_missing="drop")
    assert [row[2:] for row in rows] == ROWS[:2]
    counts = kd.ensemble_teachers(incomplete, incomplete[0].with_name("other.tsv"), method, on_missing="drop")
    assert counts == {"rows": 2, "dropped": 2, "incomplete": 0}


@pytest.mark.parametrize("doc", ["a", "c"])
def test_drop_needs_both_pairs_of_a_row(tmp_path, doc):
    rows = write_rows(tmp_path / "rows.tsv", SCORES["first"], ROWS[1:2])
    pairs = write_pairs(tmp_path / "pairs.tsv", {("q1", doc): 1.0})
    counts = kd.ensemble_teachers([rows, pairs], tmp_path / "out.tsv", on_missing="drop")
    assert (counts, (tmp_path / "out.tsv").read_bytes()) == ({"rows": 0, "dropped": 1, "incomplete": 0}, b"")


def test_pairs_missing_in_the_first_file_are_ignored(files):
    write_rows(files[0], SCORES["first"], ROWS[:2])
    assert [row[2:] for row in run(files)] == ROWS[:2]


# ---- Errors ---------------------------------------------------------------------------------------------------------

BAD_SETTINGS = {
    "method": ({"method": "max"}, "Unknown method 'max'; choose one of mean, standardized, median"),
    "two weights": ({"weights": [1, 2]}, "one weight of 0 or more for each of the 3 files, got [1, 2]"),
    "negative": ({"weights": [1, -1, 1]}, "one weight of 0 or more for each of the 3 files, got [1, -1, 1]"),
    "zeros": ({"weights": [0, 0, 0]}, "one weight of 0 or more for each of the 3 files, got [0, 0, 0]"),
    "median with weights": ({"method": "median", "weights": [1, 1, 1]}, "A median has no weights"),
    "on_missing": ({"on_missing": "skip"}, "on_missing must be 'error', 'average' or 'drop', got 'skip'"),
}


@pytest.mark.parametrize(("options", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_invalid_setting_is_refused(files, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(files, **options)
    assert sorted(files[0].parent.iterdir()) == sorted(files)


BAD_FILES = {
    "columns": (b"1\t2\tq1\ta\tb\n1\t2\tq1\ta\n", "line 2: needed 5 tab-separated columns"),
    "two columns": (b"1\t2\n", "line 1: needed 5 tab-separated columns"),
    "pairs": (b"q1\ta\t1\nq1\tb\n", "line 2: needed 3 tab-separated columns (query_id, doc_id, score), got 2"),
    "no number": (b"1\t2\tq1\ta\tb\n\n1\thigh\tq1\ta\tb\n", "line 3: neg_score must be a finite number, got 'high'"),
    "NaN": (b"nan\t2\tq1\ta\tb\n", "line 1: pos_score must be a finite number, got 'nan'"),
    "score of a pair": (b"q1\ta\tinf\n", "line 1: score must be a finite number, got 'inf'"),
    "bad UTF-8": (b"1\t2\tq\xff\ta\tb\n", "line 1: byte 0xff at column 6 is not UTF-8"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_malformed_row_is_named_by_line(files, content, message):
    files[1].write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{files[1]} {message}')}"):
        run(files)
    assert sorted(files[0].parent.iterdir()) == sorted(files)


def test_missing_and_empty_files_have_their_messages(files, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'none.tsv'} does not exist")):
        run([files[0], tmp_path / "none.tsv"])
    files[2].write_text("")
    with pytest.raises(ValueError, match=re.escape(f"{files[2]} is empty")):
        run(files)


def test_first_file_of_pairs_is_refused(files, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.tsv", SCORES["first"])
    with pytest.raises(ValueError, match=re.escape(f"{pairs} holds pairs; the first file gives the rows and needs")):
        run([pairs, files[0]])


def test_damaged_parquet_is_named(files, tmp_path):
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"cut\.parquet is not a Parquet file, or is damaged"):
        kd.ensemble_teachers([files[0], tmp_path / "cut.parquet"], tmp_path / "out.tsv")


def test_parquet_with_other_columns_is_refused(files, tmp_path):
    path = write_parquet(tmp_path / "odd.parquet", {"query": [1], "score": [2.0]})
    with pytest.raises(ValueError, match=re.escape(f"{path} has the columns query, score; needed pos_score")):
        run([files[0], path])


def test_existing_output_needs_overwrite(files, tmp_path):
    (tmp_path / "out.tsv").write_text("old")
    with pytest.raises(FileExistsError, match=re.escape(f"{tmp_path / 'out.tsv'} exists")):
        kd.ensemble_teachers(files, tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").read_text() == "old"
    kd.ensemble_teachers(files, tmp_path / "out.tsv", overwrite=True)
    assert (tmp_path / "out.tsv").read_text() != "old"


# ---- Interruptions --------------------------------------------------------------------------------------------------


STEPS = ("teachers.ensemble._distribute", "teachers.buckets.BucketFile.read", "artifacts._put_in_place")


@pytest.mark.parametrize("step", STEPS)
def test_interruption_leaves_no_output_and_no_folder(files, monkeypatch, step):
    wanted = run(files)
    output = files[0].parent / "out.tsv"
    output.unlink()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"hf_kd_ranking.{step}", interrupt)
        run(files)
    assert sorted(output.parent.iterdir()) == sorted(files)
    assert run(files) == wanted


def test_buckets_of_a_killed_run_are_not_used(files):
    wanted = run(files)
    folder = files[0].parent / "out.tsv.buckets"
    folder.mkdir()
    for name in ("0.bin", "averages.bin"):
        (folder / name).write_bytes(b"\0" * 64)
    assert run(files) == wanted
    assert not folder.exists()
