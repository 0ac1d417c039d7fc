"""Sample rows for training: a positive of each query, and candidates that are not judged relevant as its negatives."""

import logging
import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import Any

import datasets

from ..data.rankings import Run, as_run
from ..data.rows import TeacherRows
from ..data.runs import as_qrels
from ..data.texts import TextStore, normalized
from ..errors import InputError, UnknownIdError

logger = logging.getLogger(__name__)

SAMPLINGS = ("random", "top", "stratified")
RELATIVE_MARGIN = 0.95
LEFT_OUT = ("duplicates", "suspected_false_negatives", "queries_without_positive", "queries_without_negative")


@dataclass(frozen=True)
class SamplingSettings:
    """Which documents `sample_triples` takes.

    Args:
        minimum_grade: lowest grade of a positive, at least 1; documents of lower grades above 0 are neither positive
            nor negative.
        ranks: first and last rank, from 1, of the candidates that can be negatives; None allows all.
        documents: documents per row, the positive included.
        sampling: "random" draws negatives uniformly; "top" takes those that the teacher scores highest; "stratified"
            sorts them by the teacher's score, cuts them into `documents` - 1 groups of equal size, and draws one from
            each (https://arxiv.org/abs/2604.04734).
        teacher_margin: negatives that the teacher scores above their positive's score minus this margin may be
            unjudged positives and are left out; in units of the teacher's scores.
        relative_margin: the same for negatives above this share of their positive's score, both measured from the
            query's lowest-scored candidate. None is 0.95 with a teacher; 1 leaves it to `teacher_margin`.
        takes_unjudged: True takes the teacher's best candidate as the positive of a query that has no judgments.
        seed: seed of the sampling.

    Raises:
        InputError: if a value is invalid.
    """

    minimum_grade: int = 1  # lowest grade of a positive; lower grades above 0 are neither positive nor negative
    ranks: tuple[int, int] | None = None  # first and last rank, from 1, of candidates that can be negatives; None: all
    documents: int = 2  # per row, the positive included
    # "random" draws negatives uniformly; "top" takes those that the teacher scores highest; "stratified" sorts them by
    # the teacher's score, cuts them into `documents` - 1 groups of equal size, and draws one from each
    # (https://arxiv.org/abs/2604.04734).
    sampling: str = "random"
    # Negatives that the teacher scores above their positive's score minus `teacher_margin`, in units of its scores,
    # may be unjudged positives and are left out; so are those above the share `relative_margin` of their positive's
    # score, both measured from the query's lowest-scored candidate. None is 0.95 with a teacher, 1 switches it off.
    teacher_margin: float = 0.0
    relative_margin: float | None = None
    takes_unjudged: bool = False  # the teacher's best candidate is the positive of a query that has no judgments
    seed: int = 42

    def __post_init__(self) -> None:
        first, last = self.ranks or (1, 1)
        if first < 1 or last < first:
            raise InputError(f"ranks must be a first and a last rank, from 1, got {self.ranks}.")
        if self.minimum_grade < 1 or self.documents < 2:
            needed = "minimum_grade must be at least 1 and documents at least 2"
            raise InputError(f"{needed}, got {self.minimum_grade} and {self.documents}.")
        if self.sampling not in SAMPLINGS:
            raise InputError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {self.sampling!r}.")
        if self.relative_margin is not None and not self.relative_margin > 0:
            raise InputError(f"relative_margin must be above 0, got {self.relative_margin}.")

    def check_without_teacher(self) -> None:
        """Raise InputError if a setting needs the scores of a teacher."""
        needs = {
            f"sampling {self.sampling!r}": self.sampling != "random",
            "teacher_margin": self.teacher_margin != 0,
            "relative_margin": self.relative_margin is not None,
            "takes_unjudged": self.takes_unjudged,
        }
        for name, is_needed in needs.items():
            if is_needed:
                raise InputError(f"{name} needs a teacher's scores of the candidates; give them, or leave it out.")


def sample_triples(
    run: Run,
    qrels: Mapping[str, Mapping[str, int]],
    per_query: int = 1,
    teacher: Run | None = None,
    texts: TextStore | None = None,
    left_out: Counter[str] | None = None,
    **settings: Any,
) -> TeacherRows:
    """Sample rows of ids: a judged positive, then candidates that are not judged relevant.

    Args:
        run: candidates, for example BM25's; hard negatives come from here. An id that is listed twice counts once.
        qrels: query_id -> {doc_id: grade}.
        per_query: rows per query. They take the query's positives in turn, and a positive's rows share negatives only
            where its last one would otherwise be shorter; so there are fewer rows once all negatives were used.
        teacher: a teacher's scores of positives and candidates (see `score_teacher`), which filter negatives and are
            the scores of the rows.
        texts: texts of the documents, to leave out negatives that are copies of a relevant document, but for case,
            blanks and the Unicode form; None does not look for copies.
        left_out: receives the counts of documents and queries that were left out, named as in `LEFT_OUT`.
        settings: see `SamplingSettings`.

    Returns:
        Rows of up to `documents` documents, ids as strings, with the teacher's scores if there is one, in the run's
        order of queries. A query's rows depend on the seed and this query only. Queries without a positive or without
        a negative give no row.

    Raises:
        InputError: if no query gives a row, a setting is invalid, or it needs a teacher and there is none.
        UnknownIdError: if the teacher did not score a document that is needed, or a document has no text.

    Example:
        >>> rows = kd.sample_triples(kd.read_run("bm25.trec"), kd.read_qrels("qrels.txt"), per_query=2, documents=4)
        >>> len(rows[0]["doc_ids"])
        4
    """
    sampling = SamplingSettings(**settings)
    if teacher is None:
        sampling.check_without_teacher()
    run, teacher = as_run(run, drop_repeated=True), teacher and as_run(teacher, drop_repeated=True)
    qrels = as_qrels(qrels)
    counts = Counter(dict.fromkeys(LEFT_OUT, 0))
    rows = []
    for query_id, ranking in run.items():
        query = _Query(query_id, ranking, qrels.get(query_id, {}), teacher)
        pools = query.pools(sampling, texts, counts)
        rng = random.Random(f"{sampling.seed} {query_id}")
        for doc_ids in query.draw(pools, per_query, sampling, rng):
            row = {"query_id": query_id, "doc_ids": doc_ids}
            if teacher is not None:
                row["teacher_scores"] = [query.scores[doc_id] for doc_id in doc_ids]
            rows.append(row)
    summary = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    if not rows:
        raise InputError(
            f"No triple: none of the {len(run)} queries of the run has both a document of grade >= "
            f"{sampling.minimum_grade} in the qrels and another candidate that is left ({summary}); do run and qrels "
            "use the same query ids?"
        )
    logger.info("Sampled %d rows; left out: %s.", len(rows), summary)
    if left_out is not None:
        left_out.update(counts)
    return TeacherRows(datasets.Dataset.from_list(rows), "the sampled triples")


class _Query:
    """A query's candidates in the order of their ranks, its judgments, and the teacher's scores."""

    def __init__(
        self,
        query_id: str,
        ranking: Sequence[tuple[str, float]],
        grades: Mapping[str, int],
        teacher: Run | None,
    ) -> None:
        self.query_id = query_id
        self.candidates = [doc_id for doc_id, _ in ranking]
        self.grades = grades
        self.scores: dict[str, float] | None = None
        if teacher is not None:
            self.scores = dict(teacher.get(query_id, ()))

    def pools(self, sampling: SamplingSettings, texts: TextStore | None, counts: Counter[str]) -> dict[str, list[str]]:
        """Return positive -> its negatives, without positives that have none, and count what was left out."""
        positives = self._positives(sampling)
        if not positives:
            counts["queries_without_positive"] += 1
            return {}
        relevant = {doc_id for doc_id, grade in self.grades.items() if grade > 0}.union(positives)
        first, last = sampling.ranks or (1, None)
        negatives = [doc_id for doc_id in self.candidates[first - 1 : last] if doc_id not in relevant]
        if texts is not None and negatives:
            distinct = _without_copies(negatives, relevant, texts)
            counts["duplicates"] += len(negatives) - len(distinct)
            negatives = distinct
        if self.scores is not None and negatives:
            self._check_scored([*positives, *negatives])
        pools, suspected = {}, set()
        for positive in positives:
            pool = negatives
            if self.scores is not None and negatives:
                pool = self._below(positive, negatives, sampling)
                suspected.update(set(negatives).difference(pool))
            if pool:
                pools[positive] = pool
        counts["suspected_false_negatives"] += len(suspected)
        if not pools:
            counts["queries_without_negative"] += 1
        return pools

    def _positives(self, sampling: SamplingSettings) -> list[str]:
        if sampling.takes_unjudged and self.candidates and not self.grades:
            self._check_scored(self.candidates)
            return [max(self.candidates, key=self.scores.get)]
        return [doc_id for doc_id, grade in self.grades.items() if grade >= sampling.minimum_grade]

    def _check_scored(self, needed: Sequence[str]) -> None:
        missing = sorted(set(needed) - self.scores.keys())
        if missing:
            raise UnknownIdError(
                f"The teacher did not score document {missing[0]!r} of query {self.query_id!r} ({len(missing)} are "
                "missing); score a run that has the positives too."
            )

    def _below(self, positive: str, negatives: Sequence[str], sampling: SamplingSettings) -> list[str]:
        """Return the negatives that are far enough below the positive by the teacher's scores."""
        scores, relative_margin = self.scores, sampling.relative_margin
        if relative_margin is None:
            relative_margin = RELATIVE_MARGIN
        lowest = min(scores[doc_id] for doc_id in self.candidates if doc_id in scores)
        most_relative = relative_margin * (scores[positive] - lowest)
        most = scores[positive] - sampling.teacher_margin
        below = []
        for doc_id in negatives:
            if scores[doc_id] <= most and scores[doc_id] - lowest <= most_relative:
                below.append(doc_id)
        return below

    def draw(
        self, pools: Mapping[str, Sequence[str]], per_query: int, sampling: SamplingSettings, rng: random.Random
    ) -> Iterator[list[str]]:
        """Yield the documents of up to `per_query` rows, of the positives in turn."""
        by_positive = []
        for positive in rng.sample(list(pools), len(pools)):
            groups = self._group(pools[positive], per_query, sampling, rng)
            lists = []
            for i in range(min(per_query, max(map(len, groups)))):
                lists.append([positive, *(group[i % len(group)] for group in groups)])
            by_positive.append(lists)
        in_turn = chain.from_iterable(zip_longest(*by_positive))
        yield from islice(filter(None, in_turn), per_query)

    def _group(
        self, pool: Sequence[str], per_query: int, sampling: SamplingSettings, rng: random.Random
    ) -> list[Sequence[str]]:
        """Share negatives out into one group for each place of a list: the i-th list takes the i-th of every group."""
        places = min(sampling.documents - 1, len(pool))
        if sampling.sampling == "random":
            pool = rng.sample(pool, min(len(pool), places * per_query))
            return [pool[place::places] for place in range(places)]
        pool = sorted(pool, key=self.scores.get, reverse=True)
        if sampling.sampling == "top":
            return [pool[place::places] for place in range(places)]
        groups = []
        for place in range(places):
            group = pool[place * len(pool) // places : (place + 1) * len(pool) // places]
            groups.append(rng.sample(group, len(group)))
        return groups


def _without_copies(negatives: Sequence[str], relevant: Collection[str], texts: TextStore) -> list[str]:
    """Return the negatives whose text is not that of a relevant document."""
    known = set(map(normalized, texts[sorted(relevant)]))
    distinct = []
    for doc_id, text in zip(negatives, texts[negatives], strict=True):
        if normalized(text) not in known:
            distinct.append(doc_id)
    return distinct
