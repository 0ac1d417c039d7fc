"""The steps that make what students learn from."""

import json
from types import SimpleNamespace

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.distillation import teaching
from hf_kd_ranking.distillation.candidates import ranking
from hf_kd_ranking.distillation.job import TargetNotMetError

SETTINGS = {"documents": 4, "lists_per_query": 3, "sampling": "stratified", "relative_margin": 0.95}
SETTINGS["minimum_grade"] = 1


@pytest.fixture
def context(tmp_path) -> SimpleNamespace:
    """Documents a to h, of which h repeats the text of a."""
    lines = [f"{name}\tthe {name} text\n" for name in "abcdefg"]
    (tmp_path / "texts.tsv").write_text("".join([*lines, "h\tThe  A text\n"]))
    documents = kd.TextStore.from_tsv(tmp_path / "texts.tsv")
    return SimpleNamespace(documents=documents, is_main_process=True, device="cpu")


def lists_of(folder) -> list[tuple[str, list[str], list[float]]]:
    rows = kd.load_teacher_scores(folder / "rows.jsonl").rows
    return [(row["query_id"], row["doc_ids"], row["teacher_scores"]) for row in rows]


# ---- Scores ---------------------------------------------------------------------------------------------------------


def test_mean_is_of_standardised_scores_and_of_queries_that_all_have(tmp_path, make_artifact):
    one = make_artifact("one", {"q": [("a", 3.0), ("b", 1.0)], "r": [("a", 2.0), ("b", 0.0)], "s": [("a", 9.0)]})
    two = make_artifact("two", {"q": [("b", 30.0), ("a", 10.0)], "r": [("a", 30.0), ("b", 10.0)]})
    teaching.average_scores(tmp_path, [one, two])
    mean = kd.read_run(tmp_path / "run.trec")
    # The first: mean 1.5, unit 1. The second: mean 20, unit 10.
    assert mean.keys() == {"q", "r"}
    assert dict(mean["q"]) == pytest.approx({"a": (1.5 - 1) / 2, "b": (-0.5 + 1) / 2})
    assert dict(mean["r"]) == pytest.approx({"a": (0.5 + 1) / 2, "b": (-1.5 - 1) / 2})
    teaching.average_scores(tmp_path, [one, make_artifact("none", {})])
    assert (tmp_path / "run.trec").read_text() == ""


def test_mean_that_is_checked_is_what_lists_hold(tmp_path, make_artifact, context):
    # Scaled to 0..1 within each query the two would cancel; standardised the first is certain and counts more.
    scored = {"q": [("a", 10.0), ("b", 0.0)], "r": [("a", 1.0), ("b", 0.0)], "s": [("a", 1.0), ("b", 0.0)]}
    other = {"q": [("b", 4.0), ("a", 0.0)], "r": [("b", 4.0), ("a", 0.0)], "s": [("b", 4.0), ("a", 0.0)]}
    runs = {"one": make_artifact("one", scored), "two": make_artifact("two", other)}
    mean = make_artifact("mean")
    teaching.average_scores(mean.path, list(runs.values()))
    assert [ranking(mean)[query_id][0][0] for query_id in "qrs"] == ["a", "b", "b"]
    judgments = make_artifact("judgments", qrels={"q": {"a": 1}, "r": {"b": 1}, "s": {"b": 1}})
    first = make_artifact("first", {q: [("a", 2.0), ("b", 1.0)] for q in "qrs"})
    teaching.check_teacher(tmp_path, mean, runs, first, judgments, "RR@10", False)  # 1.0 against 0.67
    lists = make_artifact("lists")
    teaching.sample_lists(lists.path, mean, judgments, SETTINGS, context)
    for query_id, doc_ids, scores in lists_of(lists.path):
        assert dict(zip(doc_ids, scores, strict=True)) == pytest.approx(dict(ranking(mean)[query_id]))


def test_teacher_is_checked_on_the_queries_that_it_ranked(tmp_path, make_artifact, caplog):
    first = make_artifact("first", {q: [("x", 2.0), ("y", 1.0)] for q in ("q", "r")})
    good, bad = make_artifact("good", {"q": [("y", 2.0), ("x", 1.0)]}), make_artifact("bad", {})
    judgments = make_artifact("judgments", qrels={"q": {"y": 1}, "r": {"x": 1}})
    teaching.check_teacher(tmp_path, good, {"good": good}, first, judgments, "RR@10", False)
    teaching.check_teacher(tmp_path, bad, {"bad": bad}, first, judgments, "RR@10", False)  # ranked none of them
    judged = make_artifact("judged", qrels={"q": {"y": 1}})
    arguments = (tmp_path, first, {"first": first}, first, judged, "RR@10")
    words = r"the 1 validation queries no better than .*\(RR@10 0\.5000, first stage 0\.5000\).*--force"
    with pytest.raises(TargetNotMetError, match=words):
        teaching.check_teacher(*arguments, False)
    teaching.check_teacher(*arguments, True)
    assert "better than the mean" not in caplog.text


def test_better_single_teacher_is_reported(tmp_path, make_artifact, caplog):
    first = make_artifact("first", {"q": [("x", 3.0), ("z", 2.0), ("y", 1.0)]})
    good = make_artifact("good", {"q": [("y", 2.0), ("x", 1.0), ("z", 0.0)]})
    mean = make_artifact("mean", {"q": [("z", 2.0), ("y", 1.0), ("x", 0.0)]})
    judgments = make_artifact("judgments", qrels={"q": {"y": 1}})
    with caplog.at_level("WARNING"):
        teaching.check_teacher(tmp_path, mean, {"good": good, "mean": mean}, first, judgments, "RR@10", False)
    assert "good ranks the 1 validation queries better than the mean of the teachers (RR@10 1.0000, mean 0.5000)" in (
        caplog.text
    )


def test_bm25_teaches_by_the_scores_of_its_search(tmp_path, make_artifact, context):
    found = make_artifact("found", {"q": [("a", 5.0), ("b", 3.0), ("c", 2.0)]})
    candidates = make_artifact("candidates", {"q": [("d", 0.0), ("b", -1.0), ("a", -2.0)], "r": [("e", 0.0)]})
    teaching.score_candidates(tmp_path, "bm25", candidates, found, False, context)
    # What it did not find has the lowest score of the query; nothing at all was found for the other one.
    assert kd.read_run(tmp_path / "run.trec") == {"q": [("a", 5.0), ("b", 3.0), ("d", 2.0)], "r": [("e", 0.0)]}


def test_scores_of_a_run_are_taken_for_the_queries_of_a_split(tmp_path, context):
    kd.write_run({q: [("a", 2.0), ("b", 1.0)] for q in "qrs"}, tmp_path / "my scores.trec")
    teaching.select_scores(tmp_path, tmp_path / "my scores.trec", ["s", "q", "missing"], context)
    assert list(kd.read_run(tmp_path / "run.trec")) == ["s", "q"]
    teaching.select_scores(tmp_path, tmp_path / "my scores.trec", ["missing"], context)  # training queries only
    assert (tmp_path / "run.trec").read_text() == ""


# ---- Lists ----------------------------------------------------------------------------------------------------------


def test_false_negatives_duplicates_and_other_positives_are_never_in_lists(tmp_path, make_artifact, context):
    scores = {"a": 10.0, "b": 9.8, "c": 5.0, "d": 4.0, "e": 3.0, "f": 0.0, "h": 4.5, "g": 12.0}
    teacher = make_artifact("teacher", {"q": sorted(scores.items(), key=lambda pair: -pair[1])})
    judgments = make_artifact("judgments", qrels={"q": {"a": 2, "d": 1}})
    teaching.sample_lists(tmp_path, teacher, judgments, SETTINGS | {"minimum_grade": 2}, context)
    lists = lists_of(tmp_path)
    assert lists
    for _, doc_ids, of_list in lists:
        # b and g may be relevant, h repeats the positive, and d has a grade, though a low one.
        assert doc_ids[0] == "a" and set(doc_ids[1:]) <= {"c", "e", "f"}
        assert of_list == [scores[doc_id] for doc_id in doc_ids]
    left_out = json.loads((tmp_path / "left_out.json").read_text())
    assert (left_out["duplicates"], left_out["suspected_false_negatives"]) == (1, 2)


def test_best_candidate_is_the_positive_of_a_query_without_judgment(tmp_path, make_artifact, context):
    teacher = make_artifact("teacher", {q: [("b", 9.0), ("c", 3.0), ("d", 1.0)] for q in ("q", "r", "s")})
    # The judged document of r was not scored, as may be in runs of the user; the one of s is not relevant.
    judgments = make_artifact("judgments", qrels={"r": {"g": 1}, "s": {"c": 0}})
    for given in (judgments, None):
        teaching.sample_lists(tmp_path, teacher, given, SETTINGS, context)
        positives = {query_id: doc_ids[0] for query_id, doc_ids, _ in lists_of(tmp_path)}
        expected = {"q": "b", "r": "b"} | ({} if given else {"s": "b"})
        assert positives == expected


def test_labels_are_one_and_zero(tmp_path, make_artifact, context):
    candidates = make_artifact("candidates", {"q": [("b", 0.0), ("a", -1.0), ("h", -2.0), ("c", -3.0)]})
    judgments = make_artifact("judgments", qrels={"q": {"a": 1}})
    teaching.label_lists(tmp_path, candidates, None, judgments, SETTINGS, context)
    ((query_id, doc_ids, scores),) = lists_of(tmp_path)
    assert (query_id, doc_ids[0], set(doc_ids[1:])) == ("q", "a", {"b", "c"})
    assert scores == [1.0, 0.0, 0.0]


def test_rows_of_the_user_are_labelled_averaged_and_counted(tmp_path, make_artifact):
    for name, scores in (("one", ("4\t2", "4\t0")), ("two", ("30\t50", "30\t10"))):
        lines = [f"{pair}\tq\ta\t{negative}\n" for pair, negative in zip(scores, "bc", strict=True)]
        (tmp_path / f"{name}.tsv").write_text("".join(lines))
    labelled, mean = make_artifact("labelled"), make_artifact("mean")
    teaching.label_rows(labelled.path, tmp_path / "one.tsv")
    assert (labelled.path / "rows.tsv").read_text().splitlines() == ["1\t0\tq\ta\tb", "1\t0\tq\ta\tc"]
    teaching.average_rows(mean.path, [tmp_path / "one.tsv", tmp_path / "two.tsv"])
    margins = [one - other for one, other in kd.load_teacher_scores(mean.path / "rows.tsv").rows["teacher_scores"]]
    # The standard deviations of the scores of the files are 1.658 and 14.14.
    assert margins == pytest.approx([(2 / 1.658 - 20 / 14.14) / 2, (4 / 1.658 + 20 / 14.14) / 2], abs=1e-3)
    assert [teaching.count_rows(rows) for rows in (tmp_path / "one.tsv", labelled, mean)] == [2, 2, 2]
    assert teaching.rows_file(mean) == mean.path / "rows.tsv"
