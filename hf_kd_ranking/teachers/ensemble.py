"""Average teacher scores over files: the paper's T2 from its three cross-encoders.

Scores are matched by (query, document) whatever the order of the rows, in bounded memory (see `buckets`). They are
read and averaged in double precision, because the published averages were.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from tqdm.auto import tqdm

from ..artifacts import existing_file, refuse_existing, writing
from ..data.rows import MARGIN_COLUMNS, PAIR_COLUMNS, TRIPLE_COLUMNS, holds_margins, read_parquet
from ..data.tables import first_line, nth_line, read_tsv, tsv_lines
from ..errors import InputError, UnknownIdError
from .buckets import BucketFile, bucket_folder, id_keys, matched_buckets

METHODS = ("mean", "standardized", "median")
ROW_TYPES = dict.fromkeys(PAIR_COLUMNS[:2], pa.float64()) | dict.fromkeys(TRIPLE_COLUMNS, pa.string())
SCORE_TYPES = {"query_id": pa.string(), "doc_id": pa.string(), "score": pa.float64()}
# Columns of Parquet files -> ours: rows, the Hub's margins, and its scores of pairs.
PARQUET_LAYOUTS = {PAIR_COLUMNS: PAIR_COLUMNS, MARGIN_COLUMNS: (*TRIPLE_COLUMNS, "pos_score")}
for _document in ("doc_id", "passage_id", "corpus_id"):
    PARQUET_LAYOUTS["query_id", _document, "score"] = tuple(SCORE_TYPES)
# A score of a file: keys of its ids, its place (twice the row, plus 1 for the negative), and the score.
ENTRY = np.dtype([("query", "i8"), ("document", "i8"), ("place", "i8"), ("score", "f8")])


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
        files: teacher rows (five-column TSV, plain or compressed, or Parquet, also of margins). All but the first may
            also be files of pairs, `query_id doc_id score`: with the weights 0 and 1, a file of rows and a file of
            pairs make rows with the scores of the pairs. The last score of a repeated pair is used.
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
        InputError: with file and line for a malformed row; for an invalid setting.
        UnknownIdError: naming file, line and pair, for a pair that a file lacks; with "average", that all files lack.

    Example:
        >>> kd.ensemble_teachers(["scores.tsv", "other.tsv"], "t2.tsv", method="standardized")
        {'rows': 40, 'dropped': 0, 'incomplete': 0}
    """
    paths = [existing_file(path, "teacher scores") for path in files]
    _check_settings(len(paths), method, weights, on_missing)
    weights = weights or [1.0] * len(paths)
    _check_layouts(paths, weights)
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
        combine = partial(np.nanmedian, axis=0) if method == "median" else partial(_mean, weights)
        averages = _average(buckets, moments, combine, on_missing != "average", folder / "averages.bin")
        return _write(paths, output, averages, on_missing)


def _check_settings(count: int, method: str, weights: Sequence[float] | None, on_missing: str) -> None:
    if count == 0:
        raise InputError("An ensemble needs at least one file of teacher rows, got none.")
    if on_missing not in ("error", "average", "drop"):
        raise InputError(f"on_missing must be 'error', 'average' or 'drop', got {on_missing!r}.")
    if method not in METHODS:
        raise InputError(f"Unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    if weights is None:
        return
    if not (len(weights) == count and min(weights) >= 0 and 0 < sum(weights) < np.inf):
        raise InputError(f"Needed one weight of 0 or more for each of the {count} files, got {list(weights)}.")
    if method == "median":
        raise InputError("A median has no weights; use method='mean' or 'standardized'.")


def _check_layouts(paths: list[Path], weights: Sequence[float]) -> None:
    for path, weight in zip(paths, weights, strict=True):
        if weight and holds_margins(path, tuple(PARQUET_LAYOUTS)):
            raise InputError(
                f"{path} holds margins, which belong to a row and not to its pairs; give scores, or the weight 0."
            )
    first = next(_read_batches(paths[0]), None)
    if first is not None and "doc_id" in first.schema.names:
        raise InputError(f"{paths[0]} holds pairs; the first file gives the rows and needs {', '.join(PAIR_COLUMNS)}.")


def _distribute(path: Path, buckets: BucketFile, progress: tqdm) -> tuple[float, float]:
    """Distribute the scores of a file over buckets, and return their mean and standard deviation."""
    mean, squares = 0.0, 0.0
    for batch in _read_batches(path):
        before = len(buckets)
        entries = _entries(batch, before)
        buckets.add(entries, "query", "document")
        scores, count = entries["score"].copy(), len(entries)
        batch_mean = scores.mean()
        difference = batch_mean - mean  # Chan's update: sums of squares would lose digits
        squares += ((scores - batch_mean) ** 2).sum() + difference**2 * before * count / (before + count)
        mean += difference * count / (before + count)
        progress.update(count)
    if len(buckets) == 0:
        raise InputError(f"{path} holds no rows.")
    return mean, (squares / len(buckets)) ** 0.5 or 1.0


def _entries(batch: pa.RecordBatch, start: int) -> np.ndarray:
    """Return an entry for each score, a row's positive before its negative; the first has the place `start`."""
    sides = [("doc_id", "score")]
    if "pos_id" in batch.schema.names:
        sides = [("pos_id", "pos_score"), ("neg_id", "neg_score")]
    entries = np.empty((len(batch), len(sides)), dtype=ENTRY)
    entries["query"] = id_keys(batch["query_id"])[:, None]
    for side, (document, score) in enumerate(sides):
        entries["document"][:, side] = id_keys(batch[document])
        entries["score"][:, side] = batch[score].to_numpy()
    entries["place"] = np.arange(start, start + entries.size).reshape(entries.shape)
    return entries.ravel()


def _read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Read a file, ids as strings and scores in double precision."""
    if path.suffix != ".parquet":
        types = SCORE_TYPES if first_line(path).count("\t") == 2 else ROW_TYPES
        yield from read_tsv(path, types, 1 << 22)
        return
    for table in read_parquet(path, tuple(PARQUET_LAYOUTS)):
        table = table.rename_columns(PARQUET_LAYOUTS[tuple(table.column_names)])
        if "pos_score" in table.column_names and "neg_score" not in table.column_names:  # margins
            table = table.append_column("neg_score", pa.array(np.zeros(len(table))))
        types = pa.schema([(name, (ROW_TYPES | SCORE_TYPES)[name]) for name in table.column_names])
        yield from table.cast(types).combine_chunks().to_batches()


def _average(
    buckets: list[BucketFile], moments: list[tuple[float, float]], combine: Callable, needs_all: bool, path: Path
) -> np.ndarray:
    """Return for all places of the first file the average, and which files have the pair, in a mapped file.

    The average is NaN where no file with a weight above 0 has the pair; if `needs_all`, where any file lacks it.
    """
    dtype = np.dtype([("score", "f8"), ("is_present", "?", (len(buckets),))])
    # Written in full, so that a full disk is an error here; a mapped page without a place would kill the process.
    np.zeros(len(buckets[0]), dtype).tofile(path)
    result = np.memmap(path, dtype, mode="r+")
    means, deviations = np.array(moments).T[:, :, None]  # (files, 1) each
    for matched, entries, columns in matched_buckets(buckets, "Averaging"):
        is_present = matched["place"] >= 0  # (files, pairs)
        averages = combine(np.where(is_present, (matched["score"] - means) / deviations, np.nan))
        if needs_all:
            averages[~is_present.all(0)] = np.nan
        result["score"][entries["place"]] = averages[columns]
        result["is_present"][entries["place"]] = is_present.T[columns]
    return result


def _mean(weights: Sequence[float], scores: np.ndarray) -> np.ndarray:
    """Return the weighted means of (files, pairs) scores, which are NaN where a file lacks the pair."""
    total, divisor = np.zeros((2, scores.shape[1]))
    for weight, values in zip(weights, scores, strict=True):  # in the order of the files, as Python's sum
        is_present = ~np.isnan(values)
        total += weight * np.where(is_present, values, 0.0)
        divisor += weight * is_present
    with np.errstate(invalid="ignore"):
        return total / divisor


def _write(paths: list[Path], output: Path, averages: np.ndarray, on_missing: str) -> dict[str, int]:
    counts = {"rows": 0, "dropped": 0, "incomplete": 0}
    start = 0
    with writing(output, "wb") as file:
        for batch in _read_batches(paths[0]):
            part = averages[start : start + 2 * len(batch)].reshape(-1, 2)
            is_missing = np.isnan(part["score"])
            if on_missing != "drop" and is_missing.any():
                _raise_missing(paths, batch, start // 2, part, np.isnan(averages["score"]).sum())
            start += part.size
            is_kept = ~is_missing.any(1)
            part, batch = part[is_kept], batch.filter(pa.array(is_kept))
            counts["rows"] += len(batch)
            counts["dropped"] += int((~is_kept).sum())
            counts["incomplete"] += int((~part["is_present"].all(-1)).sum())
            if len(batch):
                columns = [pa.array(map(repr, side.tolist()), pa.string()) for side in part["score"].T]
                file.writelines(tsv_lines([*columns, *batch.select(TRIPLE_COLUMNS).columns]))
    return counts


def _raise_missing(paths: list[Path], batch: pa.RecordBatch, start: int, part: np.ndarray, count: int) -> None:
    row, side = np.argwhere(np.isnan(part["score"]))[0].tolist()
    query_id, doc_id = batch["query_id"][row], batch[TRIPLE_COLUMNS[1 + side]][row]
    lacking = [str(path) for path, has in zip(paths, part["is_present"][row, side], strict=True) if not has]
    where = f"row {start + row}" if paths[0].suffix == ".parquet" else f"line {nth_line(paths[0], start + row)}"
    raise UnknownIdError(
        f"{paths[0]} {where}: the pair {str(query_id)!r} {str(doc_id)!r} is not in {', '.join(lacking)} ({count:,} "
        "scores of the first file lack one); on_missing='average' uses the files that have it, 'drop' skips such rows."
    )
