"""Sampled rows: judged positives, unjudged candidates as negatives, filtered by ranks, a teacher and texts."""

import re
from collections import Counter

import pytest

import hf_kd_ranking as kd

RUN = kd.Run({q: [(f"d{i}", 20.0 - i) for i in range(12)] for q in ("q2", "q1", "unjudged", "only-zeros")})
QRELS = {
    "q1": {"d3": 1, "d5": 2, "far": 1, "d7": 0},
    "q2": {"d0": 3},
    "only-zeros": {"d1": 0},
    "not-in-run": {"d1": 1},
}


def triples(*arguments, **options) -> list[tuple[str, str, str]]:
    rows = kd.sample_triples(*arguments, **options)
    assert rows.has_scores == ("teacher" in options)
    return [(row["query_id"], *row["doc_ids"]) for row in rows]


@pytest.mark.parametrize("seed", range(5))
def test_positives_are_judged_and_negatives_are_candidates(seed):
    rows = triples(RUN, QRELS, per_query=8, seed=seed)
    assert [query_id for query_id, _, _ in rows] == ["q2"] * 8 + ["q1"] * 8  # the run's order; none without a positive
    for query_id, positive, negative in rows:
        positives = {doc_id for doc_id, grade in QRELS[query_id].items() if grade >= 1}
        assert positive in positives
        assert negative in {doc_id for doc_id, _ in RUN[query_id]} - positives
    assert len(set(rows)) == 16


def test_more_triples_than_there_are_gives_every_pair_once():
    rows = triples(RUN, QRELS, per_query=1000)
    assert sorted(row[2] for row in rows if row[0] == "q2") == sorted(f"d{i}" for i in range(1, 12))
    assert len(set(rows)) == len(rows) == 1 * 11 + 3 * 10


def test_grades_below_the_minimum_are_on_neither_side():
    rows = triples(RUN, QRELS, per_query=1000, minimum_grade=2)
    pairs = {row[1:] for row in rows if row[0] == "q1"}
    assert pairs == {("d5", f"d{i}") for i in range(12) if QRELS["q1"].get(f"d{i}", 0) <= 0}


def test_sampling_depends_on_the_seed_and_the_query_alone():
    sample = triples(RUN, QRELS, per_query=3)
    assert triples(kd.Run(reversed(RUN.items())), QRELS, per_query=3)[3:] == sample[:3]
    assert triples(RUN, QRELS, per_query=3) == sample
    assert triples(RUN, QRELS, per_query=3, seed=43) != sample


def test_nothing_to_sample_is_an_error_with_count_and_grade():
    with pytest.raises(
        ValueError, match=r"No triple: none of the 4 queries of the run has both a document of grade >= 4"
    ):
        kd.sample_triples(RUN, QRELS, minimum_grade=4)


RANKED = kd.Run({"q": [(f"d{i}", 20.0 - i) for i in range(1, 11)]})
JUDGED = {"q": {"d2": 1, "d9": 1}}


def negatives(**options) -> set[str]:
    return {negative for _, _, negative in triples(RANKED, JUDGED, per_query=1000, **options)}


@pytest.mark.parametrize(
    ("ranks", "wanted"),
    [(None, range(1, 11)), ((1, 3), (1, 3)), ((3, 3), (3,)), ((8, 10), (8, 10)), ((7, 99), (7, 8, 10))],
)
def test_negatives_come_from_the_ranks_of_the_run(ranks, wanted):
    assert negatives(ranks=ranks) == {f"d{rank}" for rank in wanted} - set(JUDGED["q"])


def test_positives_come_from_any_rank_or_none():
    rows = triples(RANKED, {"q": {"d9": 1, "far": 1}}, per_query=1000, ranks=(1, 1))
    assert set(rows) == {("q", "d9", "d1"), ("q", "far", "d1")}


def test_ranks_without_an_unjudged_document_give_no_triple():
    with pytest.raises(ValueError, match="No triple: none of the 1 queries"):
        negatives(ranks=(2, 2))
    with pytest.raises(ValueError, match="No triple"):
        negatives(ranks=(11, 20))


@pytest.mark.parametrize("ranks", [(0, 5), (-1, 5), (5, 4)])
def test_invalid_ranks_are_refused(ranks):
    with pytest.raises(ValueError, match=re.escape(f"ranks must be a first and a last rank, from 1, got {ranks}")):
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
def test_negatives_above_their_positive_are_left_out(margin, wanted):
    rows = triples(SCORED, JUDGED, per_query=1000, teacher=TEACHER, teacher_margin=margin, relative_margin=2)
    pairs = {(positive, negative) for positive, names in wanted.items() for negative in names.split()}
    assert {row[1:] for row in rows} == pairs


def test_margin_that_no_negative_keeps_gives_no_triple():
    with pytest.raises(ValueError, match="No triple"):
        kd.sample_triples(SCORED, JUDGED, teacher=TEACHER, teacher_margin=10)


def test_missing_teacher_scores_are_named_where_needed():
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
    assert {row[0] for row in triples(run, JUDGED, per_query=1000, teacher=TEACHER)} == {"q"}


# ---- Suspected false negatives, copies, counts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("relative_margin", "wanted"),
    [
        (None, {"d2": "d4 d5 d6", "d9": "d6"}),  # the lowest is 2: up to 2 + 0.95 * 3 = 4.85, and 2 + 0.95 * 1 = 2.95
        (0.5, {"d2": "d5 d6", "d9": "d6"}),  # 3.5 and 2.5
        (1.0, {"d2": "d3 d4 d5 d6", "d9": "d5 d6"}),
    ],
)
def test_negatives_near_their_positive_are_left_out(relative_margin, wanted):
    left_out = Counter()
    rows = triples(SCORED, JUDGED, 1000, teacher=TEACHER, relative_margin=relative_margin, left_out=left_out)
    pairs = {(positive, negative) for positive, names in wanted.items() for negative in names.split()}
    assert {row[1:] for row in rows} == pairs
    assert left_out["suspected_false_negatives"] == 5 - len(wanted["d9"].split())  # d9 is below d2


def test_relative_margin_does_not_depend_on_the_zero_of_the_teacher():
    shifted = kd.Run({"q": [(doc_id, score - 100) for doc_id, score in TEACHER["q"]]})
    rows = triples(SCORED, JUDGED, per_query=1000, teacher=TEACHER)
    assert triples(SCORED, JUDGED, per_query=1000, teacher=shifted) == rows


def test_all_above_a_positive_that_is_the_lowest_are_left_out():
    teacher = kd.Run({"q": [("d1", 3.0), ("d3", 1.0), ("d2", 1.0)]})
    run = kd.Run({"q": [("d1", 3.0), ("d2", 2.0), ("d3", 1.0)]})
    assert triples(run, {"q": {"d2": 1}}, per_query=9, teacher=teacher) == [("q", "d2", "d3")]
    with pytest.raises(ValueError, match=r"suspected_false_negatives 3, .*queries_without_negative 1"):
        kd.sample_triples(run, {"q": {"far": 1}}, teacher=kd.Run({"q": [*teacher["q"], ("far", 0.0)]}))


def test_copies_of_a_relevant_document_are_left_out(tmp_path):
    texts = {
        "d0": "Caf\u00e9  noir",
        "d1": "cafe\u0301 NOIR ",
        "d2": "cafe noir",
        "d3": "grade one",
        "d4": "Grade one",
    }
    (tmp_path / "texts.tsv").write_text("".join(f"{doc_id}\t{text}\n" for doc_id, text in texts.items()))
    run = kd.Run({"q": [(doc_id, 1.0) for doc_id in texts]})
    left_out = Counter()
    store = kd.TextStore.from_tsv(tmp_path / "texts.tsv")
    options = {"per_query": 9, "minimum_grade": 2, "texts": store, "left_out": left_out}
    assert triples(run, {"q": {"d0": 2, "d3": 1}}, **options) == [("q", "d0", "d2")]
    assert left_out["duplicates"] == 2


def test_what_is_left_out_is_counted_over_calls():
    left_out = Counter()
    run = kd.Run(RUN | {"all-relevant": [("d1", 1.0)], "empty": []})
    qrels = QRELS | {"all-relevant": {"d1": 1}, "empty": {"d1": 1}}
    for _ in range(2):
        kd.sample_triples(run, qrels, left_out=left_out)
    assert left_out == {
        "duplicates": 0, "suspected_false_negatives": 0, "queries_without_positive": 4, "queries_without_negative": 4
    }  # fmt: skip


def test_an_id_listed_twice_counts_once():
    run = kd.Run({"q": [("d1", 5.0), ("d1", 4.0), ("d2", 3.0), ("d3", 2.0)]})
    assert sorted(triples(run, {"q": {"d2": 1}}, per_query=9)) == [("q", "d2", "d1"), ("q", "d2", "d3")]
    assert triples(run, {"q": {"d2": 1}}, per_query=9, ranks=(3, 3)) == [("q", "d2", "d3")]


# ---- Lists ----------------------------------------------------------------------------------------------------------

POOL = kd.Run({"q": [("pos", 20.0), *[(f"n{i}", 10.0 - i) for i in range(10)]]})  # n0 is the teacher's best negative


def lists(documents: int, sampling: str = "random", per_query: int = 1, seed: int = 42) -> list[list[str]]:
    rows = kd.sample_triples(
        POOL, {"q": {"pos": 1}}, per_query, teacher=POOL, documents=documents, sampling=sampling, seed=seed
    )
    for row in rows.rows:
        assert row["teacher_scores"] == [dict(POOL["q"])[doc_id] for doc_id in row["doc_ids"]]
        assert row["doc_ids"][0] == "pos" and len(set(row["doc_ids"])) == len(row["doc_ids"])
    return [row["doc_ids"][1:] for row in rows.rows]


def test_top_takes_the_best_negatives_and_then_the_next():
    assert lists(5, "top") == [["n0", "n1", "n2", "n3"]]
    assert lists(5, "top", per_query=9) == [
        ["n0", "n1", "n2", "n3"], ["n4", "n5", "n6", "n7"], ["n8", "n9", "n2", "n3"]
    ]  # fmt: skip


def test_stratified_takes_one_of_each_group_of_equal_size():
    groups = [{"n0", "n1"}, {"n2", "n3", "n4"}, {"n5", "n6"}, {"n7", "n8", "n9"}]
    drawn = [set() for _ in groups]
    for seed in range(30):
        (negatives,) = lists(5, "stratified", seed=seed)
        for negative, seen in zip(negatives, drawn, strict=True):
            seen.add(negative)
    assert drawn == groups
    first, second, third = lists(5, "stratified", per_query=9)
    assert [set(place) for place in zip(first, second, third, strict=True)] == groups


def test_random_lists_of_a_query_share_negatives_only_in_the_last():
    first, second, third = lists(5, per_query=9)
    assert len({*first, *second}) == 8 and len({*first, *second, *third}) == 10
    counts = Counter(negative for seed in range(400) for negative in lists(2, seed=seed)[0])
    assert set(counts) == {f"n{i}" for i in range(10)} and min(counts.values()) > 20


@pytest.mark.parametrize("sampling", ["random", "top", "stratified"])
def test_lists_are_shorter_where_negatives_are_few(sampling):
    (negatives,) = lists(30, sampling, per_query=9)
    assert sorted(negatives) == [f"n{i}" for i in range(10)]


def test_rows_of_a_query_take_its_positives_in_turn():
    rows = triples(RUN, QRELS, per_query=6)
    positives = [row[1] for row in rows if row[0] == "q1"]
    assert set(positives[:3]) == {"d3", "d5", "far"} and positives[3:] == positives[:3]


def test_unjudged_queries_take_the_best_candidate_of_the_teacher():
    run = kd.Run(
        {"judged": [("a", 1.0), ("b", 0.5)], "new": [("a", 3.0), ("b", 2.0), ("c", 1.0)], "zero": [("a", 1.0)]}
    )
    teacher = kd.Run({"judged": [("a", 0.0), ("b", 9.0)], "new": [("b", 7.0), ("a", 6.9), ("c", 0.0)]})
    qrels = {"judged": {"b": 1}, "zero": {"a": 0}}
    assert triples(run, qrels, teacher=teacher, takes_unjudged=True) == [("judged", "b", "a"), ("new", "b", "c")]
    assert triples(run, qrels, teacher=teacher) == [("judged", "b", "a")]
    with pytest.raises(KeyError, match="document 'c' of query 'new'"):
        kd.sample_triples(run, qrels, teacher=teacher | {"new": teacher["new"][:2]}, takes_unjudged=True, ranks=(1, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": "best"}, "sampling must be one of random, top, stratified, got 'best'"),
        ({"sampling": "top"}, "sampling 'top' needs a teacher's scores of the candidates"),
        ({"relative_margin": 0.9}, "relative_margin needs a teacher"),
        ({"teacher_margin": 1.0}, "teacher_margin needs a teacher"),
        ({"takes_unjudged": True}, "takes_unjudged needs a teacher"),
        ({"relative_margin": 0.0}, "relative_margin must be above 0, got 0.0"),
        ({"minimum_grade": 0}, "minimum_grade must be at least 1 and documents at least 2, got 0 and 2"),
        ({"documents": 1}, "got 1 and 1"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        kd.sample_triples(RUN, QRELS, **settings)
