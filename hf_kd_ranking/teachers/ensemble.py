"""Average teacher scores over files: the paper's T2 from its three cross-encoders.

Scores are matched by (query, document) whatever the order of the rows, in bounded memory (see `buckets`). They are
read and averaged in double precision, because the published averages were.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from tqdm.auto import tqdm

from ..artifacts import existing_file, refuse_existing, writing
from ..data.rows import MARGIN_COLUMNS, PAIR_COLUMNS, TRIPLE_COLUMNS
from ..data.tables import nth_line, read_lines, read_tsv, tsv_lines
from .buckets import BucketFile, bucket_folder, bucket_of, id_keys, matched_buckets

SCORED_DOCUMENT = ("query_id", "doc_id", "score")
METHODS = ("mean", "standardized", "median")
KEYS = ("query", "document")
# A score of a file: keys of its ids, its place (twice the row, plus 1 for the negative), and the score.
ENTRY = np.dtype([("query", "i8"), ("document", "i8"), ("place", "i8"), ("score", "f8")])
# The result for a place of the first file: the average, and the number of files that have the pair.
AVERAGE = np.dtype([("score", "f8"), ("files", "u1")])


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
        files: files of teacher rows (five-column TSV, plain or compressed, or Parquet, also of margins). All but the
            first may also be files of pairs, `query_id doc_id score`: with the weights 0 and 1, a file of rows and a
            file of pairs make rows with the scores of the pairs. If a pair occurs several times in a file, its last
            score is used.
        output: five-column TSV, in the order of the first file; appears when it is complete.
        method: "mean"; "standardized", the mean after each teacher's scores were standardized to mean 0 and deviation
            1, for teachers on different scales; or "median".
        weights: one weight for each file, for the two means; None weighs all files equally.
        on_missing: what to do with a row of which a file lacks a pair: raise an error, "average" over the files that
            have it (as the authors' code does), or "drop" it and count it.
        overwrite: True replaces an existing output.

    Returns:
        Counts: `rows` written, `dropped`, and `incomplete` scores averaged over some of the files.

    Raises:
        FileNotFoundError: if a file does not exist.
        FileExistsError: if the output exists and `overwrite` is False.
        ValueError: with file and line for a malformed row; for an invalid setting.
        KeyError: naming file, line and pair, for a pair that a file lacks; with "average", that all files lack.
    """
    paths = [existing_file(path, "teacher scores") for path in files]
    if not paths:
        raise ValueError("An ensemble needs at least one file of teacher rows, got none.")
    if on_missing not in ("error", "average", "drop"):
        raise ValueError(f"on_missing must be 'error', 'average' or 'drop', got {on_missing!r}.")
    combine = _combiner(method, len(paths), weights)
    _check_layouts(paths, weights or [1.0] * len(paths))
    output = Path(output)
    refuse_existing(output, overwrite)
    with bucket_folder(output.with_name(f"{output.name}.buckets")) as folder:
        buckets, moments = [], []
        with tqdm(desc="Reading", unit="score", unit_scale=True) as progress:
            for i, path in enumerate(paths):
                buckets.append(BucketFile(folder / f"{i}.bin", ENTRY))
                moments.append(_distribute(path, buckets[-1], progress))
        if method != "standardized":
            moments = [(0.0, 1.0)] * len(paths)
        averages = _average(buckets, moments, combine, folder / "averages.bin")
        return _write(paths, output, buckets, averages, on_missing)


def _check_layouts(paths: list[Path], weights: Sequence[float]) -> None:
    for path, weight in zip(paths, weights, strict=True):
        columns = _parquet_columns(path) if path.suffix == ".parquet" else {}
        if weight and "pos_score" in columns and "neg_score" not in columns:
            raise ValueError(
                f"{path} holds margins, which belong to a row and not to its pairs; average scores, or give it the "
                "weight 0 to take only its rows."
            )
    first = next(_read_batches(paths[0]), None)
    if first is not None and "doc_id" in first.schema.names:
        raise ValueError(f"{paths[0]} holds pairs; the first file gives the rows and needs {', '.join(PAIR_COLUMNS)}.")


def _combiner(method: str, count: int, weights: Sequence[float] | None) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from (files, pairs) scores, NaN where a file lacks the pair, to (pairs,) averages."""
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
        is_present = ~np.isnan(scores)
        total = np.zeros(scores.shape[1])
        for factor, values in zip(factors, np.where(is_present, scores, 0.0), strict=True):
            total += factor * values  # in the order of the files, as Python's sum
        with np.errstate(invalid="ignore"):
            return total / (factors[:, None] * is_present).sum(0)

    return mean


# ---- Reading --------------------------------------------------------------------------------------------------------


def _distribute(path: Path, buckets: BucketFile, progress: tqdm) -> tuple[float, float]:
    """Distribute the scores of a file over buckets, and return their mean and standard deviation."""
    mean, squares = 0.0, 0.0
    for batch in _read_batches(path):
        queries, documents, scores = _scored_documents(batch)
        before, count = len(buckets), len(scores)
        batch_mean = scores.mean()
        difference = batch_mean - mean  # Chan's update: sums of squares would lose digits
        squares += ((scores - batch_mean) ** 2).sum() + difference**2 * before * count / (before + count)
        mean += difference * count / (before + count)
        entries = np.empty(count, dtype=ENTRY)
        entries["query"] = queries
        entries["document"] = documents
        entries["place"] = np.arange(before, before + count)
        entries["score"] = scores
        buckets.add(entries, (queries, documents))
        progress.update(count)
    if len(buckets) == 0:
        raise ValueError(f"{path} holds no rows.")
    return mean, (squares / len(buckets)) ** 0.5 or 1.0


def _scored_documents(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the keys of queries and documents, and the scores; a row's positive, then its negative."""
    queries = id_keys(batch["query_id"])
    if "doc_id" in batch.schema.names:
        return queries, id_keys(batch["doc_id"]), batch["score"].to_numpy()
    documents = np.stack([id_keys(batch["pos_id"]), id_keys(batch["neg_id"])], 1)
    scores = np.stack([batch["pos_score"].to_numpy(), batch["neg_score"].to_numpy()], 1)
    return np.repeat(queries, 2), documents.ravel(), scores.ravel()


def _read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Read a file, ids as strings and scores in double precision."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    width = 0
    for _, text in read_lines(path):
        if text.strip():
            width = text.count("\t") + 1
            break
    names = SCORED_DOCUMENT if width == len(SCORED_DOCUMENT) else PAIR_COLUMNS
    yield from read_tsv(path, {name: _column_type(name) for name in names}, 1 << 22)


def _read_parquet(path: Path) -> Iterator[pa.RecordBatch]:
    names = _parquet_columns(path)
    start = 0
    for batch in pa.parquet.ParquetFile(path).iter_batches(1 << 17, columns=list(names.values())):
        columns = {}
        for name, stored_name in names.items():
            columns[name] = batch[stored_name].cast(_column_type(name))
            is_bad = columns[name].is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
            if "score" in name:
                is_bad |= np.isinf(columns[name].to_numpy(zero_copy_only=False))
            if is_bad.any():
                row = int(np.argmax(is_bad))
                value = columns[name][row].as_py()
                raise ValueError(f"{path} row {start + row}: {name} must be present and finite, got {value}.")
        start += len(batch)
        if "pos_score" in columns and "neg_score" not in columns:  # margins
            columns["neg_score"] = pa.array(np.zeros(len(batch)))
        yield pa.RecordBatch.from_pydict(columns)


def _parquet_columns(path: Path) -> dict[str, str]:
    """Return our columns -> those of a Parquet file: rows, the Hub's margins, or the Hub's scores of pairs."""
    names = pa.parquet.read_schema(path).names
    layouts = [dict(zip(PAIR_COLUMNS, PAIR_COLUMNS, strict=True))]
    layouts.append(dict(zip((*TRIPLE_COLUMNS, "pos_score"), MARGIN_COLUMNS, strict=True)))
    for document in ("doc_id", "passage_id", "corpus_id"):
        layouts.append({"query_id": "query_id", "doc_id": document, "score": "score"})
    for layout in layouts:
        if set(layout.values()) <= set(names):
            return layout
    known = "; ".join(", ".join(layout.values()) for layout in layouts[:3])
    raise ValueError(f"{path} has the columns {', '.join(names)}; needed {known}.")


def _column_type(name: str) -> pa.DataType:
    return pa.float64() if "score" in name else pa.string()


# ---- Averaging and writing ------------------------------------------------------------------------------------------


def _average(
    buckets: list[BucketFile], moments: list[tuple[float, float]], combine: Callable, path: Path
) -> np.ndarray:
    """Return the averages of all places of the first file, in a mapped file."""
    # Written in full, so that a full disk is an error here; a mapped page without a place would kill the process.
    np.zeros(len(buckets[0]), dtype=AVERAGE).tofile(path)
    result = np.memmap(path, AVERAGE, mode="r+")
    for entries, numbers, count in matched_buckets(buckets, KEYS, "Averaging"):
        scores = np.full((len(buckets), count), np.nan)
        for i, (mean, deviation) in enumerate(moments):
            # Entries are in the order of the file, and the last one of a repeated pair wins.
            scores[i, numbers[i]] = (entries[i]["score"] - mean) / deviation
        averages = combine(scores)
        # 0 where no file with a weight above 0 has the pair
        files = np.where(np.isnan(averages), 0, (~np.isnan(scores)).sum(0))
        places = entries[0]["place"]
        result["score"][places] = averages[numbers[0]]
        result["files"][places] = files[numbers[0]]
    return result


def _write(
    paths: list[Path], output: Path, buckets: list[BucketFile], averages: np.ndarray, on_missing: str
) -> dict[str, int]:
    counts = {"rows": 0, "dropped": 0, "incomplete": 0}
    needed = 1 if on_missing == "average" else len(paths)
    start = 0
    with writing(output, "wb") as file:
        for batch in _read_batches(paths[0]):
            part = averages[start : start + 2 * len(batch)].reshape(-1, 2)
            is_missing = part["files"] < needed
            if on_missing != "drop" and is_missing.any():
                missing = int((averages["files"] < needed).sum())
                _raise_missing(paths, buckets, batch, start, is_missing, missing)
            start += part.size
            scores = part["score"]
            if on_missing == "drop":
                is_kept = ~is_missing.any(1)
                counts["dropped"] += int((~is_kept).sum())
                scores, batch = scores[is_kept], batch.filter(pa.array(is_kept))
            else:
                counts["incomplete"] += int((part["files"] < len(paths)).sum())
            if len(batch):
                columns = [pa.array(map(repr, side.tolist()), pa.string()) for side in scores.T]
                file.writelines(tsv_lines([*columns, *batch.select(TRIPLE_COLUMNS).columns]))
            counts["rows"] += len(batch)
    return counts


def _raise_missing(
    paths: list[Path], buckets: list[BucketFile], batch: pa.RecordBatch, start: int, is_missing: np.ndarray, count: int
) -> None:
    """Raise about the first missing pair of a batch whose first score has the place `start`."""
    row, side = np.argwhere(is_missing)[0].tolist()
    query_id, doc_id = batch["query_id"][row], batch[("pos_id", "neg_id")[side]][row]
    query, document = id_keys(pa.array([query_id.as_py()])), id_keys(pa.array([doc_id.as_py()]))
    bucket = int(bucket_of(query, document)[0])
    lacking = []
    for path, file in zip(paths, buckets, strict=True):
        entries = file.read(bucket)
        if not ((entries["query"] == query) & (entries["document"] == document)).any():
            lacking.append(str(path))
    row += start // 2
    where = f"row {row}" if paths[0].suffix == ".parquet" else f"line {nth_line(paths[0], row)}"
    raise KeyError(
        f"{paths[0]} {where}: the pair {str(query_id)!r} {str(doc_id)!r} is not in {', '.join(lacking)} ({count:,} "
        "scores of the first file lack one); on_missing='average' uses the files that have it, 'drop' leaves such "
        "rows out."
    )
