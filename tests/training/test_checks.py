"""Bad input that `RankingTrainer` refuses or warns of before it trains, by row, file and count."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.data.rows import TeacherRows
from hf_kd_ranking.training.checks import check_rows

ONE_MODEL = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
PAIRS = [(3.0 + i, 1.0, 100 + i % 3, i, 10 + i) for i in range(8)]
LISTS = [(100 + i % 3, [i, 10 + i, 20 + i], [3.0, 1.0, float(-i)]) for i in range(8)]
UNEVEN = [(query, ids[: 2 + i % 2], scores[: 2 + i % 2]) for i, (query, ids, scores) in enumerate(LISTS)]


@pytest.fixture
def stores(toy, private_cache) -> tuple[kd.TextStore, kd.TextStore]:
    return kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")


@pytest.fixture
def string_stores(tmp_path) -> tuple[kd.TextStore, kd.TextStore]:
    """The same ids as strings: `q100`, `d0`."""
    (tmp_path / "q.tsv").write_text("".join(f"q{i}\ttext\n" for i in range(100, 116)))
    (tmp_path / "d.tsv").write_text("".join(f"d{i}\ttext\n" for i in range(40)))
    return kd.TextStore.from_tsv(tmp_path / "q.tsv"), kd.TextStore.from_tsv(tmp_path / "d.tsv")


@pytest.fixture
def write(tmp_path) -> Callable[..., TeacherRows]:
    """write(rows, as_strings): the rows read from a file, with a blank line first, which counts as a line."""

    def write(rows: list[tuple], as_strings: bool = False) -> TeacherRows:
        q, d = ("q", "d") if as_strings else ("", "")
        lines = []
        for row in rows:
            if len(row) == 5:
                lines.append(f"{row[0]}\t{row[1]}\t{q}{row[2]}\t{d}{row[3]}\t{d}{row[4]}")
            else:
                query, doc_ids, scores = row
                ids = [f"{d}{i}" for i in doc_ids]
                lines.append(json.dumps({"query_id": f"{q}{query}", "doc_ids": ids, "teacher_scores": scores}))
        number = len(list(tmp_path.glob("rows*")))
        path = tmp_path / f"rows{number}{'.tsv' if len(rows[0]) == 5 else '.jsonl'}"
        path.write_text("\n" + "".join(line + "\n" for line in lines))
        return kd.load_teacher_scores(path)

    return write


def changed(rows: list[tuple], *changes: tuple) -> list[tuple]:
    """The rows with (row, column, value) changed; in a list the last document."""
    rows = [list(row) for row in rows]
    for row, column, value in changes:
        old = rows[row][column]
        rows[row][column] = [*old[:-1], value] if isinstance(old, list) else value
    return [tuple(row) for row in rows]


# ---- Ids ------------------------------------------------------------------------------------------------------------


# In batches of 3 rows: within a batch, over batches, and in the last, smaller one.
@pytest.mark.parametrize("as_strings", [False, True])
@pytest.mark.parametrize("batch_size", [6, 200])
def test_missing_ids_are_named_with_line_and_counts(write, stores, string_stores, as_strings, batch_size):
    queries, documents = string_stores if as_strings else stores
    q, d = ("q", "d") if as_strings else ("", "")
    bad = changed(PAIRS, (4, 2, 9), *((row, 4, n) for row, n in ((1, 77), (2, 55), (5, 77), (6, 66), (7, 99))))
    with pytest.raises(KeyError) as error:
        check_rows(write(bad, as_strings), queries, documents, batch_size)
    message = error.value.args[0]
    assert re.search(
        rf"rows0\.tsv line 6: query_id '{q}9' is not among the 16 texts of \S+ \(1 of 8 rows have such ids: '{q}9'\)",
        message,
    )
    wanted = f"'{d}77', '{d}55', '{d}66'"
    assert re.search(
        rf"rows0\.tsv line 3: doc_id '{d}77' is not .* \(5 of 8 rows have such ids: {wanted}\); do", message
    )
    assert "\n" not in message


@pytest.mark.parametrize("as_strings", [False, True])
def test_missing_ids_of_uneven_lists_are_counted_by_rows(write, stores, string_stores, as_strings):
    bad = [list(row) for row in UNEVEN]
    bad[3][1] = [70, 71, 70]
    bad[6][1] = [1, 72]
    rows = write([tuple(row) for row in bad], as_strings)
    d = "d" if as_strings else ""
    ids = f"'{d}70', '{d}71', '{d}72'"
    with pytest.raises(KeyError, match=rf"line 5: doc_id '{d}70' is not .* \(2 of 8 rows have such ids: {ids}\)"):
        check_rows(rows, *(string_stores if as_strings else stores), batch_size=6)


@pytest.mark.parametrize("as_strings", [False, True])
@pytest.mark.parametrize(
    ("rows", "changes", "document"),
    [(PAIRS, [(4, 3, 14), (7, 3, 17)], "14"), (LISTS, [(4, 1, 4), (7, 1, 17)], "4"), (UNEVEN, [(4, 1, 4)], "4")],
    ids=["pairs", "lists", "uneven"],
)
def test_document_twice_in_a_row_is_refused(write, stores, string_stores, rows, changes, document, as_strings):
    bad, stores = write(changed(rows, *changes), as_strings), string_stores if as_strings else stores
    message = rf"line 6: document '?d?{document}'? appears twice in the row \({len(changes)} of 8 rows have such\)"
    with pytest.raises(ValueError, match=message):
        check_rows(bad, *stores, batch_size=9)
    check_rows(write(rows, as_strings), *stores, batch_size=9)


def test_same_document_in_two_rows_is_allowed(write, stores):
    check_rows(write([(3.0, 1.0, 100, 1, 2), (1.0, 3.0, 100, 2, 1)]), *stores)


def test_bad_rows_are_refused_in_both_data_sets(model, make_trainer, write):
    bad = write(changed(PAIRS, (2, 4, 2)))
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=r"rows0\.tsv line 4: document 2 appears twice"):
            make_trainer(model, {name: bad})


def test_rows_of_a_selection_are_named_by_their_places(write, stores):
    rows = write(changed(PAIRS, (5, 4, 77))).select([7, 6, 5])
    with pytest.raises(KeyError, match=r"the selection from .*rows0\.tsv row 2: doc_id '77'"):
        check_rows(rows, *stores)


# ---- Scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [6, 1000])
def test_summary_is_of_all_rows(write, stores, batch_size):
    rows = write([(100, [1, 2, 3], [-5.0, 9.0, 1.0]), *[(102, [1, 2], [1.0, 1.0])] * 7])
    summary = check_rows(rows, *stores, batch_size=batch_size)
    assert (summary.has_margins, summary.lowest, summary.highest) == (True, -5.0, 9.0)
    assert summary.longest == 3
    assert np.flatnonzero(summary.is_query_used).tolist() == [0, 2]
    assert not check_rows(rows.select(range(1, 8)), *stores).has_margins


def test_selection_without_rows_is_refused(write, stores):
    with pytest.raises(ValueError, match="no teacher rows"):
        check_rows(write(LISTS).select([]), *stores)


def test_rows_without_scores_are_refused(stores):
    rows = kd.load_teacher_scores(datasets.Dataset.from_dict({"query_id": [100], "pos_id": [1], "neg_id": [2]}))
    with pytest.raises(ValueError, match=r"the data set has no teacher scores; `teacher score` adds them"):
        check_rows(rows, *stores)


@ONE_MODEL
@pytest.mark.parametrize("rows", [PAIRS, LISTS, UNEVEN], ids=["pairs", "lists", "uneven"])
def test_constant_teacher_is_refused_by_losses_that_read_it(model, make_trainer, write, rows):
    flat = []
    for i, row in enumerate(rows):
        flat.append((i, i, *row[2:]) if len(row) == 5 else (*row[:2], [float(i)] * len(row[1])))
    message = r"All teacher margins are 0: in each of the 8 rows, .*line 2, all.* margin_mse learns nothing"
    for loss in ("margin_mse", "ranknet:1,margin_mse:0.5"):
        with pytest.raises(ValueError, match=message):
            make_trainer(model, {"train_dataset": write(flat)}, loss=loss)
    make_trainer(model, {"train_dataset": write(flat)}, loss="ranknet")
    make_trainer(model, {"eval_dataset": write(flat)})
    one_margin = changed(flat, (7, 0, 9.0)) if rows is PAIRS else changed(flat, (7, 2, 9.0))
    make_trainer(model, {"train_dataset": write(one_margin)})


def warnings_of(make: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    assert all(Path(warning.filename) != Path(check_rows.__code__.co_filename) for warning in caught)
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


@ONE_MODEL
@pytest.mark.parametrize(
    ("scores", "settings", "words"),
    [
        ((1.0, 0.0), {}, r"All teacher scores lie in \[0, 1\] and look like sigmoid outputs, .* at most 1"),
        ((0.9, -1.0), {}, r"All teacher scores lie in \[-1, 0.9\] and look like cosines, .* at most 2"),
        ((1.1, 0.0), {}, None),
        ((0.5, -1.1), {}, None),
        ((1.0, 0.0), {"teacher_scale": "match"}, None),
        ((1.0, 0.0), {"teacher_scale": "20"}, None),
        ((1.0, 0.0), {"loss": "ranknet"}, None),
    ],
)  # fmt: skip
def test_squashed_teacher_scores_are_warned_of(model, make_trainer, write, scores, settings, words):
    rows = write([(*scores, *PAIRS[0][2:]), (0.5, 0.2, *PAIRS[1][2:])])
    messages = warnings_of(lambda: make_trainer(model, {"train_dataset": rows}, **settings))
    assert (len(messages) == 1 and re.match(words, messages[0])) if words else not messages


@ONE_MODEL
def test_grades_and_margins_may_be_small(model, make_trainer, write):
    grades = write([(100, [1, 2, 3], [1.0, 0.0, 0.0])])
    assert warnings_of(lambda: make_trainer(model, {"train_dataset": grades}, loss="lambda_loss")) == []
    margins = datasets.Dataset.from_dict(
        {"query_id": [100], "positive_id": [1], "negative_id": [2], "score": np.float32([0.5])}
    )
    assert warnings_of(lambda: make_trainer(model, {"train_dataset": margins})) == []
    with pytest.raises(ValueError, match="mse reads the teacher's score of each document, and these rows hold only"):
        make_trainer(model, {"train_dataset": margins}, loss="mse")


@ONE_MODEL
def test_held_out_queries_that_are_trained_on_are_counted(model, make_trainer, write, toy, stores):
    training = write([(3.0, 1.0, query, 1, 2) for query in (100, 101, 102, 112)])

    def evaluator(*queries: int) -> kd.RerankingEvaluator:
        run = kd.Run({str(query): [("1", 2.0), ("2", 1.0)] for query in queries})
        return kd.RerankingEvaluator(run, {str(query): {"1": 1} for query in queries}, *stores)

    overlapping = {
        "eval_dataset": write([(3.0, 1.0, query, 1, 2) for query in (100, 105, 112, 112)]),
        "evaluator": evaluator(112, 113, 114, 115),
    }
    messages = warnings_of(lambda: make_trainer(model, {"train_dataset": training} | overlapping))
    assert [text.split(",")[0] for text in messages] == [
        "2 of the 3 queries of the eval_dataset are training queries too",
        "1 of the 4 queries of the evaluator are training queries too",
    ]
    held_out = {"eval_dataset": write([(3.0, 1.0, 105, 1, 2)]), "evaluator": evaluator(113, 7)}
    assert warnings_of(lambda: make_trainer(model, {"train_dataset": training} | held_out)) == []
