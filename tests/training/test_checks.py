"""Bad rows and scores are one clear line before training starts; held-out queries that are not are a warning."""

import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.training.checks import check_rows

pytestmark = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
LISTS = {"query_id": [100, 101], "doc_ids": [[1, 2, 3], [4, 5, 6]], "teacher_scores": [[3.0, 1, 0], [2.0, 1, 1]]}


@pytest.fixture
def changed(toy, tmp_path) -> Callable[..., datasets.Dataset]:
    """changed(change): the toy rows after `change(lines)`, behind a blank line, which counts as a line."""

    def make(change: Callable[[list[list[str]]], None]) -> datasets.Dataset:
        lines = [line.split("\t") for line in (toy / "scores.tsv").read_text().splitlines()]
        change(lines)
        (tmp_path / "bad.tsv").write_text("\n" + "".join("\t".join(line) + "\n" for line in lines))
        return kd.load_teacher_scores(tmp_path / "bad.tsv")

    return make


def put(column: int, *values: str, first: int = 4, step: int = 5) -> Callable:
    def change(lines: list[list[str]]) -> None:
        for place, value in enumerate(values):
            lines[first + place * step][column] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(2, "7", "7"), r"query_id '7' .* 16 texts of .*queries\.tsv \(2 of 64 rows have such ids: '7'\)"),
        (
            put(4, "40", "41", "40", "44", "45"),
            r"neg_id '40' .* the 40 texts of .*collection\.tsv \(5 of 64 rows have such ids: '40', '41', '44'\)",
        ),
        (put(3, "x1"), r"pos_id 'x1' is not among .* \(1 of 64 rows have such ids: 'x1'\); do scores and texts"),
    ],
)
@pytest.mark.parametrize("batch_size", [1_000_000, 7])
def test_ids_without_texts_name_file_line_and_counts(model, changed, toy, change, message, batch_size):
    queries, documents = kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")
    with pytest.raises(KeyError, match=rf"bad\.tsv line 6: {message}"):
        check_rows(changed(change), queries, documents, batch_size)


def test_both_data_sets_are_checked_and_all_columns_reported(model, make_trainer, changed):
    def change(lines: list[list[str]]) -> None:
        put(2, "7", first=9)(lines)
        put(4, "40")(lines)

    bad = changed(change)
    for parts in ({"train_dataset": bad}, {"eval_dataset": bad}):
        with pytest.raises(KeyError, match=r"bad\.tsv line 11: query_id '7' .*bad\.tsv line 6: neg_id '40'"):
            make_trainer(model, parts)


def test_a_document_twice_in_a_row_is_refused(model, make_trainer, changed):
    def change(lines: list[list[str]]) -> None:
        for line in (lines[3], lines[8]):
            line[4] = line[3]

    with pytest.raises(ValueError, match=r"bad\.tsv line 5: document \d+ stands twice in the row \(2 of 64 rows"):
        make_trainer(model, {"train_dataset": changed(change)})
    lists = datasets.Dataset.from_dict(LISTS | {"doc_ids": [[1, 2, 3], [4, 6, 6]]})
    with pytest.raises(ValueError, match="row 1 of the teacher scores: document 6 stands twice"):
        make_trainer(model, {"train_dataset": lists})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"doc_ids": [[1, 2, 3], [4, 5]]}, r"row 1 of the teacher scores: doc_ids must be 3 values"),
        ({"teacher_scores": [[3.0, 1, 0], [2.0, float("nan"), 1]]}, r"row 1: teacher_scores must be finite numbers"),
        ({"query_id": [100, None]}, r"row 1 of the teacher scores: query_id must be 1 values .*, got None"),
    ],
)
def test_odd_lists_of_a_data_set_are_refused(model, make_trainer, columns, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model, {"train_dataset": kd.load_teacher_scores(datasets.Dataset.from_dict(LISTS | columns))})


def test_scores_without_a_margin_are_refused_where_they_are_read(model, make_trainer, changed):
    def change(lines: list[list[str]]) -> None:
        for place, line in enumerate(lines):
            line[0] = line[1] = str(place)

    constant = changed(change)
    with pytest.raises(ValueError, match=r"All teacher margins are 0: in each of the 64 rows, from .*bad\.tsv line 2"):
        make_trainer(model, {"train_dataset": constant})
    make_trainer(model, {"train_dataset": constant}, loss="ranknet")


@pytest.mark.parametrize(
    ("lowest", "loss", "scale", "message"),
    [
        (0.0, "margin_mse", "1", "look like sigmoid outputs, with margins of at most 1; give raw logits"),
        (-1.0, "margin_mse", "1", "look like cosines, with margins of at most 2;"),
        (0.0, "margin_mse", "match", None),
        (0.0, "ranknet", "1", None),
        (-1.1, "margin_mse", "1", None),
    ],
)
def test_squashed_scores_are_a_warning(model, make_trainer, changed, lowest, loss, scale, message):
    def change(lines: list[list[str]]) -> None:
        for place, line in enumerate(lines):
            line[0], line[1] = str(lowest), str(1 - place / 64)

    squashed = changed(change)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(model, {"train_dataset": squashed}, loss=loss, teacher_scale=scale)
    found = [str(warning.message) for warning in caught if "teacher scores lie" in str(warning.message)]
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


def test_held_out_queries_that_are_trained_on_are_a_warning(model, make_trainer, toy: Path):
    rows = kd.load_teacher_scores(toy / "scores.tsv")
    with pytest.warns(UserWarning, match="of the [0-9]+ queries of the eval_dataset are queries of the train_dataset"):
        make_trainer(model, {"eval_dataset": rows.select(range(5))})
    stores = kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")
    run = {"112": [("1", 1.0)], str(rows[0]["query_id"]): [("1", 1.0)]}
    evaluator = kd.RerankingEvaluator(kd.Run(run), {query: {"1": 1} for query in run}, *stores)
    with pytest.warns(UserWarning, match="^1 of the 2 queries of the evaluator are queries of the train_dataset too"):
        make_trainer(model, {"evaluator": evaluator})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(
            model, {"evaluator": kd.RerankingEvaluator(kd.Run({"112": run["112"]}), {"112": {"1": 1}}, *stores)}
        )


def test_facts_do_not_depend_on_the_size_of_the_batches(model, toy):
    rows = kd.load_teacher_scores(toy / "scores.tsv")
    stores = kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")
    facts = [check_rows(rows, *stores, batch_size=size) for size in (3, 1000)]
    assert np.flatnonzero(facts[0].is_query_used).tolist() == sorted({i - 100 for i in rows["query_id"]})
    scores = [*rows["pos_score"], *rows["neg_score"]]
    for found in facts:
        assert (found.lowest, found.highest, found.has_margins) == (min(scores), max(scores), True)
        assert (found.is_query_used == facts[0].is_query_used).all()
