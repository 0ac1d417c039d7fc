"""TREC runs and qrels: the rankings of first stages and rankers, and the judgments that measures read."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ..artifacts import existing_file, writing
from ..errors import InputError
from .ids import IdIndex
from .rankings import Pairs, Run, checked_rankings, mapping_items
from .tables import BYTE_ORDER_MARK, first_line, nth_line, number, open_binary, plain_integers, read_lines

logger = logging.getLogger(__name__)

WHITE_SPACE = r"[\pZ\s\x{85}\x{1c}-\x{1f}]"  # the characters at which str.split() splits, for RE2
RUN_COLUMNS = ("query_id", "Q0", "doc_id", "rank", "score", "tag")
MS_MARCO_RUN_COLUMNS = ("query_id", "doc_id", "rank")
QRELS_COLUMNS = ("query_id", "0", "doc_id", "grade")
BEIR_COLUMNS = ("query-id", "corpus-id", "score")


def as_qrels(qrels: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Return judgments of the user with ids as strings.

    Raises:
        InputError: with query and document, for a grade that is not an integer of 32 bits, as trec_eval takes them.
    """
    checked = {}
    for query_id, grades in mapping_items(qrels, "Judgments"):
        checked[str(query_id)] = {}
        for doc_id, grade in mapping_items(grades, f"Query {query_id!r}: grades"):
            if not isinstance(grade, int | np.integer) or not -(2**31) <= grade < 2**31:
                place = f"Query {query_id!r}, document {doc_id!r}"
                raise InputError(f"{place}: a grade is an integer, got {grade!r} of type {type(grade).__name__}.")
            checked[str(query_id)][str(doc_id)] = int(grade)
    return checked


def read_run(path: str | os.PathLike, k: int | None = None) -> Run:
    """Read a TREC run file (`query_id Q0 doc_id rank score tag`), sorted by score; ties keep the order of the file.

    MS MARCO's form without scores (`query_id doc_id rank`) is read as well, with minus the rank as the score.

    `k` keeps the first k documents of every query and those that tie with the last of them as float32, which is the
    precision of trec_eval. A warning names the first rank that contradicts the scores.

    Raises:
        FileNotFoundError: if the file does not exist.
        InputError: with file and line, for a wrong number of columns, a score that is not a finite number, a document
            listed twice for a query; for an empty file; for a k below 1.

    Example:
        >>> run = kd.read_run("bm25.trec", k=10)
        >>> doc_id, score = run["100"][0]  # the best document of query 100
    """
    if k is not None and (not isinstance(k, int | np.integer) or k < 1):
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
        is_kept = (np.arange(len(queries)) <= last) | (trec_eval_scores(scores) == trec_eval_scores(scores[last]))
        queries, scores, rows = queries[is_kept], scores[is_kept], rows[is_kept]
    documents = columns.documents
    if not np.array_equal(rows, np.arange(len(documents))):
        documents = documents.take(pa.array(rows))
    return Run.from_columns(columns.queries.dictionary, queries, documents, scores)


def trec_eval_scores(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return scores in the precision in which trec_eval compares them, float32; (N,)."""
    with np.errstate(over="ignore"):
        return np.asarray(scores).astype(np.float32)


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
    if len(table) == 0:
        return None
    table = table.unify_dictionaries().combine_chunks()
    queries, documents, ranks, scores = (table[name].chunk(0) for name in types)
    columns = _Columns(queries, documents, ranks.to_numpy(), scores.to_numpy())
    is_plain = np.isfinite(columns.scores).all() and not _has_repeated(queries, documents)
    has_marks = pc.any(pc.starts_with(queries.dictionary, BYTE_ORDER_MARK)).as_py()
    for ids in (queries.dictionary, documents):
        is_plain = is_plain and not _has_space(ids).any() and pc.min(pc.binary_length(ids)).as_py() > 0
    if not is_plain or has_marks:
        return None
    return columns


def _has_space(ids: pa.Array) -> np.ndarray:
    return pc.match_substring_regex(ids, WHITE_SPACE).to_numpy(zero_copy_only=False)


def check_run_ids(ids: IdIndex | Iterable[str], what: str) -> None:
    """Refuse ids that a run cannot hold, before the work that makes the run; messages call them `what`.

    Raises:
        InputError: naming the first id that holds white space, or is empty.
    """
    ids = ids.strings if isinstance(ids, IdIndex) else pa.array(ids, pa.string())
    if ids is None:  # integers
        return
    is_bad = _has_space(ids) | pc.equal(pc.binary_length(ids), 0).to_numpy(zero_copy_only=False)
    if is_bad.any():
        _check_no_space(ids[int(is_bad.argmax())].as_py(), what=f" of the {what}")


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
    columns = RUN_COLUMNS
    if len(first_line(path).split()) == len(MS_MARCO_RUN_COLUMNS):
        columns = MS_MARCO_RUN_COLUMNS
    for line, fields in _trec_lines(path, columns):
        if columns is RUN_COLUMNS:
            query_id, _, doc_id, rank, score, _ = fields
        else:
            query_id, doc_id, rank = fields
            score = str(-number(path, line, "rank", rank, int))
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
    run: Mapping[str, Mapping[str, float] | Pairs] | Iterator[tuple[str, Pairs]],
    path: str | os.PathLike,
    tag: str = "hf_kd_ranking",
) -> int:
    """Write a TREC run file that is complete or absent, ranks from 1, and return the number of its lines.

    Args:
        run: see `as_run`; or an iterator of (query_id, ranking) such as `Index.rankings`, of which only one ranking
            is in memory at a time.
        path: of the file.
        tag: the last column, which names the system.

    Raises:
        InputError: if an id or the tag holds white space, which separates the columns; see also `as_run`.

    Example:
        >>> kd.write_run({"q1": {"d1": 0.5, "d2": 2.0}}, "run.trec")
        2
        >>> print(open("run.trec").readline(), end="")
        q1 Q0 d2 1 2.0 hf_kd_ranking
    """
    items = run if isinstance(run, Iterator) else mapping_items(run, "A run")
    count = 0
    with writing(path) as file:
        for query_id, ranking in checked_rankings(items):
            for rank, (doc_id, score) in enumerate(ranking, start=1):
                _check_no_space(query_id, doc_id, tag)
                # repr of a float is the shortest text that reads back as the same float
                file.write(f"{query_id} Q0 {doc_id} {rank} {float(score)!r} {tag}\n")
            count += len(ranking)
    return count


def read_qrels(path: str | os.PathLike) -> dict[str, dict[str, int]]:
    """Read TREC judgments (`query_id 0 doc_id grade`) as query_id -> {doc_id: grade}.

    BEIR's tab-separated form with a header (`query-id corpus-id score`) is read as well, and three columns without a
    header (`query_id doc_id grade`).

    Raises:
        FileNotFoundError: if the file does not exist.
        InputError: with file and line, for a wrong number of columns, a grade that is not an integer, two different
            grades for one pair; for an empty file.

    Example:
        >>> qrels = kd.read_qrels("qrels.txt")
        >>> kd.evaluate_run(kd.read_run("bm25.trec"), qrels, ["R@20"])
        {'R@20': 1.0}
    """
    path = existing_file(path, "qrels")
    fields = first_line(path).split()
    if fields == list(BEIR_COLUMNS):
        lines = _trec_lines(path, BEIR_COLUMNS, "\t")
        next(lines)  # the header
    elif len(fields) == 3:
        lines = _trec_lines(path, ("query_id", "doc_id", "grade"))
    else:
        lines = _trec_lines(path, QRELS_COLUMNS)
    qrels: dict[str, dict[str, int]] = {}
    for line, (query_id, *_, doc_id, text) in lines:
        if (query_id, doc_id, text) == BEIR_COLUMNS:  # the header of another file that was joined to the first
            continue
        grade = number(path, line, "grade", text, int)
        if qrels.setdefault(query_id, {}).setdefault(doc_id, grade) != grade:
            raise InputError(
                f"{path} line {line}: {query_id!r} {doc_id!r} has two grades, {grade} and an earlier one."
            )
    return qrels


def write_qrels(qrels: Mapping[str, Mapping[str, int]], path: str | os.PathLike) -> None:
    """Write TREC relevance judgments; an id that holds white space is an InputError, see also `as_qrels`."""
    qrels = as_qrels(qrels)
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
        fields = [field for field in text.split(delimiter) if field.strip()]  # an empty one is missing
        if len(fields) != len(columns):
            hint = "" if delimiter else "; ids cannot hold white space"
            problem = f"needed {len(columns)} columns ({layout}), got {len(fields)}: {text[:80]!r}{hint}"
            raise InputError(f"{path} line {line}: {problem}.")
        is_empty = False
        yield line, fields
    if is_empty:
        raise InputError(f"{path} is empty; needed lines of {layout}.")


def _check_no_space(*names: str, what: str = "") -> None:
    for name in names:
        if name.split() != [name]:
            problem = f"A TREC file is split at white space and cannot hold the id {name!r}{what}"
            raise InputError(f"{problem}; rename it first.")
