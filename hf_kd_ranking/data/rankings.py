"""Rankings in memory, by columns: a run of 80 million documents takes 2 GB, and 14 GB as lists of tuples."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError

Pairs = Sequence[tuple[str, float]]


class Ranking(Sequence[tuple[str, float]]):
    """The ranking of one query, a sequence of (doc_id, score), best first; it equals a list of the same pairs.

    It cannot be changed; `list(ranking)` can. A slice is a view.

    Args:
        doc_ids: strings, or an Arrow array of them, which rankings may share.
        scores: as many numbers.
        places: places of the documents of this ranking in both; None for all.
    """

    __slots__ = ("_doc_ids", "_places", "_scores")

    def __init__(
        self, doc_ids: Sequence[str] | pa.Array, scores: Sequence[float] | np.ndarray, places: range | None = None
    ) -> None:
        if not isinstance(doc_ids, pa.Array):
            doc_ids = pa.array(doc_ids, pa.string())
        if len(doc_ids) != len(scores):
            raise InputError(f"A ranking has one score per document, got {len(doc_ids):,} and {len(scores):,}.")
        self._doc_ids = doc_ids
        self._scores = np.asarray(scores)
        self._places = range(len(doc_ids)) if places is None else places

    @property
    def doc_ids(self) -> list[str]:
        """The ids of the documents."""
        return self._column().to_pylist()

    @property
    def scores(self) -> np.ndarray:
        """The scores of the documents, (N,)."""
        return self._scores[self._places.start : self._places.stop]

    @property
    def is_valid(self) -> bool:
        """Whether all scores are finite and no document is listed twice."""
        return bool(np.isfinite(self.scores).all()) and pc.count_distinct(self._column()).as_py() == len(self)

    def _column(self) -> pa.Array:
        return self._doc_ids.slice(self._places.start, len(self._places))

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return zip(self.doc_ids, self.scores.tolist(), strict=True)

    def __getitem__(self, place: int | slice) -> Any:
        if not isinstance(place, slice):
            row = self._places[place]
            return self._doc_ids[row].as_py(), self._scores[row].item()
        if place.step in (None, 1):
            return Ranking(self._doc_ids, self._scores, self._places[place])
        return list(self)[place]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ranking | list):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None

    def __repr__(self) -> str:
        return repr(list(self))


class Run(dict[str, Pairs]):
    """A ranking per query: query_id -> (doc_id, score) pairs, best first; a list, or a `Ranking` of less memory.

    Example:
        >>> run = kd.Run({"q1": [("d2", 3.5), ("d1", 1.0)]})
        >>> run.top(1)
        {'q1': [('d2', 3.5)]}
    """

    def top(self, k: int) -> "Run":
        """Return the first k documents of every query."""
        return Run({query_id: ranking[:k] for query_id, ranking in self.items()})

    def select(self, query_ids: Iterable[str]) -> "Run":
        """Return the rankings of some queries, in the order given; those that the run lacks are left out."""
        return Run((query_id, self[query_id]) for query_id in query_ids if query_id in self)

    def without_same_ids(self) -> "Run":
        """Return the run without the document that has the id of its query, see `without_id`."""
        return Run((query_id, without_id(ranking, query_id)) for query_id, ranking in self.items())

    @classmethod
    def from_scores(
        cls, query_ids: Sequence[str], doc_ids: Sequence[str], scores: Sequence[float] | np.ndarray
    ) -> "Run":
        """Group scored pairs by query and sort by descending score; ties keep the order given.

        Raises:
            InputError: if the lists differ in length, or a score is not finite.
        """
        if not len(query_ids) == len(doc_ids) == len(scores):
            counts = f"{len(query_ids):,}, {len(doc_ids):,} and {len(scores):,}"
            raise InputError(f"A run needs as many query ids as doc ids and scores, got {counts}.")
        scores = np.asarray(scores)
        is_finite = np.fromiter(map(_is_finite, scores.tolist()), bool, len(scores))
        if not is_finite.all():
            place = int(is_finite.argmin())
            raise InputError(
                f"Query {query_ids[place]!r}, document {doc_ids[place]!r}: the score is not a finite number: "
                f"{scores[place]}."
            )
        if len(scores) == 0:
            return cls()
        queries = pa.array(map(str, query_ids), pa.string()).dictionary_encode()
        documents = pa.array(map(str, doc_ids), pa.string())
        numbers = queries.indices.to_numpy()
        order = np.lexsort((-scores.astype(np.float64), numbers))  # stable
        return cls.from_columns(queries.dictionary, numbers[order], documents.take(pa.array(order)), scores[order])

    @classmethod
    def from_columns(cls, query_ids: pa.Array, queries: np.ndarray, doc_ids: pa.Array, scores: np.ndarray) -> "Run":
        """Return the run of columns in the order of queries, and of ranks for each.

        Args:
            query_ids: strings.
            queries: (N,) ascending places in them.
            doc_ids: N strings.
            scores: (N,).
        """
        starts = np.flatnonzero(np.diff(queries, prepend=-1))
        names = query_ids.take(pa.array(queries[starts])).to_pylist()
        run = cls()
        for query_id, (start, stop) in zip(names, pairwise([*starts.tolist(), len(scores)]), strict=True):
            run[query_id] = Ranking(doc_ids, scores, range(start, stop))
        return run


def without_id(ranking: Pairs, query_id: str) -> Pairs:
    """Return a ranking without the document that has the id of its query.

    In some collections (ArguAna, Quora) each query is a document as well, which every ranker finds first.
    """
    kept = [scored for scored in ranking if scored[0] != query_id]
    if len(kept) == len(ranking):
        return ranking
    return Ranking([doc_id for doc_id, _ in kept], [score for _, score in kept])


def as_run(run: Mapping[str, Mapping[str, float] | Pairs], drop_repeated: bool = False) -> Run:
    """Return a run of the user as a `Run`, with ids as strings.

    A ranking may also be a dictionary, doc_id -> score, as of pytrec_eval and BEIR, which is sorted by score.

    Raises:
        InputError: with the query, if a ranking is of another form, a score is not a finite number, or a document is
            listed twice, unless `drop_repeated` keeps the first one only.
    """
    return Run(checked_rankings(mapping_items(run, "A run"), drop_repeated))


def checked_rankings(
    items: Iterable[tuple[str, Mapping[str, float] | Pairs]], drop_repeated: bool = False
) -> Iterator[tuple[str, Pairs]]:
    """Yield the query ids and rankings of a run as `as_run` returns them."""
    for query_id, ranking in items:
        if isinstance(ranking, Ranking) and ranking.is_valid:
            yield str(query_id), ranking
        else:
            yield str(query_id), _checked_pairs(query_id, ranking, drop_repeated)


def _checked_pairs(query_id: str, ranking: Mapping[str, float] | Pairs, drop_repeated: bool) -> Pairs:
    is_mapping = isinstance(ranking, Mapping)
    pairs = list(ranking.items()) if is_mapping else ranking
    if not _are_pairs(pairs):
        shown = f"{type(ranking).__name__} {str(ranking)[:60]}"
        raise InputError(f"Query {query_id!r}: a ranking is {{doc_id: score}} or [(doc_id, score)], got {shown}.")
    scores = np.array([score for _, score in pairs])
    if len(pairs) and (scores.dtype.kind not in "fiu" or not np.isfinite(scores).all()):
        doc_id, score = next(filter(lambda pair: not _is_finite(pair[1]), pairs))
        raise InputError(f"Query {query_id!r}, document {doc_id!r}: the score is not a finite number: {score!r}.")
    if not all(isinstance(doc_id, str) for doc_id, _ in pairs):
        pairs = [(str(doc_id), score) for doc_id, score in pairs]
    if len(dict(pairs)) < len(pairs):
        counts = Counter(doc_id for doc_id, _ in pairs)
        if not drop_repeated:
            repeated = counts.most_common(1)[0][0]
            raise InputError(f"Query {query_id!r}: document {repeated!r} appears twice in the ranking.")
        first = dict(reversed(pairs))  # doc_id -> its first score
        pairs = [(doc_id, first[doc_id]) for doc_id in counts]
    if is_mapping:
        pairs = sorted(pairs, key=lambda scored: -scored[1])
    return pairs


def mapping_items(values: Any, what: str) -> Iterable[tuple[Any, Any]]:
    """Return the items of a dictionary; an InputError calls anything else `what`."""
    if not isinstance(values, Mapping):
        raise InputError(f"{what} must be a dictionary, got {type(values).__name__} {str(values)[:60]}.")
    return values.items()


def _are_pairs(ranking: Any) -> bool:
    is_list = isinstance(ranking, Sequence) and not isinstance(ranking, str)
    return is_list and all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in ranking)


def _is_finite(score: Any) -> bool:
    return isinstance(score, int | float | np.number) and not isinstance(score, bool) and bool(np.isfinite(score))
