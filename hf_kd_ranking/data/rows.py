"""Teacher rows: loaded from the published files as a memory-mapped table, sampled from candidates, written.

A row is the published five columns `pos_score neg_score query_id pos_id neg_id` (tab separated, no header), or a list
`query_id, doc_ids, teacher_scores` (JSON lines, Parquet) with one length for the whole file. In memory both are an
Arrow table on disk (`datasets.Dataset`): 40 million rows cost no resident memory.
"""

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from .runs import Run
from .tables import (
    building,
    cache_folder,
    existing_file,
    is_plain_integer,
    nth_line,
    plain_integers,
    read_jsonl,
    read_tsv,
    tsv_lines,
    write_arrow,
    writing,
)

TEACHER_COLUMNS = ("pos_score", "neg_score", "query_id", "pos_id", "neg_id")
LIST_COLUMNS = ("query_id", "doc_ids", "teacher_scores")
MARGIN_COLUMNS = ("query_id", "positive_id", "negative_id", "score")
_MARGINS_ONLY = "margins only"


# ---- Loading --------------------------------------------------------------------------------------------------------


def load_teacher_scores(
    path_or_dataset: str | os.PathLike | datasets.Dataset,
    cache_dir: str | os.PathLike | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load teacher scores as a memory-mapped table of ids and scores, or as a stream of rows.

    Args:
        path_or_dataset: the published five-column TSV; a `.jsonl` file of list rows; a `.parquet` file or a
            `datasets.Dataset` with the columns of pair rows or of list rows. A data set with only margins
            (`query_id, positive_id, negative_id, score`) becomes pos_score = margin, neg_score = 0 and is marked,
            see `has_only_margins`.
        cache_dir: where the Arrow file built from a TSV or JSONL file is kept; None is the cache of `datasets`. It is
            built once for a file's path, size and modification time.
        streaming: read the rows in their order while they are used, without a table; then the name of a data set on
            the Hub is taken as well (its split `train`). Shuffle with `.shuffle(seed, buffer_size=...)`. A table is
            faster, shuffles all rows, and resumes at once.

    Returns:
        Columns `pos_score, neg_score` (float32), `query_id, pos_id, neg_id`; or `query_id, doc_ids, teacher_scores`.
        Ids are int64 where all ids of the file are plain integers (`str(int(x)) == x`), else strings; in a stream of a
        text file always strings.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: with file and line, for a wrong number of columns, a score that is no finite number, bad UTF-8,
            ragged lists, an empty file; or for a data set without the columns.
    """
    if streaming:
        return _open_stream(path_or_dataset)
    if isinstance(path_or_dataset, datasets.Dataset):
        return _check_finite(_check_columns(path_or_dataset, "the data set"), "the data set")
    path = existing_file(path_or_dataset, "teacher scores")
    if path.suffix == ".parquet":
        dataset = datasets.Dataset.from_parquet(str(path), cache_dir=cache_dir)
        return _check_finite(_check_columns(dataset, str(path)), str(path))
    folder = cache_folder(path, "scores", cache_dir)
    if not folder.is_dir():
        with building(folder) as temporary:
            write_arrow(temporary / "scores.arrow", _read(path), str(path))
    dataset = datasets.Dataset.from_file(str(folder / "scores.arrow"))
    dataset.info.description = str(path)
    return _check_columns(dataset, str(path))


def has_only_margins(dataset: datasets.Dataset) -> bool:
    """Say whether teacher rows came from a source of margins, so that single scores mean nothing."""
    return dataset.info.description.startswith(_MARGINS_ONLY)


def row_name(dataset: datasets.Dataset, row: int) -> str:
    """Name a row of teacher scores as its user knows it: file and line where it came from a file."""
    source = dataset.info.description
    is_file = os.path.isfile(source)  # any description: Path.is_file raises on a long one
    return f"{source} line {nth_line(Path(source), row)}" if is_file else f"row {row} of the teacher scores"


def arrow_batches(
    dataset: datasets.Dataset, names: Sequence[str], batch_size: int = 1_000_000
) -> Iterator[tuple[int, dict[str, pa.Array]]]:
    """Columns of a table some rows at a time, each with the first of its rows."""
    table = dataset.select_columns(list(names)).with_format("arrow")
    for start in range(0, len(dataset), batch_size):
        batch = table[start : start + batch_size]
        yield start, {name: batch[name].combine_chunks() for name in names}


def column_batches(dataset: datasets.Dataset, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Columns of teacher rows some rows at a time, (N,), or (N, n) of lists; strings as objects."""
    for _, columns in arrow_batches(dataset, names):
        yield {
            name: column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
            if pa.types.is_list(column.type)
            else column.to_numpy(zero_copy_only=False)
            for name, column in columns.items()
        }


def _open_stream(name: str | os.PathLike) -> datasets.IterableDataset:
    path = Path(name)
    if path.exists() or {".tsv", ".txt", ".jsonl", ".json", ".parquet"} & set(path.suffixes) or len(path.parts) > 2:
        existing_file(path, "teacher scores")
        if path.suffix != ".parquet":
            return datasets.IterableDataset.from_generator(_rows, gen_kwargs={"path": path})
        return datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    return datasets.load_dataset(str(name), split="train", streaming=True)


def _rows(path: Path) -> Iterator[dict]:
    for batch in _read(path, as_strings=True):
        yield from batch.to_pylist()


def _read(path: Path, as_strings: bool = False) -> Iterator[pa.RecordBatch]:
    is_lists = {".jsonl", ".json"} & set(path.suffixes)
    return _read_lists(path, as_strings) if is_lists else _read_pairs(path, as_strings)


def _check_columns(dataset: datasets.Dataset, source: str) -> datasets.Dataset:
    columns = set(dataset.column_names)
    if len(dataset) == 0:
        raise ValueError(f"{source} holds no teacher rows; at least one is needed.")
    if columns >= set(TEACHER_COLUMNS) or columns >= set(LIST_COLUMNS):
        return dataset
    if columns >= set(MARGIN_COLUMNS):
        dataset = dataset.rename_columns({"positive_id": "pos_id", "negative_id": "neg_id", "score": "pos_score"})
        dataset = dataset.add_column("neg_score", np.zeros(len(dataset), dtype=np.float32))
        dataset.info.description = f"{_MARGINS_ONLY}: {source}"
        return dataset
    raise ValueError(
        f"{source} has the columns {', '.join(dataset.column_names)}; teacher rows need {', '.join(TEACHER_COLUMNS)} "
        f"or {', '.join(LIST_COLUMNS)} (or margins: {', '.join(MARGIN_COLUMNS)})."
    )


def _check_finite(dataset: datasets.Dataset, source: str) -> datasets.Dataset:
    """Text files are checked as they are read; tables here."""
    names = [name for name in ("pos_score", "neg_score", "teacher_scores") if name in dataset.column_names]
    for start, columns in arrow_batches(dataset, names):
        for name, column in columns.items():
            values = column.flatten() if name == "teacher_scores" else column
            bad = np.flatnonzero(~np.isfinite(values.to_numpy(zero_copy_only=False).astype(np.float32)))
            if len(bad):
                row = start + bad[0] // (len(values) // len(column))
                raise ValueError(f"{source} row {row}: {name} must be finite numbers, got {values[int(bad[0])]}.")
    return dataset


def _read_pairs(path: Path, as_strings: bool) -> Iterator[pa.RecordBatch]:
    types = {"pos_score": pa.float32(), "neg_score": pa.float32()}
    types |= {name: pa.string() for name in TEACHER_COLUMNS[2:]}
    are_integers = not as_strings and all(
        plain_integers(batch[name]) is not None for batch in read_tsv(path, types) for name in TEACHER_COLUMNS[2:]
    )
    for batch in read_tsv(path, types):
        ids = {name: batch[name].cast(pa.int64()) if are_integers else batch[name] for name in TEACHER_COLUMNS[2:]}
        yield pa.RecordBatch.from_pydict({name: batch[name] for name in TEACHER_COLUMNS[:2]} | ids)


def _read_lists(path: Path, as_strings: bool) -> Iterator[pa.RecordBatch]:
    rows: list[dict] = []
    length = None
    are_integers = not as_strings and all(
        is_plain_integer(str(i)) for _, row in read_jsonl(path) for i in _ids_of(row)
    )
    convert = int if are_integers else str
    for line, row in read_jsonl(path):
        if missing := [name for name in LIST_COLUMNS if name not in row]:
            raise ValueError(f"{path} line {line}: needed {', '.join(LIST_COLUMNS)}, missing {', '.join(missing)}.")
        scores, ids = row["teacher_scores"], row["doc_ids"]
        if not isinstance(scores, list) or not isinstance(ids, list):
            raise ValueError(
                f"{path} line {line}: doc_ids and teacher_scores must be lists, got {ids!r} and {scores!r}."
            )
        length = len(ids) if length is None else length
        if not len(scores) == len(ids) == length or length < 2:
            raise ValueError(
                f"{path} line {line}: {len(ids)} doc_ids and {len(scores)} teacher_scores, where the file's lists "
                f"have {length}; all lists must have one length of at least 2. Cut or drop the odd ones first."
            )
        if not _are_finite(scores):
            raise ValueError(f"{path} line {line}: teacher_scores must be finite numbers, got {scores}.")
        rows.append(
            {"query_id": convert(row["query_id"]), "doc_ids": [convert(i) for i in ids], "teacher_scores": scores}
        )
        if len(rows) == 10_000:
            yield _list_batch(rows, are_integers)
            rows = []
    if rows:
        yield _list_batch(rows, are_integers)


def _are_finite(scores: list) -> bool:
    try:
        return bool(np.isfinite(np.asarray(scores, dtype=np.float32)).all())
    except (TypeError, ValueError):
        return False


def _list_batch(rows: list[dict], are_integers: bool) -> pa.RecordBatch:
    kind = pa.int64() if are_integers else pa.string()
    fields = [("query_id", kind), ("doc_ids", pa.list_(kind)), ("teacher_scores", pa.list_(pa.float32()))]
    return pa.RecordBatch.from_pylist(rows, schema=pa.schema(fields))


def _ids_of(row: dict) -> list:
    ids = row.get("doc_ids")
    return [row.get("query_id", ""), *(ids if isinstance(ids, list) else ())]


# ---- Sampling -------------------------------------------------------------------------------------------------------


def sample_triples(
    run: Run,
    qrels: Mapping[str, Mapping[str, int]],
    per_query: int = 1,
    minimum_grade: int = 1,
    ranks: tuple[int, int] | None = None,
    teacher: Run | None = None,
    teacher_margin: float = 0.0,
    seed: int = 42,
) -> datasets.Dataset:
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
        Columns `query_id, pos_id, neg_id` (strings), in the run's order of queries. Queries without a positive or
        without a negative give no row.

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
    return datasets.Dataset.from_dict(
        dict(zip(("query_id", "pos_id", "neg_id"), zip(*rows, strict=True), strict=True))
    )


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


# ---- Writing --------------------------------------------------------------------------------------------------------


def write_teacher_scores(rows: datasets.Dataset, path: str | os.PathLike) -> None:
    """Write teacher rows or triples, in the columns that they have: `.parquet`, `.jsonl` (lists), else TSV.

    Raises:
        ValueError: if lists are to become TSV, pairs JSON lines, or margins anything but Parquet.
    """
    path = Path(path)
    if has_only_margins(rows):
        if path.suffix != ".parquet":
            raise ValueError(f"{path}: only .parquet can say that rows hold margins and not scores.")
        rows = rows.remove_columns("neg_score").rename_columns(
            {"pos_score": "score", "pos_id": "positive_id", "neg_id": "negative_id"}
        )
    if path.suffix == ".parquet":
        with writing(path, "wb") as file:
            rows.to_parquet(file)
        return
    if path.suffix == ".jsonl":
        if "doc_ids" not in rows.column_names:
            raise ValueError(f"{path}: JSON lines hold lists; write pairs as .tsv or .parquet.")
        with writing(path) as file:
            file.writelines(json.dumps({name: row[name] for name in LIST_COLUMNS}) + "\n" for row in rows)
        return
    if "doc_ids" in rows.column_names:
        raise ValueError(f"{path}: lists do not fit into columns; write .jsonl or .parquet.")
    names = [name for name in TEACHER_COLUMNS if name in rows.column_names]
    with writing(path, "wb") as file:
        for _, columns in arrow_batches(rows, names, 1 << 17):
            file.writelines(tsv_lines([*columns.values()]))
