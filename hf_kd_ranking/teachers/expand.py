"""Teacher rows of ids to rows of texts: what trainers without a text store read.

Output is byte for byte that of the paper's own script (`teacher_id_to_text.py`) where that is right; where it skipped,
crashed or took the wrong text in silence, this raises.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from ..artifacts import existing_file, refuse_existing, writing
from ..data.rows import TEACHER_COLUMNS
from ..data.tables import nth_line, read_tsv, tsv_lines
from ..data.texts import TextStore

# What str.rstrip() takes off; Arrow's own trim of white space is three times as slow.
BLANKS = "".join(chr(code) for code in range(0x110000) if chr(code).isspace())
# Of a score file read at once: 30,000 rows, whose texts are about 20 MB.
BLOCK_BYTES = 1 << 20
THREADS = min(4, os.cpu_count() or 1)


def expand_ids(
    scores: str | os.PathLike,
    collection: TextStore,
    queries: TextStore,
    output: str | os.PathLike,
    on_missing: Literal["error", "skip"] = "error",
    overwrite: bool = False,
) -> dict[str, int]:
    """Write `pos_score neg_score query positive negative` texts for the id rows of a teacher-score file.

    Scores pass through as they are spelled; trailing blanks of texts go. Memory stays flat: texts are taken from the
    stores' mapped files, a block of rows at a time.

    Args:
        scores: five-column TSV, plain or compressed.
        collection: doc_id -> text.
        queries: query_id -> text.
        output: TSV file, which appears when it is complete.
        on_missing: "skip" leaves out rows with an id that the stores lack, and counts them.
        overwrite: True replaces an existing output.

    Returns:
        Counts: `rows` written, `skipped`, and where rows were skipped how many ids each column lacked.

    Raises:
        FileNotFoundError, FileExistsError: for the files.
        ValueError: with file and line, for a malformed row, or a text that holds a tab or a line break.
        KeyError: with file, line, id and counts, for an id that a store lacks.
    """
    if on_missing not in ("error", "skip"):
        raise ValueError(f"on_missing is 'error' or 'skip', got {on_missing!r}.")
    scores = existing_file(scores, "teacher scores")
    refuse_existing(output, overwrite)
    counts: Counter[str] = Counter(rows=0, skipped=0)
    types = {name: pa.large_string() for name in TEACHER_COLUMNS}
    stores = {"query_id": queries, "pos_id": collection, "neg_id": collection}

    def expand(first_row: int, batch: pa.RecordBatch) -> tuple[Iterable[bytes], Counter]:
        return _expand_block(scores, first_row, batch, stores, on_missing)

    with writing(output, "wb") as file, ThreadPoolExecutor(THREADS) as pool:
        blocks = _with_first_row(read_tsv(scores, types, BLOCK_BYTES))
        with tqdm(desc="Expanding", unit="row", unit_scale=True) as progress:
            for done in _in_order(pool.submit(expand, *block) for block in blocks):
                lines, found = done.result()
                file.writelines(lines)
                counts += found
                progress.update(found["rows"] + found["skipped"])
        if not counts["rows"] + counts["skipped"]:
            raise ValueError(f"{scores} holds no rows.")
    return dict(counts) | {"rows": counts["rows"], "skipped": counts["skipped"]}


def _with_first_row(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    first_row = 0
    for batch in batches:
        yield first_row, batch
        first_row += len(batch)


def _in_order(futures: Iterator[Future]) -> Iterator[Future]:
    """Results in order, a few blocks ahead of the writer and no more."""
    waiting = list(islice(futures, THREADS + 1))
    while waiting:
        yield waiting.pop(0)
        waiting += islice(futures, 1)


def _expand_block(
    path: Path, first_row: int, batch: pa.RecordBatch, stores: dict[str, TextStore], on_missing: str
) -> tuple[Iterable[bytes], Counter]:
    ids = {name: batch[name] for name in stores}
    ids["neg_id"] = pc.utf8_rtrim(ids["neg_id"], characters=BLANKS)  # as the script does with the last column
    for name in TEACHER_COLUMNS[:2]:
        _check_numbers(path, first_row, name, batch[name])
    rows = {name: store.rows_of_array(ids[name]) for name, store in stores.items()}
    is_known = np.logical_and.reduce([found >= 0 for found in rows.values()])
    counts = Counter(rows=int(is_known.sum()), skipped=int((~is_known).sum()))
    if counts["skipped"]:
        missing = {name: np.flatnonzero(found < 0) for name, found in rows.items()}
        if on_missing != "skip":
            name = min((name for name in missing if len(missing[name])), key=lambda name: missing[name][0])
            row, store = int(missing[name][0]), stores[name]
            raise KeyError(
                f"{path} line {nth_line(path, first_row + row)}: {name} {str(ids[name][row])!r} is not among the "
                f"{len(store):,} texts of {store.source}; do the files belong to one release? on_missing='skip' "
                "leaves such rows out and counts them."
            )
        counts.update({name: len(found) for name, found in missing.items() if len(found)})
        rows = {name: found[is_known] for name, found in rows.items()}
        batch = batch.filter(pa.array(is_known))
    if len(batch) == 0:
        return (), counts
    texts = [_texts_of(stores[name], found) for name, found in rows.items()]
    return tsv_lines([batch["pos_score"], batch["neg_score"], *texts]), counts


def _texts_of(store: TextStore, rows: np.ndarray) -> pa.LargeStringArray:
    texts = store.texts.take(pa.array(rows))
    _, offsets, data = texts.buffers()
    if not len(data):
        return texts
    data, ends = np.frombuffer(data, np.uint8), np.frombuffer(offsets, np.int64)[1 : len(texts) + 1] - 1
    last = data[np.maximum(ends, 0)]
    if ((last <= ord(" ")) | (last >= 0x80)).any():  # a blank, in ASCII or not, may end a text
        texts = pc.utf8_rtrim(texts, characters=BLANKS)
    if data.min() <= ord("\r"):  # few texts hold any control character
        bad = np.flatnonzero(pc.match_substring_regex(texts, "[\t\n\r]"))
        if len(bad):
            raise ValueError(
                f"{store.source}: the text of id {store.ids_of(rows[bad[:1]])[0]!r} holds a tab or a line break, "
                "which a row of texts cannot carry; replace them in the source first."
            )
    return texts


def _check_numbers(path: Path, first_row: int, name: str, column: pa.Array) -> None:
    try:
        numbers = pc.cast(pc.utf8_trim(column, characters=BLANKS), pa.float64())
        bad = np.flatnonzero(~np.isfinite(numbers.to_numpy(zero_copy_only=False)))
    except pa.ArrowInvalid:
        bad = [row for row, text in enumerate(column.to_pylist()) if not _is_number(text)]
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"{path} line {nth_line(path, first_row + row)}: {name} must be a finite number, got {str(column[row])!r}."
        )


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
