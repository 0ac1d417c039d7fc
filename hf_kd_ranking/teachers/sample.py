"""Sample triples for a teacher to score: a judged positive, and a candidate that is not judged relevant."""

import random
from collections.abc import Mapping
from itertools import chain, product

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
        per_query: triples per query; fewer if the query has fewer distinct ones.
        minimum_grade: lowest grade of a positive; documents of lower grades above 0 are neither positive nor negative.
        ranks: first and last rank, from 1, of the candidates that can be negatives; None allows all.
        teacher: a teacher's scores of positives and candidates (see `score_teacher`). Negatives that it scores above
            their positive's score minus `teacher_margin` may be unjudged positives and are left out.
        teacher_margin: margin in units of the teacher's scores.
        seed: seed of the sampling.

    Returns:
        Rows of two documents without scores, ids as strings, in the run's order of queries. Queries without a
        positive or without a negative give no row.

    Raises:
        ValueError: if no query gives a triple, or the ranks are invalid.
        KeyError: if the teacher did not score a document that is needed.
    """
    first, last = ranks or (1, None)
    if first < 1 or (last is not None and last < first):
        raise ValueError(f"ranks must be a first and a last rank, from 1, got {ranks}.")
    rows = []
    for query_id, ranking in run.items():
        grades = qrels.get(query_id, {})
        positives = [doc_id for doc_id, grade in grades.items() if grade >= minimum_grade]
        negatives = [doc_id for doc_id, _ in ranking[first - 1 : last] if grades.get(doc_id, 0) <= 0]
        pairs = list(product(positives, negatives))
        if teacher is not None:
            scores = dict(teacher.get(query_id, ()))
            missing = sorted(set(chain.from_iterable(pairs)) - scores.keys())
            if missing:
                raise KeyError(
                    f"The teacher did not score document {missing[0]!r} of query {query_id!r} ({len(missing)} are "
                    "missing); score a run that has the positives too."
                )
            pairs = [(pos, neg) for pos, neg in pairs if scores[neg] <= scores[pos] - teacher_margin]
        rng = random.Random(f"{seed} {query_id}")
        for pair in rng.sample(pairs, min(per_query, len(pairs))):
            rows.append({"query_id": query_id, "doc_ids": list(pair)})
    if not rows:
        raise ValueError(
            f"No triple: none of the {len(run)} queries of the run has both a document of grade >= {minimum_grade} in "
            "the qrels and another candidate that is left; do run and qrels use the same query ids?"
        )
    return TeacherRows(datasets.Dataset.from_list(rows), "the sampled triples")
