"""Triples to be scored by a teacher: a judged positive, and candidates that are not judged relevant as negatives."""

import random
from collections.abc import Mapping

import datasets

from ..data.rows import TeacherRows
from ..data.runs import Run


def sample_triples(
    run: Run,
    qrels: Mapping[str, Mapping[str, int]],
    per_query: int = 1,
    minimum_grade: int = 1,
    ranks: tuple[int, int] | None = None,
    teacher: Run | None = None,
    teacher_margin: float = 0.0,
    seed: int = 42,
) -> TeacherRows:
    """Sample (query, positive, negative) ids: a judged positive, and a candidate that is not judged relevant.

    Args:
        run: candidates, for example BM25's; hard negatives come from here.
        qrels: query_id -> {doc_id: grade}.
        per_query: triples a query; fewer where it has fewer distinct ones.
        minimum_grade: a document is a positive from this grade on; those of lower grades above 0 are neither.
        ranks: first and last rank, from 1, of the run that negatives come from; None takes all.
        teacher: a teacher's scores of positives and candidates (see `score_teacher`); with it, negatives scored above
            their positive's score minus `teacher_margin` are taken for unjudged positives and left out.
        teacher_margin: in units of the teacher's scores.
        seed: of the sampling, which depends on nothing else.

    Returns:
        Rows of two documents without scores, ids as strings, in the run's order of queries. Queries without a
        positive or without a negative give no row.

    Raises:
        ValueError: if no query gives a triple, or ranks are none.
        KeyError: if the teacher did not score a document that is needed.
    """
    first, last = ranks or (1, None)
    if first < 1 or (last is not None and last < first):
        raise ValueError(f"ranks are a first and a last rank from 1 on, got {ranks}.")
    rows: list[tuple[str, str, str]] = []
    for query_id, ranking in run.items():
        grades = qrels.get(query_id, {})
        positives = [doc_id for doc_id, grade in grades.items() if grade >= minimum_grade]
        negatives = [doc_id for doc_id, _ in ranking[first - 1 : last] if grades.get(doc_id, 0) <= 0]
        pairs = [(positive, negative) for positive in positives for negative in negatives]
        if teacher is not None and pairs:
            pairs = _without_unjudged_positives(query_id, pairs, teacher, teacher_margin)
        rng = random.Random(f"{seed} {query_id}")
        rows += [(query_id, *pair) for pair in rng.sample(pairs, min(per_query, len(pairs)))]
    if not rows:
        raise ValueError(
            f"No triple: none of the {len(run)} queries of the run has both a document of grade >= {minimum_grade} in "
            "the qrels and another candidate that is left; do run and qrels use the same query ids?"
        )
    columns = {"query_id": [row[0] for row in rows], "doc_ids": [list(row[1:]) for row in rows]}
    return TeacherRows(datasets.Dataset.from_dict(columns), "the sampled triples")


def _without_unjudged_positives(
    query_id: str, pairs: list[tuple[str, str]], teacher: Run, margin: float
) -> list[tuple[str, str]]:
    scores = dict(teacher.get(query_id, ()))
    if missing := [doc_id for pair in pairs for doc_id in pair if doc_id not in scores]:
        count = len(set(missing))
        raise KeyError(
            f"The teacher did not score document {missing[0]!r} of query {query_id!r} ({count} are missing); score a "
            "run that holds the positives too."
        )
    return [(positive, negative) for positive, negative in pairs if scores[negative] <= scores[positive] - margin]
