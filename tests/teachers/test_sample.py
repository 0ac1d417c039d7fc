"""Sampled triples: judged positives, unjudged candidates as negatives, filtered by ranks and by a teacher."""

import re

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
    assert not rows.has_scores
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
    rows = triples(SCORED, JUDGED, per_query=1000, teacher=TEACHER, teacher_margin=margin)
    pairs = {(positive, negative) for positive, names in wanted.items() for negative in names.split()}
    assert {row[1:] for row in rows} == pairs


def test_a_margin_that_no_negative_keeps_gives_no_triple():
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
