"""Diagnosis of teacher files: figures computed by hand, by plain Python and by scipy; warnings."""

import gzip
import json
import random
import re
from itertools import combinations
from pathlib import Path
from statistics import fmean, pstdev

import datasets
import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from teacher_files import FIRST, SECOND, write_rows

import hf_kd_ranking as kd
from hf_kd_ranking.data.rows import PAIR_COLUMNS
from hf_kd_ranking.teachers import buckets, diagnose
from hf_kd_ranking.teachers.diagnose import diagnose_teachers
from hf_kd_ranking.teachers.diagnosis import diagnosis_text


def read_warnings(tmp_path, rows: list[tuple]) -> list[str]:
    return diagnose_teachers([write_rows(tmp_path / "warned.tsv", rows)])["files"][0]["warnings"]


# ---- One file -------------------------------------------------------------------------------------------------------


def test_figures_of_a_file_equal_those_by_hand(first):
    figures = diagnose_teachers([first])["files"][0]
    scores, margins = figures["scores"], figures["margins"]
    assert (figures["file"], figures["rows"], figures["queries"], figures["pairs"]) == (str(first), 5, 2, 6)
    assert (figures["duplicate_rows"], figures["same_ids"], figures["warnings"]) == (1, 0, [])
    assert (scores["min"], scores["max"], scores["mean"]) == (1, 9, 4.9)
    assert scores["std"] == pytest.approx((66.9 / 10) ** 0.5)  # squares sum to 307, minus 10 * 4.9^2
    assert (margins["min"], margins["max"], margins["mean"]) == (-1, 6, 3)
    assert margins["std"] == pytest.approx((42 / 5) ** 0.5)  # 4 + 16 + 9 + 9 + 4
    assert (margins["negative"], margins["zero"]) == (0.2, 0.2)


def test_quantiles_are_interpolated(first):
    quantiles = diagnose_teachers([first])["files"][0]["margins"]["quantiles"]
    # of -1, 0, 5, 5, 6, at 4 * share from the first on
    expected = {"1%": -0.96, "5%": -0.8, "25%": 0, "50%": 5, "75%": 5, "95%": 5.8, "99%": 5.96}
    assert list(quantiles) == list(expected)
    assert quantiles == pytest.approx(expected)


def test_deviation_of_scores_far_from_zero_is_exact(tmp_path):
    rows = [(100_000 + i % 2, 100_000, i, 1, 2) for i in range(1000)]
    figures = diagnose_teachers([write_rows(tmp_path / "far.tsv", rows)])["files"][0]
    assert figures["margins"]["std"] == pytest.approx(0.5)
    assert figures["scores"]["std"] == pytest.approx((0.25 * 0.75) ** 0.5)


@pytest.mark.parametrize("form", ["gzip", "float32", "float64"])
def test_other_formats_have_the_same_figures(tmp_path, first, form):
    if form == "gzip":
        path = tmp_path / "first.tsv.gz"
        path.write_bytes(gzip.compress(first.read_bytes()))
    else:
        path = tmp_path / "first.parquet"
        names = ("pos_score", "neg_score", "query_id", "pos_id", "neg_id")
        dataset = datasets.Dataset.from_dict(dict(zip(names, zip(*FIRST, strict=True), strict=True)))
        kind = datasets.Value(form)
        dataset.cast_column("pos_score", kind).cast_column("neg_score", kind).to_parquet(path)
    expected = diagnose_teachers([first])
    assert diagnose_teachers([path]) == expected | {"files": [expected["files"][0] | {"file": str(path)}]}


@pytest.mark.parametrize("rows_at_once", [1 << 19, 3])
def test_list_counts_as_rows_of_first_against_each(tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr(diagnose, "ROWS_AT_ONCE", rows_at_once)
    lists = [
        {"query_id": 1, "doc_ids": [10, 11, 12], "teacher_scores": [9, 4, 10]},
        {"query_id": 2, "doc_ids": [20, 21, 22], "teacher_scores": [5, 5, 8]},
    ]
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lists))
    diagnosis = diagnose_teachers([path])
    figures, (least, _) = diagnosis["files"][0], diagnosis["false_negatives"]["examples"]
    assert (figures["rows"], figures["queries"], figures["pairs"], figures["duplicate_rows"]) == (4, 2, 6, 0)
    assert figures["margins"]["mean"] == pytest.approx(0.25)  # of 5, -1, 0, -3
    assert figures["scores"]["mean"] == pytest.approx(41 / 6)
    assert (least["query_id"], least["pos_id"], least["neg_id"], least["scores"]) == ("2", "20", "22", [[5, 8]])


def test_lists_match_pairs_of_another_file(tmp_path, first):
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps({"query_id": 1, "doc_ids": [10, 12, 11], "teacher_scores": [2, 3, 1]}))
    comparison = diagnose_teachers([first, path])["comparisons"][0]
    assert (comparison["shared_rows"], comparison["agreement"]) == (2, 1)


def test_lists_may_differ_in_length(tmp_path):
    rows = {"query_id": [1, 2], "doc_ids": [[1, 2], [1, 2, 3]], "teacher_scores": [[1.0, 2.0], [5.0, 2.0, 3.0]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "lists.parquet")
    diagnosis = diagnose_teachers([tmp_path / "lists.parquet"])
    figures, (example,) = diagnosis["files"][0], diagnosis["false_negatives"]["examples"]
    assert (figures["rows"], figures["pairs"], figures["margins"]["mean"]) == (3, 5, pytest.approx(4 / 3))
    assert (example["query_id"], example["neg_id"], example["scores"]) == ("1", "2", [[1, 2]])


# ---- Warnings -------------------------------------------------------------------------------------------------------


WARNED = {
    "within 0 and 1": ([(1, 0.2, 1, 2, 3), (0.9, 0, 2, 4, 5)], "All scores are within [0, 1], as after a sigmoid: "),
    "constant": ([(0.5, 0.5, 1, 2, 3), (0.5, 0.5, 2, 4, 5)], "All scores are 0.5: nothing can be learned."),
    "zero margins": ([(3, 3, 1, 2, 3), (5, 5, 2, 4, 5)], "All margins are zero: a student would learn to score all "),
    "equal documents": ([(3, 1, 1, 2, 2), (5, 4, 2, 4, 5), (5, 4, 2, 5, 5)], "2 rows name one document as positive"),
    "negative": ([(3, 4, 1, 2, 3), (4, 5, 2, 4, 5), (9, 4, 2, 4, 6)], "Most margins are negative"),
}


@pytest.mark.parametrize(("rows", "start"), WARNED.values(), ids=WARNED)
def test_warnings_name_what_would_spoil_training(tmp_path, rows, start):
    first, *others = read_warnings(tmp_path, rows)
    assert first.startswith(start)
    assert all(warning.startswith("All margins are zero") for warning in others)


NOT_WARNED = {
    "above 1": [(1.01, 0.2, 1, 2, 3), (0.9, 0, 2, 4, 5)],
    "below 0": [(1, 0.2, 1, 2, 3), (0.9, -0.1, 2, 4, 5)],
    "one margin above 0": [(3, 3, 1, 2, 3), (5, 4, 2, 4, 5)],
    "half of the margins negative": [(3, 4, 1, 2, 3), (9, 4, 2, 4, 6)],
}


@pytest.mark.parametrize("rows", NOT_WARNED.values(), ids=NOT_WARNED)
def test_usable_scores_have_no_warning(tmp_path, rows):
    assert read_warnings(tmp_path, rows) == []


def test_warning_about_files_of_margins(tmp_path):
    margins = {"query_id": [7, 8], "positive_id": [12, 1], "negative_id": [3, 2], "score": [0.5, 0.25]}
    datasets.Dataset.from_dict(margins).to_parquet(tmp_path / "margins.parquet")
    diagnosis = diagnose_teachers([tmp_path / "margins.parquet"])
    figures = diagnosis["files"][0]
    assert figures["scores"] is None
    assert figures["margins"]["mean"] == 0.375
    (warning,) = figures["warnings"]
    assert warning.startswith("The file holds only margins")
    assert re.search(r"scores mean +-\n", diagnosis_text(diagnosis))


# ---- Between files --------------------------------------------------------------------------------------------------


def test_comparison_uses_shared_rows(first, second):
    (comparison,) = diagnose_teachers([first, second])["comparisons"]
    assert comparison["files"] == [str(first), str(second)]
    assert (comparison["shared_rows"], comparison["spearman_rows"]) == (3, 3)
    # margins (-1, 0, 6) and (-2, 1, 3): the signs of the second row differ, the ranks agree
    assert comparison["agreement"] == pytest.approx(2 / 3)
    assert comparison["pearson"] == pytest.approx(pearsonr([-1, 0, 6], [-2, 1, 3]).statistic)
    assert comparison["spearman"] == pytest.approx(1)


def test_zero_margin_agrees_only_with_zero_margin(tmp_path):
    one = write_rows(tmp_path / "one.tsv", [(1, 1, 1, 2, 3), (1, 1, 1, 2, 4), (2, 2, 1, 2, 5), (2, 1, 1, 2, 6)])
    two = write_rows(tmp_path / "two.tsv", [(3, 3, 1, 2, 3), (1, 2, 1, 2, 4), (2, 1, 1, 2, 5), (5, 1, 1, 2, 6)])
    assert diagnose_teachers([one, two])["comparisons"][0]["agreement"] == 0.5


def test_queries_are_ranked_by_disagreement(first, second):
    diagnosis = diagnose_teachers([first, second])
    (a, b), (most, least) = (
        (figures["margins"] for figures in diagnosis["files"]),
        diagnosis["comparisons"][0]["queries"],
    )
    by_hand = {
        margins: abs((margins[0] - 3) / 8.4**0.5 - (margins[1] + 0.5) / 7.25**0.5)
        for margins in [(-1, -2), (0, 1), (6, 3)]
    }
    assert (a["mean"], b["mean"]) == (3, -0.5)
    assert most == {"query_id": "2", "rows": 2, "disagreement": pytest.approx((by_hand[0, 1] + by_hand[6, 3]) / 2)}
    assert least == {"query_id": "1", "rows": 1, "disagreement": pytest.approx(by_hand[-1, -2])}


def test_comparison_does_not_depend_on_row_order(tmp_path, first, second):
    turned = write_rows(tmp_path / "turned.tsv", SECOND[::-1])
    expected, found = (diagnose_teachers([first, path])["comparisons"][0] for path in (second, turned))
    assert found | {"files": None} == expected | {"files": None}


def test_comparison_uses_last_of_repeated_rows(tmp_path, second):
    repeated = write_rows(tmp_path / "repeated.tsv", [(9, 0, 1, 10, 12), (0, 9, 2, 20, 21), (1, 3, 1, 10, 12)])
    diagnosis = diagnose_teachers([repeated, second])
    assert diagnosis["comparisons"][0]["shared_rows"] == 2
    assert diagnosis["comparisons"][0]["agreement"] == 0.5
    assert diagnosis["false_negatives"]["rows"] == 4


def test_no_correlation_without_shared_rows(tmp_path, first):
    other = write_rows(tmp_path / "other.tsv", [(1, 2, 1, 11, 10)])  # the same documents, turned round
    (comparison,) = diagnose_teachers([first, other])["comparisons"]
    assert comparison["shared_rows"] == 0
    assert [comparison[key] for key in ("pearson", "spearman", "agreement")] == [None] * 3
    assert comparison["queries"] == []


def test_no_correlation_of_constant_margins(tmp_path, first):
    constant = write_rows(tmp_path / "constant.tsv", [(row[0] + 1, row[0], *row[2:]) for row in FIRST])
    (comparison,) = diagnose_teachers([first, constant])["comparisons"]
    assert (comparison["shared_rows"], comparison["pearson"], comparison["spearman"]) == (4, None, None)


def test_integer_ids_match_those_among_strings(tmp_path, first):
    rows = [*SECOND, (2, 1, "q", "d7", "文書")]
    diagnosis = diagnose_teachers([first, write_rows(tmp_path / "strings.tsv", rows)])
    assert diagnosis["comparisons"][0]["shared_rows"] == 3
    assert diagnosis["files"][1]["pairs"] == 8
    assert diagnosis["false_negatives"]["rows"] == 6


def test_integers_beyond_18_digits_match_their_spelling(tmp_path):
    ids = [10**18, 10**18 + 1, -(10**18)]
    path = write_rows(tmp_path / "ids.tsv", [(2, 1, *ids)])
    columns = dict(zip(PAIR_COLUMNS, ([2.0], [1.0], *([id_] for id_ in ids)), strict=True))
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "ids.parquet")
    assert diagnose_teachers([path, tmp_path / "ids.parquet"])["comparisons"][0]["shared_rows"] == 1


def made_up(path: Path, seed: int, is_string: bool) -> tuple[Path, list[tuple]]:
    rng = random.Random(seed)
    name = "q{}".format if is_string else int
    rows = []
    for _ in range(2000):
        positive, negative = rng.sample(range(12), 2)
        scores = [float(np.float32(rng.gauss(document / 4, 2))) for document in (positive, negative)]
        rows.append((*scores, name(rng.randrange(40)), positive, negative))
    return write_rows(path, rows), rows


@pytest.mark.parametrize("is_string", [False, True])
@pytest.mark.parametrize(("bucket_count", "rows_at_once"), [(256, 1 << 18), (7, 300)])
def test_figures_equal_plain_python_and_scipy(tmp_path, monkeypatch, is_string, bucket_count, rows_at_once):
    monkeypatch.setattr(buckets, "BUCKETS", bucket_count)
    monkeypatch.setattr(diagnose, "ROWS_AT_ONCE", rows_at_once)
    paths, rows = zip(*(made_up(tmp_path / f"{i}.tsv", i, is_string) for i in range(3)), strict=True)
    diagnosis = diagnose_teachers(paths, examples=5)
    margins = [{row[2:]: row[0] - row[1] for row in of} for of in rows]
    means = [fmean(row[0] - row[1] for row in of) for of in rows]
    stds = [pstdev(row[0] - row[1] for row in of) for of in rows]
    for figures, of, distinct in zip(diagnosis["files"], rows, margins, strict=True):
        assert figures["duplicate_rows"] == 2000 - len(distinct)
        assert figures["queries"] == len({row[2] for row in of})
        assert figures["pairs"] == len({(row[2], document) for row in of for document in row[3:]})
    for (i, j), found in zip(combinations(range(3), 2), diagnosis["comparisons"], strict=True):
        shared = sorted(margins[i].keys() & margins[j].keys())
        a, b = ([margins[k][row] for row in shared] for k in (i, j))
        assert found["shared_rows"] == len(shared) > 100
        assert found["pearson"] == pytest.approx(pearsonr(a, b).statistic, abs=1e-6)
        assert found["spearman"] == pytest.approx(spearmanr(a, b).statistic, abs=1e-6)
        assert found["agreement"] == fmean(x * y > 0 for x, y in zip(a, b, strict=True))
        apart = {}
        for (query, *_), x, y in zip(shared, a, b, strict=True):
            apart.setdefault(str(query), []).append(abs((x - means[i]) / stds[i] - (y - means[j]) / stds[j]))
        worst = sorted(apart, key=lambda query: -fmean(apart[query]))[:5]
        assert [example["query_id"] for example in found["queries"]] == worst
        assert [example["rows"] for example in found["queries"]] == [len(apart[query]) for query in worst]
    scaled = {
        row: fmean(of[row] / std for of, std in zip(margins, stds, strict=True) if row in of)
        for row in set().union(*margins)
    }
    found = diagnosis["false_negatives"]
    assert (found["rows"], found["count"]) == (len(scaled), sum(margin < 0 for margin in scaled.values()))
    worst = sorted(scaled, key=scaled.get)[:5]
    assert [tuple(example[k] for k in ("query_id", "pos_id", "neg_id")) for example in found["examples"]] == [
        tuple(map(str, row)) for row in worst
    ]
    assert [example["margin"] for example in found["examples"]] == pytest.approx([scaled[row] for row in worst])


def test_spearman_of_many_rows_uses_a_sample(tmp_path, monkeypatch):
    paths, _ = zip(*(made_up(tmp_path / f"{i}.tsv", i, False) for i in range(2)), strict=True)
    whole = diagnose_teachers(paths)["comparisons"][0]
    monkeypatch.setattr(diagnose, "SPEARMAN_ROWS", 1000)  # of the 2,000 rows of each file
    sampled = diagnose_teachers(paths)["comparisons"][0]
    assert whole["spearman_rows"] == whole["shared_rows"]
    assert 0.35 < sampled["spearman_rows"] / sampled["shared_rows"] < 0.65
    assert sampled["pearson"] == whole["pearson"]
    assert sampled["spearman"] == pytest.approx(whole["spearman"], abs=0.15)


# ---- False negatives ------------------------------------------------------------------------------------------------


def test_false_negatives_of_one_file(first):
    found = diagnose_teachers([first])["false_negatives"]
    assert (found["rows"], found["count"], found["share"]) == (4, 1, 0.25)
    (example,) = found["examples"]
    assert example == {
        "query_id": "1",
        "pos_id": "10",
        "neg_id": "12",
        "margin": pytest.approx(-1 / 8.4**0.5),
        "scores": [[2, 3]],
    }


def test_false_negatives_average_files_with_the_row(first, second):
    found = diagnose_teachers([first, second])["false_negatives"]
    assert (found["rows"], found["count"], found["share"]) == (5, 2, 0.4)
    worst, second_worst = found["examples"]
    assert worst["neg_id"] == "99" and worst["scores"] == [None, [0, 4]]
    assert worst["margin"] == pytest.approx(-4 / 7.25**0.5)
    assert second_worst["neg_id"] == "12" and second_worst["scores"] == [[2, 3], [1, 3]]
    assert second_worst["margin"] == pytest.approx((-1 / 8.4**0.5 - 2 / 7.25**0.5) / 2)


@pytest.mark.parametrize("examples", [0, 1])
def test_number_of_examples_is_limited(first, second, examples):
    diagnosis = diagnose_teachers([first, second], examples=examples)
    assert len(diagnosis["false_negatives"]["examples"]) == examples
    assert len(diagnosis["comparisons"][0]["queries"]) == examples
    assert diagnosis["false_negatives"]["count"] == 2
    assert "Suspected false negatives" in diagnosis_text(diagnosis)


# ---- Texts ----------------------------------------------------------------------------------------------------------


def test_texts_are_shown_from_given_stores(first, second, stores):
    diagnosis = diagnose_teachers([first, second], *stores)
    worst, second_worst = diagnosis["false_negatives"]["examples"]
    assert (second_worst["query"], second_worst["positive"]) == ("what is <b>kd</b>", "text of 10")
    assert second_worst["negative"] == "text of 12"
    assert worst["negative"] is None
    assert [example["query"] for example in diagnosis["comparisons"][0]["queries"]] == [None, "what is <b>kd</b>"]


def test_one_store_shows_only_its_texts(first, stores):
    (example,) = diagnose_teachers([first], queries=stores[0])["false_negatives"]["examples"]
    assert example["query"] == "what is <b>kd</b>"
    assert not {"positive", "negative"} & example.keys()


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_no_files_are_refused():
    with pytest.raises(ValueError, match="Needed one teacher file or more and examples >= 0, got 0 and 10"):
        diagnose_teachers([])


def test_missing_file_is_refused_before_reading(tmp_path, first):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'none.tsv'} does not exist")):
        diagnose_teachers([first, tmp_path / "none.tsv"])
    assert not (tmp_path / "cache").exists()


def test_malformed_row_is_named_by_line(tmp_path):
    path = write_rows(tmp_path / "bad.tsv", [FIRST[0], ("nan", 1, 1, 2, 3)])
    with pytest.raises(ValueError, match=re.escape(f"{path} line 2: pos_score must be a finite number, got 'nan'")):
        diagnose_teachers([path])


def test_single_path_is_one_file(first):
    assert diagnose_teachers(first) == diagnose_teachers(str(first)) == diagnose_teachers([first])


def test_diagnoses_at_one_time_keep_apart(first, second, monkeypatch):
    wanted = diagnose_teachers([first])
    load = diagnose.load_teacher_scores

    def load_after_another(path):
        monkeypatch.setattr(diagnose, "load_teacher_scores", load)
        diagnose_teachers([second])
        return load(path)

    monkeypatch.setattr(diagnose, "load_teacher_scores", load_after_another)
    assert diagnose_teachers([first]) == wanted


def test_only_loaded_tables_stay_on_disk(tmp_path, first):
    kd.load_teacher_scores(first)
    before = sorted((tmp_path / "cache").rglob("*"))
    diagnose_teachers([first])
    assert sorted((tmp_path / "cache").rglob("*")) == before
