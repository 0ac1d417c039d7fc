"""TREC runs and qrels: the rankings of first stages and rankers, and the judgments that measures read."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ..artifacts import existing_file, writing
from ..errors import InputError
from .tables import nth_line, number, open_binary, plain_integers, read_lines

logger = logging.getLogger(__name__)

WHITE_SPACE = r"[\pZ\s\x{85}\x{1c}-\x{1f}]"  # the characters at which str.split() splits, for RE2
RUN_COLUMNS = ("query_id", "Q0", "doc_id", "rank", "score", "tag")


class Run(dict[str, list[tuple[str, float]]]):
    """A ranking per query: query_id -> [(doc_id, score)], best first."""

    def top(self, k: int) -> "Run":
        """Return the first k documents of every query."""
        return Run({query_id: ranking[:k] for query_id, ranking in self.items()})

    @classmethod
    def from_scores(cls, query_ids: Sequence[str], doc_ids: Sequence[str], scores: Sequence[float]) -> "Run":
        """Group scored pairs by query and sort by descending score; ties keep the order given."""
        run = cls()
        for query_id, doc_id, score in zip(query_ids, doc_ids, scores, strict=True):
            run.setdefault(str(query_id), []).append((str(doc_id), float(score)))
        for ranking in run.values():
            ranking.sort(key=lambda scored: -scored[1])
        return run


def read_run(path: str | os.PathLike, k: int | None = None) -> Run:
    """Read a TREC run file (`query_id Q0 doc_id rank score tag`), sorted by score; ties keep the order of the file.

    `k` keeps the first k documents of every query and those that tie with the last of them. A warning names the first
    rank that contradicts the scores.

    Raises:
        FileNotFoundError: if the file does not exist.
        InputError: with file and line, for a wrong number of columns, a score that is not a finite number, a document
            listed twice for a query; for an empty file; for a k below 1.
    """
    if k is not None and k < 1:
        raise InputError(f"k is the number of documents to keep of every query, at least 1; got {k}.")
    path = existing_file(path, "run")
    columns = _read_at_once(path) or _read_by_line(path)
    queries, scores = columns.queries.indices.to_numpy(), columns.scores
    step = np.diff(queries)
    rows = np.arange(len(scores))
    if not ((step > 0) | ((step == 0) & (np.diff(scores) <= 0))).all():
        rows = np.lexsort((-scores, queries))  # stable
        queries, scores = queries[rows], scores[rows]
    _warn_of_ranks(path, queries, columns.ranks[rows], scores, rows)
    starts = np.flatnonzero(np.diff(queries, prepend=-1))
    if k is not None:
        lengths = np.diff(starts, append=len(queries))
        last = np.repeat(starts + np.minimum(k, lengths) - 1, lengths)  # row k of each row's query
        is_kept = (np.arange(len(queries)) <= last) | (scores == scores[last])
        queries, scores, rows = queries[is_kept], scores[is_kept], rows[is_kept]
        starts = np.flatnonzero(np.diff(queries, prepend=-1))
    query_ids = columns.queries.dictionary.take(pa.array(queries[starts])).to_pylist()
    documents = columns.documents.take(pa.array(rows))
    bounds = [*starts.tolist(), len(scores)]
    del columns, queries, rows  # Python's strings and numbers take ten times their memory
    doc_ids, scores = documents.to_pylist(), scores.tolist()
    del documents
    run = Run()
    for query_id, (start, stop) in zip(query_ids, pairwise(bounds), strict=True):
        run[query_id] = list(zip(doc_ids[start:stop], scores[start:stop], strict=True))
    return run


class _Columns(NamedTuple):
    """The columns of a run file, one row per line."""

    queries: pa.DictionaryArray
    documents: pa.Array
    ranks: np.ndarray
    scores: np.ndarray


def _read_at_once(path: Path) -> _Columns | None:
    """Return the columns of a file with one space or tab between them; None if its lines must be read one by one."""
    with open_binary(path) as file:
        delimiter = "\t" if b"\t" in file.readline() else " "
    types = {"query_id": pa.dictionary(pa.int32(), pa.string()), "doc_id": pa.large_string()}
    types |= {"rank": pa.int64(), "score": pa.float64()}
    try:
        table = pa.csv.read_csv(
            pa.input_stream(str(path), compression="detect"),
            pa.csv.ReadOptions(column_names=RUN_COLUMNS, block_size=1 << 22),
            pa.csv.ParseOptions(delimiter=delimiter, quote_char=False),
            pa.csv.ConvertOptions(column_types=types, include_columns=list(types), null_values=[]),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return None
    table = table.unify_dictionaries().combine_chunks()
    queries, documents, ranks, scores = (table[name].chunk(0) for name in types)
    columns = _Columns(queries, documents, ranks.to_numpy(), scores.to_numpy())
    is_plain = np.isfinite(columns.scores).all() and not _has_repeated(queries, documents)
    if not is_plain or _has_space(queries.dictionary) or _has_space(documents):
        return None
    return columns


def _has_space(ids: pa.Array) -> bool:
    return pc.any(pc.match_substring_regex(ids, WHITE_SPACE)).as_py()


def _has_repeated(queries: pa.DictionaryArray, documents: pa.Array) -> bool:
    numbers = plain_integers(documents)
    if numbers is None or numbers.min() < 0 or numbers.max() >= 2**31:
        numbers = documents.dictionary_encode().indices.to_numpy()  # slower
    pairs = queries.indices.to_numpy().astype(np.int64) << 31 | numbers
    pairs.sort()
    return bool((pairs[1:] == pairs[:-1]).any())


def _read_by_line(path: Path) -> _Columns:
    """Return the columns of a file with any white space between them, or raise an error that names a line."""
    queries, documents, ranks, scores = [], [], [], []
    seen: set[tuple[str, str]] = set()
    for line, (query_id, _, doc_id, rank, score, _) in _trec_lines(path, RUN_COLUMNS):
        if (query_id, doc_id) in seen:
            raise InputError(f"{path} line {line}: document {doc_id!r} appears twice in the ranking of {query_id!r}.")
        seen.add((query_id, doc_id))
        queries.append(query_id)
        documents.append(doc_id)
        ranks.append(int(rank) if rank.isdecimal() else 0)
        scores.append(number(path, line, "score", score, float))
    return _Columns(pa.array(queries).dictionary_encode(), pa.array(documents), np.array(ranks), np.array(scores))


def _warn_of_ranks(path: Path, queries: np.ndarray, ranks: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> None:
    """Warn of ranks that contradict the scores; all arrays are in the order of the scores, `rows` are their lines."""
    wrong = np.flatnonzero((np.diff(queries) == 0) & (np.diff(ranks) < 0) & (np.diff(scores) < 0)) + 1
    if len(wrong):
        problem = f"rank {ranks[wrong[0]]} contradicts the scores ({len(wrong)} such places), which give the order."
        logger.warning("%s line %d: %s", path, nth_line(path, int(rows[wrong[0]])), problem)


def write_run(
    run: Mapping[str, Sequence[tuple[str, float]]], path: str | os.PathLike, tag: str = "hf_kd_ranking"
) -> None:
    """Write a TREC run file that is complete or absent, ranks from 1; `tag`, the last column, names the system.

    Raises:
        InputError: if an id or the tag holds white space, which separates the columns.
    """
    with writing(path) as file:
        for query_id, ranking in run.items():
            for rank, (doc_id, score) in enumerate(ranking, start=1):
                _check_no_space(query_id, doc_id, tag)
                # repr of a float is the shortest text that reads back as the same float
                file.write(f"{query_id} Q0 {doc_id} {rank} {float(score)!r} {tag}\n")


def read_qrels(path: str | os.PathLike) -> dict[str, dict[str, int]]:
    """Read TREC judgments (`query_id 0 doc_id grade`) as query_id -> {doc_id: grade}.

    BEIR's tab-separated form with a header (`query-id corpus-id score`) is read as well.

    Raises:
        FileNotFoundError: if the file does not exist.
        InputError: with file and line, for a wrong number of columns, a grade that is not an integer, two different
            grades for one pair; for an empty file.
    """
    path = existing_file(path, "qrels")
    with open_binary(path) as file:
        is_beir = file.readline().split() == [b"query-id", b"corpus-id", b"score"]
    lines = _trec_lines(path, ("query_id", "0", "doc_id", "grade"))
    if is_beir:
        lines = _trec_lines(path, ("query-id", "corpus-id", "score"), "\t")
        next(lines)  # the header
    qrels: dict[str, dict[str, int]] = {}
    for line, (query_id, *_, doc_id, text) in lines:
        grade = number(path, line, "grade", text, int)
        if qrels.setdefault(query_id, {}).setdefault(doc_id, grade) != grade:
            raise InputError(
                f"{path} line {line}: {query_id!r} {doc_id!r} has two grades, {grade} and an earlier one."
            )
    return qrels


def write_qrels(qrels: Mapping[str, Mapping[str, int]], path: str | os.PathLike) -> None:
    """Write TREC relevance judgments; an id that holds white space is an InputError."""
    with writing(path) as file:
        for query_id, grades in qrels.items():
            for doc_id, grade in grades.items():
                _check_no_space(query_id, doc_id)
                file.write(f"{query_id} 0 {doc_id} {grade}\n")


def _trec_lines(path: Path, columns: Sequence[str], delimiter: str | None = None) -> Iterator[tuple[int, list[str]]]:
    """Yield line numbers and fields, separated by a delimiter; None separates them at white space."""
    is_empty, layout = True, " ".join(columns)
    for line, text in read_lines(path):
        if not text.strip():
            continue
        fields = text.split(delimiter)
        if len(fields) != len(columns):
            hint = "" if delimiter else "; ids cannot hold white space"
            problem = f"needed {len(columns)} columns ({layout}), got {len(fields)}: {text[:80]!r}{hint}"
            raise InputError(f"{path} line {line}: {problem}.")
        is_empty = False
        yield line, fields
    if is_empty:
        raise InputError(f"{path} is empty; needed lines of {layout}.")


def _check_no_space(*names: str) -> None:
    for name in names:
        if name.split() != [name]:
            raise InputError(f"A TREC file is split at white space and cannot hold the id {name!r}; rename it first.")
