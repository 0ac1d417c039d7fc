"""Replace the ids of teacher rows by their texts, for trainers without a text store.

The output is byte for byte that of the authors' script (`teacher_id_to_text.py`). Where the script skipped a row,
crashed, or used a wrong text without saying so, this raises an error.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from ..artifacts import existing_file, refuse_existing, writing
from ..data.rows import PAIR_COLUMNS, TRIPLE_COLUMNS
from ..data.tables import nth_line, number, parse_number, read_tsv, tsv_lines
from ..data.texts import TextStore
from ..errors import InputError, UnknownIdError

# What str.rstrip() removes; Arrow's own trim of white space takes three times as long.
BLANKS = "".join(chr(code) for code in range(0x110000) if chr(code).isspace())
BLOCK_BYTES = 1 << 20  # of the score file, read at once: 30,000 rows, whose texts are about 20 MB
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

    Scores keep their spelling, and trailing blanks of texts are removed. Memory does not grow with the files: texts
    are taken from the stores' mapped files, a block of rows at a time.

    Args:
        scores: five-column TSV, plain or compressed.
        collection: doc_id -> text.
        queries: query_id -> text.
        output: TSV file, which appears when it is complete.
        on_missing: "skip" leaves out rows with an id that the stores lack, and counts them.
        overwrite: True replaces an existing output.

    Returns:
        Counts: `rows` written, `skipped`, and if rows were skipped how many ids each column lacked.

    Raises:
        FileNotFoundError: if the score file does not exist.
        FileExistsError: if the output exists and `overwrite` is False.
        InputError: with file and line, for a malformed row, or a text that contains a tab or a line break.
        UnknownIdError: with file, line, id and counts, for an id that a store lacks.

    Example:
        >>> documents, queries = kd.TextStore.from_tsv("collection.tsv"), kd.TextStore.from_tsv("queries.tsv")
        >>> kd.expand_ids("scores.tsv", documents, queries, "texts.tsv")
        {'rows': 40, 'skipped': 0}
    """
    if on_missing not in ("error", "skip"):
        raise InputError(f"on_missing must be 'error' or 'skip', got {on_missing!r}.")
    path = existing_file(scores, "teacher scores")
    refuse_existing(output, overwrite)
    stores = queries, collection, collection
    counts = Counter(rows=0, skipped=0)

    def submit_blocks() -> Iterator[Future]:
        start = 0
        for batch in read_tsv(path, dict.fromkeys(PAIR_COLUMNS, pa.large_string()), BLOCK_BYTES):
            yield pool.submit(_expand_block, path, start, batch, stores, on_missing)
            start += len(batch)

    with writing(output, "wb") as file, ThreadPoolExecutor(THREADS) as pool:
        blocks = submit_blocks()
        waiting = list(islice(blocks, THREADS + 1))  # a few blocks before the writer, and no more
        with tqdm(desc="Expanding", unit="row", unit_scale=True) as progress:
            while waiting:
                lines, block_counts = waiting.pop(0).result()
                file.writelines(lines)
                counts.update(block_counts)
                progress.update(block_counts["rows"] + block_counts["skipped"])
                waiting += islice(blocks, 1)
        if counts["rows"] + counts["skipped"] == 0:
            raise InputError(f"{path} holds no rows.")
    return dict(counts)


def _expand_block(
    path: Path, start: int, batch: pa.RecordBatch, stores: Sequence[TextStore], on_missing: str
) -> tuple[Iterable[bytes], Counter]:
    """Return the lines of a block, whose first row is row `start` of the file, and its counts."""
    *scores, queries, positives, negatives = batch.columns
    for name, column in zip(PAIR_COLUMNS, scores, strict=False):
        _check_numbers(path, start, name, column)
    ids = queries, positives, pc.utf8_rtrim(negatives, characters=BLANKS)  # as the script does at the end of a line
    rows = np.stack([store.rows_of_array(column) for store, column in zip(stores, ids, strict=True)])  # (3, N)
    is_missing = rows < 0
    is_known = ~is_missing.any(0)
    if on_missing == "error" and not is_known.all():
        row, side = np.argwhere(is_missing.T)[0].tolist()
        raise UnknownIdError(
            f"{path} line {nth_line(path, start + row)}: {TRIPLE_COLUMNS[side]} {str(ids[side][row])!r} is not among "
            f"the {len(stores[side]):,} texts of {stores[side].source}; do the files belong to one release? "
            "on_missing='skip' leaves such rows out and counts them."
        )
    counts = Counter(dict(zip(TRIPLE_COLUMNS, is_missing.sum(1).tolist(), strict=True)))
    counts.update(rows=int(is_known.sum()), skipped=int((~is_known).sum()))
    lines = ()
    if is_known.any():
        scores = [column.filter(pa.array(is_known)) for column in scores]
        lines = tsv_lines([*scores, *map(_take_texts, stores, rows[:, is_known])])
    return lines, +counts  # without zeros


def _take_texts(store: TextStore, rows: np.ndarray) -> pa.LargeStringArray:
    """Return texts without their trailing blanks; refuse those that contain a tab or a line break."""
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
            raise InputError(
                f"{store.source}: the text of id {store.ids_of(rows[bad[:1]])[0]!r} holds a tab or a line break; "
                "replace them in the source."
            )
    return texts


def _check_numbers(path: Path, start: int, name: str, column: pa.Array) -> None:
    try:
        numbers = pc.cast(pc.utf8_trim(column, characters=BLANKS), pa.float64())
        bad = np.flatnonzero(~np.isfinite(numbers.to_numpy()))
    except pa.ArrowInvalid:  # which does not say where
        bad = [row for row, text in enumerate(column.to_pylist()) if np.isnan(parse_number(text))]
    if len(bad):
        number(path, nth_line(path, start + int(bad[0])), name, str(column[int(bad[0])]), float)
