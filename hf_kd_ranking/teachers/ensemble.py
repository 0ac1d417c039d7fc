"""Average the scores of several teachers: the paper's T2 from its three cross-encoders.

Scores are matched by (query, document) whatever the order of the rows. Memory stays bounded: the scores of all files
are first dealt into buckets on disk by a hash of their pair, and then one bucket after another is averaged in memory.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import xxhash
from tqdm.auto import tqdm

from ..artifacts import existing_file, refuse_existing, writing
from ..data.rows import PAIR_COLUMNS as TEACHER_COLUMNS
from ..data.tables import nth_line, read_lines, read_tsv, tsv_lines

PAIR_COLUMNS = ("query_id", "doc_id", "score")
METHODS = ("mean", "standardized", "median")
# A bucket of 40 million rows holds 300,000 of their pairs from each file.
BUCKETS = 256
# What a bucket stores of a pair: 128 bits of its name, its place in the file, its score.
ENTRY = np.dtype([("high", "u8"), ("low", "u8"), ("place", "i8"), ("score", "f8")])


def ensemble_teachers(
    files: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    method: Literal["mean", "standardized", "median"] = "mean",
    weights: Sequence[float] | None = None,
    on_missing: Literal["error", "average", "drop"] = "error",
    overwrite: bool = False,
) -> dict[str, int]:
    """Write the rows of the first file with scores averaged over all files.

    Args:
        files: of teacher rows (five-column TSV, plain or compressed, or Parquet, margins too); all but the first may
            also be files of pairs, `query_id doc_id score`: with weights 0 and 1 a file of rows and one of pairs make
            rows of the pairs' scores. Where a pair stands several times in a file, its last score counts.
        output: five-column TSV, in the order of the first file; appears when it is complete.
        method: "mean"; "standardized", the mean of each teacher's scores divided by their standard deviation after
            subtracting their mean, for teachers on different scales; or "median".
        weights: of the files, for the two means; None weighs all alike.
        on_missing: what becomes of a row of which a file lacks a pair: an error, the average over the files that have
            it (as the authors' code does), or it is dropped and counted.
        overwrite: True replaces an existing output.

    Returns:
        Counts: `rows` written, `dropped`, and `incomplete` scores averaged over some of the files.

    Raises:
        FileNotFoundError, FileExistsError: for the files.
        ValueError: with file and line for a malformed row; for a setting that is none.
        KeyError: naming file, line and pair, for a pair that a file lacks; with "average", that all files lack.
    """
    paths = [existing_file(path, "teacher scores") for path in files]
    if not paths:
        raise ValueError("An ensemble needs at least one file of teacher rows, got none.")
    combine = _combiner(method, len(paths), weights)
    for path, weight in zip(paths, weights or [1.0] * len(paths), strict=True):
        columns = _parquet_columns(path) if path.suffix == ".parquet" else {}
        if weight and "pos_score" in columns and "neg_score" not in columns:
            raise ValueError(
                f"{path} holds margins, which belong to a row and not to its pairs; average scores, or give it the "
                "weight 0 to take its rows only."
            )
    if on_missing not in ("error", "average", "drop"):
        raise ValueError(f"on_missing is 'error', 'average' or 'drop', got {on_missing!r}.")
    refuse_existing(output, overwrite)
    if "doc_id" in next(_rows(paths[0]), pa.RecordBatch.from_pydict({})).schema.names:
        raise ValueError(
            f"{paths[0]} holds pairs; the first file gives the rows and needs {', '.join(TEACHER_COLUMNS)}."
        )
    with _work_folder(Path(output)) as folder:
        with tqdm(desc="Reading", unit="row", unit_scale=True) as progress:
            facts = [_deal(path, folder / str(i), progress) for i, path in enumerate(paths)]
        shifts = [(mean, std) if method == "standardized" else (0.0, 1.0) for _, mean, std in facts]
        places = facts[0][0]
        result, found = (_mapped(folder / kind, places, kind) for kind in ("f8", "u1"))
        for bucket in tqdm(range(BUCKETS), desc="Averaging", unit="bucket"):
            entries = [_read_bucket(folder / str(i), bucket) for i in range(len(paths))]
            _average(entries, shifts, combine, result, found)
        missing = np.flatnonzero(found < (1 if on_missing == "average" else len(paths)))
        if len(missing) and on_missing != "drop":
            _raise_missing(paths, int(missing[0]), len(missing), folder)
        return _write(paths[0], output, result, found, len(paths), on_missing)


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """A folder beside the output, without what a killed run left in it, and gone in the end."""
    folder = output.with_name(f"{output.name}.buckets")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _mapped(path: Path, count: int, kind: str) -> np.ndarray:
    """A mapped array whose room on the disk is taken now: a page that finds none would kill the process."""
    size = count * np.dtype(kind).itemsize
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS and Windows have none: there the room is taken page by page, as it is written
            file.truncate(size)
    return np.memmap(path, dtype=kind, mode="r+", shape=(count,))


def _combiner(method: str, count: int, weights: Sequence[float] | None) -> Callable[[np.ndarray], np.ndarray]:
    """From (files, pairs) scores, NaN where a file lacks the pair, to (pairs,)."""
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    if weights is not None and not (len(weights) == count and min(weights) >= 0 and 0 < sum(weights) < np.inf):
        raise ValueError(f"Needed one weight of 0 or more for each of the {count} files, got {list(weights)}.")
    if weights is not None and method == "median":
        raise ValueError("A median has no weights; use method='mean' or 'standardized'.")
    if method == "median":
        return lambda scores: np.nanmedian(scores, 0)
    factors = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)

    def mean(scores: np.ndarray) -> np.ndarray:
        is_there = ~np.isnan(scores)
        total = np.zeros(scores.shape[1])
        for factor, values in zip(factors, np.where(is_there, scores, 0.0), strict=True):
            total += factor * values  # in the order of the files, as Python's sum
        with np.errstate(invalid="ignore"):
            return total / (factors[:, None] * is_there).sum(0)

    return mean


def _deal(path: Path, folder: Path, progress: tqdm) -> tuple[int, float, float]:
    """Deal the scores of a file into buckets; returns their number, mean and standard deviation."""
    folder.mkdir()
    places, mean, squares = 0, 0.0, 0.0
    files = [(folder / f"{bucket:03d}").open("wb") for bucket in range(BUCKETS)]
    try:
        for queries, documents, scores in _scored_pairs(path):
            count, batch_mean = len(scores), scores.mean()
            delta = batch_mean - mean  # Chan's update: sums of squares would lose digits
            squares += ((scores - batch_mean) ** 2).sum() + delta**2 * places * count / (places + count)
            mean += delta * count / (places + count)
            entries = np.empty(count, dtype=ENTRY)
            entries["high"], entries["low"] = _names(queries, documents)
            entries["place"], entries["score"] = np.arange(places, places + count), scores
            buckets = (entries["high"] % BUCKETS).astype(np.int64)
            order = np.argsort(buckets, kind="stable")
            ends = np.searchsorted(buckets[order], np.arange(BUCKETS + 1))
            entries = entries[order]
            for bucket, file in enumerate(files):
                entries[ends[bucket] : ends[bucket + 1]].tofile(file)
            places += count
            progress.update(count)
    finally:
        for file in files:
            file.close()
    if places == 0:
        raise ValueError(f"{path} holds no rows.")
    return places, mean, (squares / places) ** 0.5 or 1.0


def _scored_pairs(path: Path) -> Iterator[tuple[pa.Array, pa.Array, np.ndarray]]:
    """Query ids, document ids and scores; a row's positive, then its negative."""
    for batch in _rows(path):
        if "doc_id" in batch.schema.names:
            yield batch["query_id"], batch["doc_id"], batch["score"].to_numpy()
            continue
        twice = np.repeat(np.arange(len(batch)), 2)
        odd = np.tile([0, len(batch)], len(batch))
        documents = pa.concat_arrays([batch["pos_id"], batch["neg_id"]]).take(pa.array(twice + odd))
        scores = np.stack([batch["pos_score"].to_numpy(), batch["neg_score"].to_numpy()], 1).ravel()
        yield batch["query_id"].take(pa.array(twice)), documents, scores


def _rows(path: Path) -> Iterator[pa.RecordBatch]:
    """Batches of a file with ids as strings and scores as float64."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    width = next((text.count("\t") + 1 for _, text in read_lines(path) if text.strip()), 0)
    columns = PAIR_COLUMNS if width == len(PAIR_COLUMNS) else TEACHER_COLUMNS
    yield from read_tsv(path, {name: _type(name) for name in columns}, 1 << 22)


def _parquet_rows(path: Path) -> Iterator[pa.RecordBatch]:
    file = pa.parquet.ParquetFile(path)
    names, first_row = _parquet_columns(path), 0
    for batch in file.iter_batches(1 << 17, columns=list(names.values())):
        columns = {name: batch[theirs].cast(_type(name)) for name, theirs in names.items()}
        for name, column in columns.items():
            values = column.to_numpy(zero_copy_only=False) if "score" in name else None
            bad = np.flatnonzero(column.is_null() if values is None else ~np.isfinite(values))
            if len(bad):
                value = column[int(bad[0])].as_py()
                raise ValueError(f"{path} row {first_row + bad[0]}: {name} must be there and finite, got {value}.")
        first_row += len(batch)
        if "pos_score" in columns and "neg_score" not in columns:  # margins
            columns["neg_score"] = pa.array(np.zeros(len(batch)))
        yield pa.RecordBatch.from_pydict(columns)


def _parquet_columns(path: Path) -> dict[str, str]:
    """Our columns -> those of a Parquet file: rows, the Hub's margins, or the Hub's scores of pairs."""
    names = pa.parquet.read_schema(path).names
    layouts = [dict(zip(TEACHER_COLUMNS, TEACHER_COLUMNS, strict=True))]
    layouts.append({"pos_score": "score", "query_id": "query_id", "pos_id": "positive_id", "neg_id": "negative_id"})
    layouts += [
        {"query_id": "query_id", "doc_id": document, "score": "score"}
        for document in ("doc_id", "passage_id", "corpus_id")
    ]
    for layout in layouts:
        if set(layout.values()) <= set(names):
            return layout
    known = "; ".join(", ".join(layout.values()) for layout in layouts[:3])
    raise ValueError(f"{path} has the columns {', '.join(names)}; needed {known}.")


def _type(name: str) -> pa.DataType:
    return pa.float64() if "score" in name else pa.string()


def _names(queries: pa.Array, documents: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """128 bits that name each pair: two pairs of 80 million share them with a probability of 1e-23."""
    texts = pc.binary_join_element_wise(queries, documents, "\t").cast(pa.binary()).to_pylist()
    both = b"".join(xxhash.xxh3_128_digest(text) for text in texts)
    halves = np.frombuffer(both, dtype="<u8").reshape(-1, 2)
    return halves[:, 0], halves[:, 1]


def _read_bucket(folder: Path, bucket: int) -> np.ndarray:
    return np.fromfile(folder / f"{bucket:03d}", dtype=ENTRY)


def _average(
    entries: list[np.ndarray],
    shifts: list[tuple[float, float]],
    combine: Callable,
    result: np.ndarray,
    found: np.ndarray,
) -> None:
    """Fill in the averages of the first file's places in one bucket, and how many files had each pair."""
    pairs = np.concatenate(entries)
    number = numbered(pairs["high"], pairs["low"])
    ends = np.cumsum([0, *map(len, entries)])
    scores = np.full((len(entries), number.max(initial=-1) + 1), np.nan)
    for i, (mean, std) in enumerate(shifts):
        # Entries are in the order of the file, and of several for one place numpy keeps the last.
        scores[i, number[ends[i] : ends[i + 1]]] = (entries[i]["score"] - mean) / std
    places, mine = entries[0]["place"], number[: ends[1]]
    averages = combine(scores)
    result[places] = averages[mine]
    # None where no file that counts has the pair: a weight may be 0.
    found[places] = np.where(np.isnan(averages), 0, (~np.isnan(scores)).sum(0))[mine]


def numbered(*columns: np.ndarray) -> np.ndarray:
    """Number the distinct rows of some columns from 0, in their order; gives each row's number."""
    order = np.lexsort(columns[::-1])
    is_new = np.zeros(len(order), dtype=bool)
    for column in columns:
        is_new[1:] |= column[order][1:] != column[order][:-1]
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(is_new)
    return number


def _raise_missing(paths: list[Path], place: int, count: int, folder: Path) -> None:
    row, column = divmod(place, 2)
    batch_start = 0
    for batch in _rows(paths[0]):
        if row < batch_start + len(batch):
            query, document = (
                str(batch[name][row - batch_start]) for name in ("query_id", ("pos_id", "neg_id")[column])
            )
            break
        batch_start += len(batch)
    high, low = _names(pa.array([query]), pa.array([document]))
    lacking = []
    for i, path in enumerate(paths):
        entries = _read_bucket(folder / str(i), int(high[0] % BUCKETS))
        if not ((entries["high"] == high[0]) & (entries["low"] == low[0])).any():
            lacking.append(str(path))
    where = f"line {nth_line(paths[0], row)}" if paths[0].suffix != ".parquet" else f"row {row}"
    raise KeyError(
        f"{paths[0]} {where}: the pair {query!r} {document!r} is not in {', '.join(lacking)} ({count:,} scores of the "
        "first file lack one); on_missing='average' takes the files that have it, 'drop' leaves such rows out."
    )


def _write(
    path: Path, output: str | os.PathLike, result: np.ndarray, found: np.ndarray, files: int, on_missing: str
) -> dict[str, int]:
    counts: Counter[str] = Counter(rows=0, dropped=0, incomplete=0)
    start = 0
    with writing(output, "wb") as file:
        for batch in _rows(path):
            stop = start + 2 * len(batch)
            scores, complete = result[start:stop].reshape(-1, 2), (found[start:stop] == files).reshape(-1, 2)
            start = stop
            if on_missing == "drop":
                is_kept = complete.all(1)
                counts["dropped"] += int((~is_kept).sum())
                scores, batch = scores[is_kept], batch.filter(pa.array(is_kept))
            else:
                counts["incomplete"] += int((~complete).sum())
            if len(batch):
                columns = [pa.array(map(repr, scores[:, i].tolist()), pa.string()) for i in (0, 1)]
                file.writelines(tsv_lines([*columns, *(batch[name] for name in TEACHER_COLUMNS[2:])]))
            counts["rows"] += len(batch)
    return {name: counts[name] for name in ("rows", "dropped", "incomplete")}
