"""Teacher diagnosis: figures computed by hand, by plain Python and by scipy; warnings; the two renderings."""

import gzip
import json
import random
import re
import sys
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from statistics import fmean, pstdev

import datasets
import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

import hf_kd_ranking as kd
from hf_kd_ranking.teachers import buckets, diagnose
from hf_kd_ranking.teachers.diagnose import diagnose_teachers
from hf_kd_ranking.teachers.diagnosis import diagnosis_html, diagnosis_text

# Margins 5, -1, 0, 6 and 5 again; pairs (1,10) (1,11) (1,12) (2,20) (2,21) (2,22).
FIRST = [(9, 4, 1, 10, 11), (2, 3, 1, 10, 12), (5, 5, 2, 20, 21), (7, 1, 2, 20, 22), (9, 4, 1, 10, 11)]
# Another order; the row (1, 10, 99) is new; margins -2, 1, -4, 3.
SECOND = [(1, 3, 1, 10, 12), (4, 3, 2, 20, 21), (0, 4, 1, 10, 99), (8, 5, 2, 20, 22)]


def written(path: Path, rows: list[tuple]) -> Path:
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


@pytest.fixture
def first(tmp_path) -> Path:
    return written(tmp_path / "first.tsv", FIRST)


@pytest.fixture
def second(tmp_path) -> Path:
    return written(tmp_path / "second.tsv", SECOND)


@pytest.fixture
def stores(tmp_path) -> tuple[kd.TextStore, kd.TextStore]:
    """Texts of all ids but query 2 and document 99."""
    queries = written(tmp_path / "queries.tsv", [(1, "what is <b>kd</b>")])
    documents = written(tmp_path / "documents.tsv", [(i, f"text of {i}") for i in (10, 11, 12, 20, 21, 22)])
    return kd.TextStore.from_tsv(queries), kd.TextStore.from_tsv(documents)


def warnings_of(tmp_path, rows: list[tuple]) -> list[str]:
    return diagnose_teachers([written(tmp_path / "warned.tsv", rows)])["files"][0]["warnings"]


# ---- One file -------------------------------------------------------------------------------------------------------


def test_counts_of_a_small_file_are_those_counted_by_hand(first):
    facts = diagnose_teachers([first])["files"][0]
    assert facts["file"] == str(first)
    assert (facts["rows"], facts["queries"], facts["pairs"]) == (5, 2, 6)
    assert (facts["duplicate_rows"], facts["same_ids"]) == (1, 0)


def test_scores_and_margins_of_a_small_file_are_those_computed_by_hand(first):
    facts = diagnose_teachers([first])["files"][0]
    scores, margins = facts["scores"], facts["margins"]
    assert (scores["min"], scores["max"], scores["mean"]) == (1, 9, 4.9)
    assert scores["std"] == pytest.approx((66.9 / 10) ** 0.5)  # squares sum to 307, minus 10 * 4.9^2
    assert (margins["min"], margins["max"], margins["mean"]) == (-1, 6, 3)
    assert margins["std"] == pytest.approx((42 / 5) ** 0.5)  # 4 + 16 + 9 + 9 + 4
    assert (margins["negative"], margins["zero"]) == (0.2, 0.2)
    assert facts["warnings"] == []


def test_quantiles_of_margins_lie_between_the_sorted_margins(first):
    quantiles = diagnose_teachers([first])["files"][0]["margins"]["quantiles"]
    # of -1, 0, 5, 5, 6, at 4 * share from the first on
    expected = {"1%": -0.96, "5%": -0.8, "25%": 0, "50%": 5, "75%": 5, "95%": 5.8, "99%": 5.96}
    assert list(quantiles) == list(expected)
    assert quantiles == pytest.approx(expected)


def test_histograms_have_40_equal_bins_from_least_to_greatest_and_hold_every_value(first):
    facts = diagnose_teachers([first])["files"][0]
    for kind, values in (("scores", [9, 4, 2, 3, 5, 5, 7, 1, 9, 4]), ("margins", [5, -1, 0, 6, 5])):
        histogram = facts[kind]["histogram"]
        counts, edges = np.histogram(values, 40)
        assert histogram["counts"] == counts.tolist()
        assert histogram["edges"] == pytest.approx(edges.tolist())


def test_scores_far_from_zero_keep_their_deviation(tmp_path):
    rows = [(100_000 + i % 2, 100_000, i, 1, 2) for i in range(1000)]
    facts = diagnose_teachers([written(tmp_path / "far.tsv", rows)])["files"][0]
    assert facts["margins"]["std"] == pytest.approx(0.5)
    assert facts["scores"]["std"] == pytest.approx((0.25 * 0.75) ** 0.5)


@pytest.mark.parametrize("form", ["gzip", "parquet", "float64"])
def test_compressed_files_and_parquet_say_the_same(tmp_path, first, form):
    if form == "gzip":
        path = tmp_path / "first.tsv.gz"
        path.write_bytes(gzip.compress(first.read_bytes()))
    else:
        path = tmp_path / "first.parquet"
        rows = kd.load_teacher_scores(first)
        kind = datasets.Value("float64" if form == "float64" else "float32")
        rows.cast_column("pos_score", kind).cast_column("neg_score", kind).to_parquet(path)
    expected = diagnose_teachers([first])
    assert diagnose_teachers([path]) == expected | {"files": [expected["files"][0] | {"file": str(path)}]}


@pytest.mark.parametrize("rows_at_once", [1 << 19, 3])
def test_a_list_counts_as_rows_of_its_first_document_against_each_other(tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr(diagnose, "ROWS_AT_ONCE", rows_at_once)
    lists = [
        {"query_id": 1, "doc_ids": [10, 11, 12], "teacher_scores": [9, 4, 10]},
        {"query_id": 2, "doc_ids": [20, 21, 22], "teacher_scores": [5, 5, 8]},
    ]
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lists))
    report = diagnose_teachers([path])
    facts, (least, _) = report["files"][0], report["false_negatives"]["examples"]
    assert (facts["rows"], facts["queries"], facts["pairs"], facts["duplicate_rows"]) == (4, 2, 6, 0)
    assert facts["margins"]["mean"] == pytest.approx(0.25)  # of 5, -1, 0, -3
    assert facts["scores"]["mean"] == pytest.approx(41 / 6)
    assert (least["query_id"], least["pos_id"], least["neg_id"], least["scores"]) == ("2", "20", "22", [[5, 8]])


def test_lists_match_the_pairs_of_another_file(tmp_path, first):
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps({"query_id": 1, "doc_ids": [10, 12, 11], "teacher_scores": [2, 3, 1]}))
    comparison = diagnose_teachers([first, path])["comparisons"][0]
    assert (comparison["shared_rows"], comparison["agreement"]) == (2, 1)


def test_lists_of_several_lengths_are_refused(tmp_path):
    rows = {"query_id": [1, 2], "doc_ids": [[1, 2], [1, 2, 3]], "teacher_scores": [[1.0, 2.0], [1.0, 2.0, 3.0]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "ragged.parquet")
    with pytest.raises(ValueError, match=r"ragged\.parquet: all lists need one length; the first has 2 documents"):
        diagnose_teachers([tmp_path / "ragged.parquet"])


# ---- Warnings -------------------------------------------------------------------------------------------------------


def test_scores_within_0_and_1_are_told_to_be_squashed_and_logits_are_not(tmp_path):
    (warning,) = warnings_of(tmp_path, [(1, 0.2, 1, 2, 3), (0.9, 0, 2, 4, 5)])
    assert warning == (
        "All scores lie within [0, 1], as a sigmoid squashes them: Margin-MSE would learn tiny margins. Score again "
        "with raw logits."
    )
    assert warnings_of(tmp_path, [(1.01, 0.2, 1, 2, 3), (0.9, 0, 2, 4, 5)]) == []
    assert warnings_of(tmp_path, [(1, 0.2, 1, 2, 3), (0.9, -0.1, 2, 4, 5)]) == []


def test_constant_scores_are_told_with_their_value(tmp_path):
    warnings = warnings_of(tmp_path, [(0.5, 0.5, 1, 2, 3), (0.5, 0.5, 2, 4, 5)])
    assert warnings[0] == "All scores are 0.5: nothing can be learned. Check the teacher, and score again."
    assert warnings[1].startswith("All margins are zero") and len(warnings) == 2


def test_zero_margins_are_told_where_scores_differ(tmp_path):
    (warning,) = warnings_of(tmp_path, [(3, 3, 1, 2, 3), (5, 5, 2, 4, 5)])
    assert warning.startswith("All margins are zero: a student would learn to score all alike.")
    assert warnings_of(tmp_path, [(3, 3, 1, 2, 3), (5, 4, 2, 4, 5)]) == []


def test_documents_that_are_positive_and_negative_are_counted(tmp_path):
    (warning,) = warnings_of(tmp_path, [(3, 1, 1, 2, 2), (5, 4, 2, 4, 5), (5, 4, 2, 5, 5)])
    assert warning == "2 rows name one document as positive and negative and teach nothing. Drop them."


def test_mostly_negative_margins_are_told(tmp_path):
    (warning,) = warnings_of(tmp_path, [(3, 4, 1, 2, 3), (4, 5, 2, 4, 5), (9, 4, 2, 4, 6)])
    assert warning.startswith("Most margins are negative")
    assert warnings_of(tmp_path, [(3, 4, 1, 2, 3), (9, 4, 2, 4, 6)]) == []


def test_files_of_margins_have_no_scores_and_say_so(tmp_path):
    margins = {"query_id": [7, 8], "positive_id": [12, 1], "negative_id": [3, 2], "score": [0.5, 0.25]}
    datasets.Dataset.from_dict(margins).to_parquet(tmp_path / "margins.parquet")
    report = diagnose_teachers([tmp_path / "margins.parquet"])
    facts = report["files"][0]
    assert facts["scores"] is None
    assert facts["margins"]["mean"] == 0.375
    (warning,) = facts["warnings"]
    assert warning.startswith("The file holds only margins")
    assert re.search(r"scores mean +-\n", diagnosis_text(report))


# ---- Between files --------------------------------------------------------------------------------------------------


def test_two_files_are_compared_over_the_rows_that_both_have(first, second):
    (comparison,) = diagnose_teachers([first, second])["comparisons"]
    assert comparison["files"] == [str(first), str(second)]
    assert (comparison["shared_rows"], comparison["spearman_rows"]) == (3, 3)
    # margins (-1, 0, 6) and (-2, 1, 3): the signs of the second row differ, the ranks agree
    assert comparison["agreement"] == pytest.approx(2 / 3)
    assert comparison["pearson"] == pytest.approx(pearsonr([-1, 0, 6], [-2, 1, 3]).statistic)
    assert comparison["spearman"] == pytest.approx(1)


def test_a_zero_margin_agrees_with_a_zero_margin_only(tmp_path):
    one = written(tmp_path / "one.tsv", [(1, 1, 1, 2, 3), (1, 1, 1, 2, 4), (2, 2, 1, 2, 5), (2, 1, 1, 2, 6)])
    two = written(tmp_path / "two.tsv", [(3, 3, 1, 2, 3), (1, 2, 1, 2, 4), (2, 1, 1, 2, 5), (5, 1, 1, 2, 6)])
    assert diagnose_teachers([one, two])["comparisons"][0]["agreement"] == 0.5


def test_queries_are_ranked_by_their_mean_difference_of_standardised_margins(first, second):
    report = diagnose_teachers([first, second])
    (a, b), (most, least) = (facts["margins"] for facts in report["files"]), report["comparisons"][0]["queries"]
    by_hand = {
        margins: abs((margins[0] - 3) / 8.4**0.5 - (margins[1] + 0.5) / 7.25**0.5)
        for margins in [(-1, -2), (0, 1), (6, 3)]
    }
    assert (a["mean"], b["mean"]) == (3, -0.5)
    assert most == {"query_id": "2", "rows": 2, "disagreement": pytest.approx((by_hand[0, 1] + by_hand[6, 3]) / 2)}
    assert least == {"query_id": "1", "rows": 1, "disagreement": pytest.approx(by_hand[-1, -2])}


def test_the_order_of_rows_changes_nothing_between_files(tmp_path, first, second):
    turned = written(tmp_path / "turned.tsv", SECOND[::-1])
    expected, found = (diagnose_teachers([first, path])["comparisons"][0] for path in (second, turned))
    assert found | {"files": None} == expected | {"files": None}


def test_the_last_of_repeated_rows_counts_between_files(tmp_path, second):
    repeated = written(tmp_path / "repeated.tsv", [(9, 0, 1, 10, 12), (0, 9, 2, 20, 21), (1, 3, 1, 10, 12)])
    report = diagnose_teachers([repeated, second])
    assert report["comparisons"][0]["shared_rows"] == 2
    assert report["comparisons"][0]["agreement"] == 0.5
    assert report["false_negatives"]["rows"] == 4


def test_files_without_shared_rows_have_no_correlation(tmp_path, first):
    other = written(tmp_path / "other.tsv", [(1, 2, 1, 11, 10)])  # the same documents, turned round
    (comparison,) = diagnose_teachers([first, other])["comparisons"]
    assert comparison["shared_rows"] == 0
    assert [comparison[key] for key in ("pearson", "spearman", "agreement")] == [None] * 3
    assert comparison["queries"] == []


def test_constant_margins_have_no_correlation(tmp_path, first):
    constant = written(tmp_path / "constant.tsv", [(row[0] + 1, row[0], *row[2:]) for row in FIRST])
    (comparison,) = diagnose_teachers([first, constant])["comparisons"]
    assert (comparison["shared_rows"], comparison["pearson"], comparison["spearman"]) == (4, None, None)


def test_integer_ids_match_where_another_file_has_one_that_is_a_string(tmp_path, first):
    rows = [*SECOND, (2, 1, "q", "d7", "文書")]
    report = diagnose_teachers([first, written(tmp_path / "strings.tsv", rows)])
    assert report["comparisons"][0]["shared_rows"] == 3
    assert report["files"][1]["pairs"] == 8
    assert report["false_negatives"]["rows"] == 6


def made_up(path: Path, seed: int, is_string: bool) -> tuple[Path, list[tuple]]:
    rng = random.Random(seed)
    name = "q{}".format if is_string else int
    rows = []
    for _ in range(2000):
        positive, negative = rng.sample(range(12), 2)
        scores = [float(np.float32(rng.gauss(document / 4, 2))) for document in (positive, negative)]
        rows.append((*scores, name(rng.randrange(40)), positive, negative))
    return written(path, rows), rows


@pytest.mark.parametrize("is_string", [False, True])
@pytest.mark.parametrize(("bucket_count", "rows_at_once"), [(256, 1 << 18), (7, 300)])
def test_figures_agree_with_plain_python_and_scipy(tmp_path, monkeypatch, is_string, bucket_count, rows_at_once):
    monkeypatch.setattr(buckets, "BUCKETS", bucket_count)
    monkeypatch.setattr(diagnose, "ROWS_AT_ONCE", rows_at_once)
    paths, rows = zip(*(made_up(tmp_path / f"{i}.tsv", i, is_string) for i in range(3)), strict=True)
    report = diagnose_teachers(paths, examples=5)
    margins = [{row[2:]: row[0] - row[1] for row in of} for of in rows]
    means = [fmean(row[0] - row[1] for row in of) for of in rows]
    stds = [pstdev(row[0] - row[1] for row in of) for of in rows]
    for facts, of, distinct in zip(report["files"], rows, margins, strict=True):
        assert facts["duplicate_rows"] == 2000 - len(distinct)
        assert facts["queries"] == len({row[2] for row in of})
        assert facts["pairs"] == len({(row[2], document) for row in of for document in row[3:]})
    for (i, j), found in zip(combinations(range(3), 2), report["comparisons"], strict=True):
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
    found = report["false_negatives"]
    assert (found["rows"], found["count"]) == (len(scaled), sum(margin < 0 for margin in scaled.values()))
    worst = sorted(scaled, key=scaled.get)[:5]
    assert [tuple(example[k] for k in ("query_id", "pos_id", "neg_id")) for example in found["examples"]] == [
        tuple(map(str, row)) for row in worst
    ]
    assert [example["margin"] for example in found["examples"]] == pytest.approx([scaled[row] for row in worst])


def test_spearman_of_many_rows_is_taken_of_a_sample(tmp_path, monkeypatch):
    paths, _ = zip(*(made_up(tmp_path / f"{i}.tsv", i, False) for i in range(2)), strict=True)
    whole = diagnose_teachers(paths)["comparisons"][0]
    monkeypatch.setattr(diagnose, "SPEARMAN_ROWS", 1000)  # of the 2,000 rows of each file
    sampled = diagnose_teachers(paths)["comparisons"][0]
    assert whole["spearman_rows"] == whole["shared_rows"]
    assert 0.35 < sampled["spearman_rows"] / sampled["shared_rows"] < 0.65
    assert sampled["pearson"] == whole["pearson"]
    assert sampled["spearman"] == pytest.approx(whole["spearman"], abs=0.15)


# ---- False negatives ------------------------------------------------------------------------------------------------


def test_false_negatives_of_one_file_are_its_negative_margins(first):
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


def test_false_negatives_are_averaged_over_the_files_that_hold_the_row(first, second):
    found = diagnose_teachers([first, second])["false_negatives"]
    assert (found["rows"], found["count"], found["share"]) == (5, 2, 0.4)
    worst, second_worst = found["examples"]
    assert worst["neg_id"] == "99" and worst["scores"] == [None, [0, 4]]
    assert worst["margin"] == pytest.approx(-4 / 7.25**0.5)
    assert second_worst["neg_id"] == "12" and second_worst["scores"] == [[2, 3], [1, 3]]
    assert second_worst["margin"] == pytest.approx((-1 / 8.4**0.5 - 2 / 7.25**0.5) / 2)


@pytest.mark.parametrize("examples", [0, 1])
def test_no_more_examples_are_shown_than_asked_for(first, second, examples):
    report = diagnose_teachers([first, second], examples=examples)
    assert len(report["false_negatives"]["examples"]) == examples
    assert len(report["comparisons"][0]["queries"]) == examples
    assert report["false_negatives"]["count"] == 2
    assert "Suspected false negatives" in diagnosis_text(report)


# ---- Texts ----------------------------------------------------------------------------------------------------------


def test_texts_are_shown_where_stores_are_given_and_null_where_they_lack_an_id(first, second, stores):
    report = diagnose_teachers([first, second], *stores)
    worst, second_worst = report["false_negatives"]["examples"]
    assert (second_worst["query"], second_worst["positive"]) == ("what is <b>kd</b>", "text of 10")
    assert second_worst["negative"] == "text of 12"
    assert worst["negative"] is None
    assert [example["query"] for example in report["comparisons"][0]["queries"]] == [None, "what is <b>kd</b>"]


def test_one_store_shows_its_texts_only(first, stores):
    (example,) = diagnose_teachers([first], queries=stores[0])["false_negatives"]["examples"]
    assert example["query"] == "what is <b>kd</b>"
    assert not {"positive", "negative"} & example.keys()


# ---- Renderings -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Cells and paragraphs of a page, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts, self.tags, self.loaded = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.texts.append(data)


def page_of(report: dict, tmp_path) -> Page:
    diagnosis_html(report, tmp_path / "page.html")
    return Page((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_the_report_survives_json_in_full(first, second, stores):
    report = diagnose_teachers([first, second], *stores)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert diagnosis_text(json.loads(json.dumps(report))) == diagnosis_text(report)


def test_the_text_names_files_figures_warnings_and_examples(tmp_path, first, second, stores):
    squashed = written(tmp_path / "squashed.tsv", [(0.9, 0.1, 1, 10, 12)])
    text = diagnosis_text(diagnose_teachers([first, second, squashed], *stores))
    assert f"1: {first}\n2: {second}\n3: {squashed}\n" in text
    assert "Warning, file 3: All scores lie within [0, 1]" in text
    assert re.search(r"^rows +5 +4 +1$", text, re.MULTILINE)
    assert re.search(r"^negative margins +20\.00% +50\.00% +0\.00%$", text, re.MULTILINE)
    assert re.search(r"^1 and 2 +3 +0\.8746 +1 +3 +0\.6667$", text, re.MULTILINE)
    assert re.search(r"^2 and 3 +1 +- +- +1 +0$", text, re.MULTILINE)
    assert "In 2 of 5 rows (40.00%) the negative scores above the positive" in text
    assert re.search(r"^1 +10 +99 +-1\.486 +- \| 0 / 4 \| - +what is <b>kd</b> +text of 10 +-$", text, re.MULTILINE)


def test_long_texts_and_line_breaks_do_not_break_the_table(tmp_path, first):
    path = tmp_path / "queries.jsonl"
    path.write_text(json.dumps({"_id": 1, "text": "line\nbreak\t" + "long " * 40}))
    text = diagnosis_text(diagnose_teachers([first], kd.TextStore.from_jsonl(path)))
    row = next(line for line in text.splitlines() if "line break long" in line)
    assert len(row) < 120


def test_the_page_holds_the_numbers_and_loads_nothing(tmp_path, first, second, stores):
    page = page_of(diagnose_teachers([first, second], *stores), tmp_path)
    for text in ("2.898", "0.8746", "0.6667", "20.00%", "-1.486", "2 / 3 | 1 / 3", "text of 12"):
        assert text in page.texts
    assert all(value.startswith("data:image/png;base64,") for value in page.loaded)
    assert not {"script", "link", "iframe"} & set(page.tags)


def test_texts_are_escaped_in_the_page(tmp_path, first, stores):
    page = page_of(diagnose_teachers([first], *stores), tmp_path)
    assert "what is <b>kd</b>" in page.texts
    assert "b" not in page.tags


def test_without_matplotlib_the_page_has_the_tables_and_says_so(tmp_path, monkeypatch, first):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = page_of(diagnose_teachers([first]), tmp_path)
    assert "matplotlib is missing; install it (extra [report]) to see them." in page.texts
    assert "img" not in page.tags
    assert "2.898" in page.texts


def test_with_matplotlib_the_page_has_the_histograms_inside(tmp_path, first, second):
    pytest.importorskip("matplotlib")
    page = page_of(diagnose_teachers([first, second]), tmp_path)
    (image,) = page.loaded
    assert image.startswith("data:image/png;base64,iVBOR")


def test_a_page_in_a_folder_that_does_not_exist_is_refused(tmp_path, first):
    with pytest.raises(FileNotFoundError, match=r"none, the folder of the output page\.html, does not exist"):
        diagnosis_html(diagnose_teachers([first]), tmp_path / "none" / "page.html")


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_no_files_are_an_error():
    with pytest.raises(ValueError, match="Needed one teacher file or more and examples >= 0, got 0 and 10"):
        diagnose_teachers([])


def test_a_missing_file_is_an_error_before_any_is_read(tmp_path, first):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'none.tsv'} does not exist")):
        diagnose_teachers([first, tmp_path / "none.tsv"])
    assert not (tmp_path / "cache").exists()


def test_a_malformed_row_is_named_by_file_and_line(tmp_path):
    path = written(tmp_path / "bad.tsv", [FIRST[0], ("nan", 1, 1, 2, 3)])
    with pytest.raises(ValueError, match=re.escape(f"{path} line 2: pos_score must be a finite number, got 'nan'")):
        diagnose_teachers([path])


def test_a_single_path_is_one_file(first):
    assert diagnose_teachers(first) == diagnose_teachers(str(first)) == diagnose_teachers([first])


def test_nothing_is_left_on_disk_but_the_loaded_tables(tmp_path, first):
    kd.load_teacher_scores(first)
    before = sorted((tmp_path / "cache").rglob("*"))
    diagnose_teachers([first])
    assert sorted((tmp_path / "cache").rglob("*")) == before
