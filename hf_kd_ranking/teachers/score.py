"""Score triples or candidates with a teacher: every distinct pair once, in blocks that survive an interruption."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import xxhash

from ..artifacts import compute_blocks, existing_file, refuse_existing, work_folder, writing
from ..data.rows import TEACHER_COLUMNS, arrow_batches
from ..data.runs import Run, read_run, write_run
from ..data.tables import nth_line, read_lines, read_tsv, tsv_lines
from ..data.texts import TextStore
from ..processes import processes
from .load import Teacher, load_teacher

TRIPLE_COLUMNS = TEACHER_COLUMNS[2:]
# Distinct pairs scored between two saves, and so lost at most; the progress bar moves by as many. Sorted by length
# within, which a larger block would hardly do better.
PAIRS_PER_BLOCK = 2_048
ROWS_AT_ONCE = 1 << 19


@dataclass(frozen=True)
class Pairs:
    """What is to be scored: rows of a query with n documents, by their rows in the stores.

    Args:
        source: the rows; a file of triples, a data set with the same columns, or a run.
        queries: query_id -> text.
        documents: doc_id -> text.
        name: of the source, for messages.
    """

    source: Path | datasets.Dataset | Run
    queries: TextStore
    documents: TextStore
    name: str

    def batches(self) -> Iterator[list[pa.Array]]:
        """Columns of ids as strings, the query's first."""
        if isinstance(self.source, Run):
            for query_id, ranking in self.source.items():
                yield [pa.array([query_id] * len(ranking)), pa.array([doc_id for doc_id, _ in ranking])]
        elif isinstance(self.source, datasets.Dataset):
            for _, columns in arrow_batches(self.source, TRIPLE_COLUMNS, ROWS_AT_ONCE):
                yield [column.cast(pa.string()) for column in columns.values()]
        else:
            for batch in read_tsv(self.source, _columns_of(self.source)):
                yield [batch[name] for name in TRIPLE_COLUMNS]

    def numbered(self) -> Iterator[tuple[list[pa.Array], np.ndarray]]:
        """The columns, and a number for each pair, (rows, n) int64: query row * number of documents + document row.

        Raises:
            KeyError: naming file, line and id of the first that has no text.
        """
        first_row = 0
        for columns in self.batches():
            stores = [self.queries, *[self.documents] * (len(columns) - 1)]
            rows = [store.rows_of_array(ids) for store, ids in zip(stores, columns, strict=True)]
            for store, ids, found in zip(stores, columns, rows, strict=True):
                if (found < 0).any():
                    row = int(np.flatnonzero(found < 0)[0])
                    where = self._row_name(first_row + row, columns[0][row])
                    raise KeyError(
                        f"{where}: id {str(ids[row])!r} is not among the {len(store):,} texts of {store.source} "
                        f"({(found < 0).sum():,} of the {len(found):,} ids looked up are not)."
                    )
            yield columns, rows[0][:, None] * len(self.documents) + np.stack(rows[1:], 1)
            first_row += len(columns[0])

    def _row_name(self, row: int, query_id: pa.Scalar) -> str:
        if isinstance(self.source, Path):
            return f"{self.source} line {nth_line(self.source, row)}"
        return f"{self.name} query {str(query_id)!r}" if isinstance(self.source, Run) else f"{self.name} row {row}"


def score_teacher(
    teacher: Teacher | str,
    source: str | os.PathLike | datasets.Dataset | Run,
    queries: TextStore,
    documents: TextStore,
    output: str | os.PathLike,
    overwrite: bool = False,
) -> dict[str, int]:
    """Score pairs and write teacher rows, or for a run the run in the teacher's order.

    Under `accelerate launch` the processes share the blocks; all must make the same call.

    Args:
        teacher: see `load_teacher`; a string is loaded.
        source: a TSV of `query_id pos_id neg_id`, or of five columns whose scores are not read; a data set with these
            columns, see `sample_triples`; a `.trec` file or `Run` of candidates.
        queries: query_id -> text.
        documents: doc_id -> text.
        output: for triples a five-column TSV, in the order of the source; for a run a TREC run. Appears when complete.
        overwrite: True replaces an existing output.

    Returns:
        Counts: `rows` written, distinct `pairs`, and how many of them were `resumed`.

    Raises:
        FileNotFoundError, FileExistsError: for the files.
        KeyError: naming file, line and id, if an id has no text.
        ValueError: if a work folder is there that belongs to other inputs, or a score is not finite.
    """
    state, output = processes(), Path(output)
    teacher = load_teacher(teacher, device=state.device) if isinstance(teacher, str) else teacher
    name = str(source) if isinstance(source, str | os.PathLike) else f"the {type(source).__name__}"
    pairs = Pairs(_open(source), queries, documents, name)
    refuse_existing(output, overwrite)

    def score_block(block: slice) -> dict[str, np.ndarray]:
        return {"scores": _scores_of(teacher, np.asarray(distinct[block]), queries, documents)}

    rows = 0
    with work_folder(output, lambda folder: _find_pairs(folder, pairs, teacher)) as folder:
        distinct = np.load(folder / "pairs.npy", mmap_mode="r")
        description = f"Scoring with {teacher.name}"
        parts, resumed = compute_blocks(folder, len(distinct), PAIRS_PER_BLOCK, score_block, description, "pair")
        if state.is_main_process:
            rows = _write_output(output, pairs, distinct, parts)
    return {"rows": rows, "pairs": len(distinct), "resumed": resumed}


def _scores_of(teacher: Teacher, keys: np.ndarray, queries: TextStore, documents: TextStore) -> np.ndarray:
    query_rows, document_rows = np.divmod(keys, len(documents))
    query_texts = queries.texts.take(pa.array(query_rows)).to_pylist()
    scores = teacher.score(query_texts, documents.texts.take(pa.array(document_rows)).to_pylist())
    if not np.isfinite(scores).all():
        raise ValueError(f"{teacher.name} gave a score that is not finite; try float32 weights.")
    return scores


def _open(source: str | os.PathLike | datasets.Dataset | Run) -> Path | datasets.Dataset | Run:
    if isinstance(source, Run):
        return source
    if isinstance(source, datasets.Dataset):
        if missing := set(TRIPLE_COLUMNS) - set(source.column_names):
            raise ValueError(f"Triples need the columns {', '.join(TRIPLE_COLUMNS)}, missing {', '.join(missing)}.")
        return source
    path = existing_file(source, "triples")
    return read_run(path) if {".trec", ".run"} & set(path.suffixes) else path


def _columns_of(path: Path) -> dict[str, pa.DataType]:
    """Three columns of ids, or five with scores before them, by the first line that is not blank."""
    width = next((text.count("\t") + 1 for _, text in read_lines(path) if text.strip()), 0)
    return {name: pa.string() for name in (TRIPLE_COLUMNS if width == len(TRIPLE_COLUMNS) else TEACHER_COLUMNS)}


def _find_pairs(folder: Path, pairs: Pairs, teacher: Teacher) -> dict:
    """Write the distinct pairs into a work folder that lacks them; return what the work is made from."""
    keys_path, total = folder / "keys.npy", 0
    digest = xxhash.xxh3_128()
    with keys_path.open("wb") as file:
        for _, keys in pairs.numbered():
            keys.tofile(file)
            total += keys.size
            digest.update(keys.tobytes())
    if total == 0:
        raise ValueError(f"{pairs.name} holds no rows.")
    for store in (pairs.queries, pairs.documents):
        digest.update(store.fingerprint().encode())
    facts = {"teacher": teacher.fingerprint, "pairs": digest.hexdigest(), "pairs_per_block": PAIRS_PER_BLOCK}
    if not (folder / "pairs.npy").is_file():
        distinct = np.memmap(keys_path, dtype=np.int64, mode="r+", shape=(total,))
        distinct.sort()  # in the mapped file
        is_first = np.empty(total, dtype=bool)
        is_first[0], is_first[1:] = True, distinct[1:] != distinct[:-1]
        np.save(folder / "pairs.npy", distinct[is_first])
        del distinct
    keys_path.unlink()
    return facts


def _write_output(output: Path, pairs: Pairs, distinct: np.ndarray, parts: list[Path]) -> int:
    """Look up the scores of every row and write it; returns the rows."""
    scores = np.concatenate([np.load(part)["scores"] for part in parts])
    if isinstance(pairs.source, Run):
        run = Run()
        for columns, keys in pairs.numbered():
            values = scores[np.searchsorted(distinct, keys[:, 0])]
            run |= Run.from_scores(columns[0].to_pylist(), columns[1].to_pylist(), values)
        write_run(run, output)
        return sum(map(len, run.values()))
    rows = 0
    with writing(output, "wb") as file:
        for columns, keys in pairs.numbered():
            values = scores[np.searchsorted(distinct, keys)]  # (rows, n)
            file.writelines(tsv_lines([*(pa.array(column) for column in values.T.copy()), *columns]))
            rows += len(keys)
    return rows
