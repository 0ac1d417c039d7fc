"""Teacher rows: a query, its documents with the positive first, and the teacher's score of each.

Rows are read from four layouts and have one form in memory, a table of lists on disk (`datasets.Dataset`), so that 40
million rows cost no resident memory:

| layout | columns | files |
| --- | --- | --- |
| pairs, as published | `pos_score neg_score query_id pos_id neg_id` | TSV without header, Parquet |
| triples without scores | `query_id pos_id neg_id` | TSV without header, Parquet |
| margins, as on the Hub | `query_id positive_id negative_id score` | Parquet |
| lists | `query_id doc_ids teacher_scores` | JSON lines, Parquet |
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from ..artifacts import building, existing_file, writing
from ..errors import InputError
from .caches import cache_folder
from .tables import (
    first_line,
    is_plain_integer,
    json_id,
    nth_line,
    plain_integers,
    read_jsonl,
    read_tsv,
    tsv_lines,
    write_arrow,
)

PAIR_COLUMNS = ("pos_score", "neg_score", "query_id", "pos_id", "neg_id")
TRIPLE_COLUMNS = PAIR_COLUMNS[2:]
MARGIN_COLUMNS = ("query_id", "positive_id", "negative_id", "score")
LIST_COLUMNS = ("query_id", "doc_ids", "teacher_scores")
LAYOUTS = (LIST_COLUMNS, PAIR_COLUMNS, MARGIN_COLUMNS, TRIPLE_COLUMNS, LIST_COLUMNS[:2])
LIST_RULE = "needed one score per document, and at least two documents."
ROWS_AT_ONCE = 1 << 19


@dataclass(frozen=True)
class TeacherRows:
    """Rows of `query_id`, `doc_ids` (the positive first) and `teacher_scores`, one score per document.

    Lists may differ in length. Ids are int64 where all ids of the source are plain integers (`str(int(x)) == x`), else
    strings. Rows of triples have no `teacher_scores`. With `has_only_margins` the source has differences of scores:
    they are the positives' scores, and the negatives have the score 0.
    """

    rows: datasets.Dataset
    source: str = "the teacher rows"  # file or data set that the rows came from, for messages
    has_only_margins: bool = False

    def __post_init__(self) -> None:
        names = self.rows.column_names
        if not {"query_id", "doc_ids"} <= set(names):
            raise InputError(
                f"TeacherRows needs the columns {', '.join(LIST_COLUMNS)}, got {', '.join(names)}; "
                "load_teacher_scores(dataset) reads pairs, triples and margins."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        return self.rows[row]

    @property
    def has_scores(self) -> bool:
        """True if the rows have teacher scores."""
        return "teacher_scores" in self.rows.column_names

    def check_scores(self) -> None:
        """Raise InputError if the rows have no teacher scores."""
        if not self.has_scores:
            raise InputError(f"{self.source} has no teacher scores; `teacher score` adds them.")

    def row_name(self, row: int) -> str:
        """Return the name of a row as its user knows it: file and line if it came from a text file."""
        if os.path.isfile(self.source) and not self.source.endswith(".parquet"):
            return f"{self.source} line {nth_line(Path(self.source), row)}"
        return f"{self.source} row {row}"

    def batches(self, names: Sequence[str] | None = None, size: int = ROWS_AT_ONCE) -> Iterator[tuple[int, dict]]:
        """Yield the first row's number and column name -> Arrow array, `size` rows at a time; no names are all."""
        names = list(names or self.rows.column_names)
        table = self.rows.select_columns(names).with_format("arrow")
        for start in range(0, len(table), size):
            batch = table[start : start + size]
            yield start, {name: batch[name].combine_chunks() for name in names}

    def select(self, rows: Sequence[int]) -> "TeacherRows":
        """Return some of the rows; messages name them by their places in the selection, not by lines of a file."""
        return replace(self, rows=self.rows.select(rows), source=f"the selection from {self.source}")


def load_teacher_scores(
    path_or_dataset: "str | os.PathLike | datasets.Dataset | TeacherRows", cache_dir: str | os.PathLike | None = None
) -> TeacherRows:
    """Load teacher rows of any layout, see the module, as a memory-mapped table of lists.

    Args:
        path_or_dataset: a `.tsv` or `.jsonl` file (plain or compressed), a `.parquet` file, or a `datasets.Dataset`.
        cache_dir: folder of the table that is built from a file, once per path, size and modification time; None is
            the cache of `datasets`.

    Raises:
        FileNotFoundError: if the file does not exist.
        InputError: with file and line or row, for missing columns, a wrong number of columns, a score that is not a
            finite number, bad UTF-8, lists of fewer than two documents or of unequal length; for no rows.

    Example:
        >>> rows = kd.load_teacher_scores("scores.tsv")  # pos_score neg_score query_id pos_id neg_id
        >>> sorted(rows[0])
        ['doc_ids', 'query_id', 'teacher_scores']
    """
    if isinstance(path_or_dataset, TeacherRows):
        return path_or_dataset
    if isinstance(path_or_dataset, datasets.Dataset):
        return _from_dataset(path_or_dataset, "the data set")
    path = existing_file(path_or_dataset, "teacher scores")
    folder = cache_folder(path, "rows", cache_dir)
    if not folder.is_dir():
        batches = _read_parquet_rows(path) if path.suffix == ".parquet" else _read_text(path)
        with building(folder) as temporary:
            write_arrow(temporary / "rows.arrow", batches, str(path))
    table = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    return TeacherRows(table, str(path), holds_margins(path))


# ---- Data sets and Parquet ------------------------------------------------------------------------------------------


def holds_margins(path: Path, layouts: Sequence[tuple[str, ...]] = LAYOUTS) -> bool:
    """Return whether a file is one of the Hub's margins."""
    if path.suffix != ".parquet":
        return False
    with _naming_damage(path):
        names = pa.parquet.read_schema(path).names
    return find_layout(names, str(path), layouts) == MARGIN_COLUMNS


def find_layout(names: Sequence[str], source: str, layouts: Sequence[tuple[str, ...]] = LAYOUTS) -> tuple[str, ...]:
    """Return the first layout whose columns a table has; none is an InputError."""
    for layout in layouts:
        if set(layout) <= set(names):
            return layout
    known = "; ".join(map(", ".join, layouts))
    raise InputError(f"{source} has the columns {', '.join(names)}; needed {known}.")


def _from_dataset(dataset: datasets.Dataset, source: str) -> TeacherRows:
    layout = find_layout(dataset.column_names, source)
    if len(dataset) == 0:
        raise InputError(f"{source} holds no teacher rows; at least one is needed.")
    table = dataset.select_columns(list(layout)).with_format("arrow")
    start = 0
    for batch in table.iter(ROWS_AT_ONCE):
        _check_table(batch, start, source)
        start += len(batch)
    if "doc_ids" not in layout:
        table = table.map(_as_lists, batched=True, batch_size=ROWS_AT_ONCE, remove_columns=table.column_names)
    return TeacherRows(table.with_format(None), source, layout == MARGIN_COLUMNS)


def read_parquet(path: Path, layouts: Sequence[tuple[str, ...]] = LAYOUTS) -> Iterator[pa.Table]:
    """Yield the columns of the layout that a Parquet file has, in which nothing is missing and scores are finite."""
    start = 0
    with _naming_damage(path):
        file = pa.parquet.ParquetFile(path)
        layout = find_layout(file.schema_arrow.names, str(path), layouts)
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=list(layout)):
            table = pa.Table.from_batches([batch]).select(list(layout))
            _check_table(table, start, str(path))
            start += len(batch)
            yield table


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a Parquet file, or is damaged: {str(error).splitlines()[0]}") from None


def _read_parquet_rows(path: Path) -> Iterator[pa.RecordBatch]:
    with _naming_damage(path):  # also ids that are not text
        for table in read_parquet(path):
            if "doc_ids" not in table.column_names:
                table = _as_lists(table)
            yield from table.combine_chunks().to_batches()


def _check_table(table: pa.Table, start: int, source: str) -> None:
    """Refuse scores that are not finite, missing values, and lists that do not belong together."""
    for name in table.column_names:
        _check_column(name, table[name].combine_chunks(), start, source)
    if "doc_ids" in table.column_names:
        lengths = scores = pc.list_value_length(table["doc_ids"]).to_numpy()
        if "teacher_scores" in table.column_names:
            scores = pc.list_value_length(table["teacher_scores"]).to_numpy()
        bad = np.flatnonzero((lengths != scores) | (lengths < 2))
        if len(bad):
            counts = f"{lengths[bad[0]]} doc_ids and {scores[bad[0]]} teacher_scores"
            raise InputError(f"{source} row {start + bad[0]}: {counts}; {LIST_RULE}")


def _check_column(name: str, column: pa.Array, start: int, source: str) -> None:
    values, rows = column, np.arange(len(column))  # rows: the row of each value
    if pa.types.is_nested(column.type) and not column.null_count:
        values, rows = column.flatten(), pc.list_parent_indices(column)
    elif name in LIST_COLUMNS[1:] and not pa.types.is_nested(column.type):
        raise InputError(f"{source} row {start}: {name} must be a list, got {column.type}.")
    if values.null_count:
        row = rows[values.is_null().index(True).as_py()]
        raise InputError(f"{source} row {start + int(row)}: {name} has a missing value.")
    if "score" not in name:
        return
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        raise InputError(f"{source}: the column {name} must hold numbers, got {values.type}.")
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(values.to_numpy(zero_copy_only=False).astype(np.float32)))
    if len(bad):
        place = int(bad[0])
        raise InputError(
            f"{source} row {start + int(rows[place])}: {name} must be finite numbers, got {values[place]}."
        )


def _as_lists(table: pa.Table) -> pa.Table:
    """Turn pairs, triples or margins into lists of two."""
    columns = {"query_id": table["query_id"]}
    if "positive_id" in table.column_names:
        columns["doc_ids"] = _interleaved(table["positive_id"], table["negative_id"])
        zeros = pa.chunked_array([np.zeros(len(table), dtype=np.float32)])
        columns["teacher_scores"] = _interleaved(table["score"].cast(pa.float32()), zeros)
        return pa.table(columns)
    columns["doc_ids"] = _interleaved(table["pos_id"], table["neg_id"])
    if "pos_score" in table.column_names:
        scores = [table[name].cast(pa.float32()) for name in PAIR_COLUMNS[:2]]
        columns["teacher_scores"] = _interleaved(*scores)
    return pa.table(columns)


def _interleaved(first: pa.ChunkedArray, second: pa.ChunkedArray) -> pa.ListArray:
    """Return lists [first[i], second[i]]."""
    count = len(first)
    if first.type != second.type:  # an integer would lose the zeros of "007"
        first, second = first.cast(pa.string()), second.cast(pa.string())
    order = np.arange(2 * count).reshape(2, count).T.ravel()  # 0, N, 1, N + 1, ...
    both = pa.chunked_array([*first.chunks, *second.chunks])
    values = both.combine_chunks().take(pa.array(order))
    return pa.ListArray.from_arrays(pa.array(np.arange(0, 2 * count + 1, 2, dtype=np.int32)), values)


# ---- Text files -----------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> Iterator[pa.RecordBatch]:
    if {".jsonl", ".json"} & set(path.suffixes):
        yield from _read_lists(path)
        return
    types = dict.fromkeys(TRIPLE_COLUMNS, pa.string())
    if first_line(path).count("\t") + 1 != len(TRIPLE_COLUMNS):
        types = dict.fromkeys(PAIR_COLUMNS[:2], pa.float32()) | types
    are_integers = True
    for batch in read_tsv(path, types):
        if any(plain_integers(batch[name]) is None for name in TRIPLE_COLUMNS):
            are_integers = False
            break
    final_types = dict(types)
    if are_integers:
        final_types |= dict.fromkeys(TRIPLE_COLUMNS, pa.int64())
    for batch in read_tsv(path, types):
        yield from _as_lists(pa.Table.from_batches([batch]).cast(pa.schema(final_types))).to_batches()


def _read_lists(path: Path) -> Iterator[pa.RecordBatch]:
    are_integers = True
    for line, row in read_jsonl(path):
        ids = _check_list(path, line, row)
        if not all(map(is_plain_integer, ids)):
            are_integers = False
    kind, convert = (pa.int64(), int) if are_integers else (pa.string(), str)
    types = {"query_id": kind, "doc_ids": pa.list_(kind), "teacher_scores": pa.list_(pa.float32())}
    rows: list[dict] = []
    for _, row in read_jsonl(path):
        rows.append({**row, "query_id": convert(row["query_id"]), "doc_ids": [convert(i) for i in row["doc_ids"]]})
        if len(rows) == 10_000:
            yield pa.RecordBatch.from_pylist(rows, schema=pa.schema(types))
            rows = []
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema=pa.schema(types))


def _check_list(path: Path, line: int, row: dict) -> list[str]:
    """Refuse a row that is not one of lists; return its ids."""
    missing = [name for name in LIST_COLUMNS if name not in row]
    if missing:
        raise InputError(f"{path} line {line}: needed {', '.join(LIST_COLUMNS)}, missing {', '.join(missing)}.")
    ids, scores = row["doc_ids"], row["teacher_scores"]
    if not isinstance(scores, list) or not isinstance(ids, list):
        raise InputError(f"{path} line {line}: doc_ids and teacher_scores must be lists, got {ids!r} and {scores!r}.")
    if len(scores) != len(ids) or len(ids) < 2:
        raise InputError(f"{path} line {line}: {len(ids)} doc_ids and {len(scores)} teacher_scores; {LIST_RULE}")
    are_finite = all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores)
    try:
        are_finite = are_finite and bool(np.isfinite(np.asarray(scores, dtype=np.float32)).all())
    except OverflowError:  # of an integer
        are_finite = False
    if not are_finite:
        raise InputError(f"{path} line {line}: teacher_scores must be finite numbers, got {scores}.")
    names = ["query_id"] + ["doc_ids"] * len(ids)
    return [json_id(path, line, name, i) for name, i in zip(names, [row["query_id"], *ids], strict=True)]


# ---- Writing --------------------------------------------------------------------------------------------------------


def write_teacher_scores(rows: TeacherRows, path: str | os.PathLike) -> None:
    """Write teacher rows: `.jsonl` and `.parquet` take every row, `.tsv` rows of two documents.

    Rows of two documents are written in the layout of pairs, byte for byte as they are published, margins and triples
    in theirs; Parquet has lists where a row has more than two documents.

    Raises:
        InputError: for longer lists in TSV, margins anywhere but in Parquet, triples in JSON lines.
    """
    path = Path(path)
    if rows.has_only_margins and path.suffix != ".parquet":
        raise InputError(f"{path}: only .parquet can say that rows hold margins and not scores.")
    are_pairs = _are_pairs(rows)
    check_format(path, rows.has_scores, are_pairs)
    if path.suffix == ".jsonl":
        with writing(path) as file:
            for row in rows.rows:
                file.write(json.dumps({name: row[name] for name in LIST_COLUMNS}) + "\n")
        return
    if path.suffix == ".parquet":
        with writing(path, "wb") as file:
            _write_parquet(rows, file, are_pairs)
        return
    with writing(path, "wb") as file:
        for _, columns in rows.batches(size=1 << 17):
            file.writelines(tsv_lines([*as_pairs(columns).values()]))


def check_format(path: Path, has_scores: bool, are_pairs: bool) -> None:
    """Refuse, by an InputError, a file whose format, by its suffix, cannot hold rows with or without scores."""
    if path.suffix == ".jsonl" and not has_scores:
        raise InputError(f"{path}: rows without scores are written as .tsv or .parquet.")
    if path.suffix not in (".jsonl", ".parquet") and not are_pairs:
        raise InputError(f"{path}: rows of more than two documents do not fit into columns; write .jsonl or .parquet.")


def as_pairs(columns: dict[str, pa.Array]) -> dict[str, pa.Array]:
    """Return the columns of pairs (scores first, as published) from those of lists of two."""
    pairs = {}
    if "teacher_scores" in columns:
        pairs["pos_score"] = pc.list_element(columns["teacher_scores"], 0)
        pairs["neg_score"] = pc.list_element(columns["teacher_scores"], 1)
    pairs["query_id"] = columns["query_id"]
    pairs["pos_id"] = pc.list_element(columns["doc_ids"], 0)
    pairs["neg_id"] = pc.list_element(columns["doc_ids"], 1)
    return pairs


def _are_pairs(rows: TeacherRows) -> bool:
    for _, columns in rows.batches(["doc_ids"]):
        if not pc.all(pc.equal(pc.list_value_length(columns["doc_ids"]), 2)).as_py():
            return False
    return True


def _write_parquet(rows: TeacherRows, file: object, are_pairs: bool) -> None:
    writer = None
    for _, columns in rows.batches():
        table = pa.table(as_pairs(columns) if are_pairs else columns)
        if rows.has_only_margins:
            table = table.select([*TRIPLE_COLUMNS, "pos_score"]).rename_columns(MARGIN_COLUMNS)
        if writer is None:
            writer = pa.parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
    writer.close()
