"""Score rows or candidates with a teacher: every distinct pair once, in blocks that survive an interruption."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from ..artifacts import compute_blocks, existing_file, refuse_existing, work_folder
from ..data.rows import TeacherRows, load_teacher_scores, write_teacher_scores
from ..data.runs import Run, read_run, write_run
from ..data.tables import write_arrow
from ..data.texts import TextStore
from ..processes import processes
from .load import Teacher, load_teacher

# Distinct pairs scored between two saves, which is the most that an interruption loses; the progress bar moves by as
# many. They are sorted by length within a block; a larger block would hardly be faster.
PAIRS_PER_BLOCK = 2_048
ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Pairs:
    """Rows whose (query, document) pairs are to be scored.

    Args:
        rows: the rows; their scores are not read.
        queries: query_id -> text.
        documents: doc_id -> text.
        is_run: True if the rows are the candidates of a run.
    """

    rows: TeacherRows
    queries: TextStore
    documents: TextStore
    is_run: bool

    def batches(self) -> Iterator[tuple[dict[str, pa.Array], np.ndarray]]:
        """Yield columns of ids, and a number for each pair: query row * number of documents + document row.

        The numbers are int64, (pairs,), one list of documents after another.

        Raises:
            KeyError: naming file, line and id of the first one that has no text.
        """
        for start, columns in self.rows.batches(("query_id", "doc_ids"), ROWS_AT_ONCE):
            lengths = pc.list_value_length(columns["doc_ids"]).to_numpy()
            query_rows = self._find_texts(self.queries, columns["query_id"], np.arange(start, start + len(lengths)))
            row_numbers = np.repeat(np.arange(start, start + len(lengths)), lengths)
            document_rows = self._find_texts(self.documents, columns["doc_ids"].flatten(), row_numbers)
            yield columns, np.repeat(query_rows, lengths) * len(self.documents) + document_rows

    def _find_texts(self, store: TextStore, ids: pa.Array, row_numbers: np.ndarray) -> np.ndarray:
        """Return the rows of texts in a store, given ids and the numbers of the rows that have them."""
        found = store.rows_of_array(ids)
        is_missing = found < 0
        if is_missing.any():
            first = int(np.argmax(is_missing))
            row = int(row_numbers[first])
            where = self.rows.row_name(row)
            if self.is_run:
                where = f"{self.rows.source} query {self.rows[row]['query_id']!r}"
            raise KeyError(
                f"{where}: id {str(ids[first])!r} is not among the {len(store):,} texts of {store.source} "
                f"({is_missing.sum():,} of the {len(ids):,} ids looked up are not)."
            )
        return found


def score_teacher(
    teacher: Teacher | str,
    source: str | os.PathLike | datasets.Dataset | TeacherRows | Run,
    queries: TextStore,
    documents: TextStore,
    output: str | os.PathLike,
    overwrite: bool = False,
) -> dict[str, int]:
    """Score pairs and write teacher rows, or for a run the run in the teacher's order.

    Under `accelerate launch` the processes share the blocks; all must make the same call.

    Args:
        teacher: see `load_teacher`; a string is loaded.
        source: rows that `load_teacher_scores` accepts, whose scores are ignored: triples or pairs in TSV, lists in
            JSON lines, a data set; see `sample_triples`. Or candidates: a `.trec` or `.run` file, or a `Run`.
        queries: query_id -> text.
        documents: doc_id -> text.
        output: for rows the same rows with scores: five-column TSV for rows of two documents, `.jsonl` or `.parquet`
            for lists. For a run a TREC run. Appears when it is complete.
        overwrite: True replaces an existing output.

    Returns:
        Counts: `rows` written, distinct `pairs`, and how many of them were `resumed`.

    Raises:
        FileNotFoundError: if the source does not exist.
        FileExistsError: if the output exists and `overwrite` is False.
        KeyError: naming file, line and id, if an id has no text.
        ValueError: if there is a work folder of other inputs, a score is not finite, or the output cannot hold the
            rows.
    """
    state, output = processes(), Path(output)
    refuse_existing(output, overwrite)
    if isinstance(teacher, str):
        teacher = load_teacher(teacher, device=state.device)
    with state.main_process_first():  # one process builds the table, the others open it
        rows, is_run = _open_source(source)
    pairs = Pairs(rows, queries, documents, is_run)

    def prepare(folder: Path) -> dict[str, str | int]:
        return _find_distinct(folder, pairs, teacher, output)

    def score_block(block: slice) -> dict[str, np.ndarray]:
        return {"scores": _score_pairs(teacher, np.asarray(distinct[block]), queries, documents)}

    count = 0
    with work_folder(output, prepare) as folder:
        distinct = np.load(folder / "pairs.npy", mmap_mode="r")
        description = f"Scoring with {teacher.name}"
        parts, resumed = compute_blocks(folder, len(distinct), PAIRS_PER_BLOCK, score_block, description, "pair")
        if state.is_main_process:
            count = _write_output(output, pairs, distinct, parts, folder)
    return {"rows": count, "pairs": len(distinct), "resumed": resumed}


def _open_source(source: str | os.PathLike | datasets.Dataset | TeacherRows | Run) -> tuple[TeacherRows, bool]:
    """Return the rows, and whether they are the candidates of a run."""
    name = "the run"
    if isinstance(source, str | os.PathLike):
        path = existing_file(source, "triples")
        if {".trec", ".run"} & set(path.suffixes):
            source, name = read_run(path), str(path)
    if not isinstance(source, Run):
        return load_teacher_scores(source), False
    lists = []
    for ranking in source.values():
        lists.append([doc_id for doc_id, _ in ranking])
    ids = {"query_id": pa.array(list(source), pa.string()), "doc_ids": pa.array(lists, pa.list_(pa.string()))}
    return TeacherRows(datasets.Dataset(pa.table(ids)), name), True


def _score_pairs(teacher: Teacher, keys: np.ndarray, queries: TextStore, documents: TextStore) -> np.ndarray:
    query_rows, document_rows = np.divmod(keys, len(documents))
    query_texts = queries.texts.take(pa.array(query_rows)).to_pylist()
    scores = teacher.score(query_texts, documents.texts.take(pa.array(document_rows)).to_pylist())
    if not np.isfinite(scores).all():
        raise ValueError(f"{teacher.name} gave a score that is not finite; try float32 weights.")
    return scores


def _find_distinct(folder: Path, pairs: Pairs, teacher: Teacher, output: Path) -> dict[str, str | int]:
    """Write the distinct pairs into a work folder that lacks them, and return the inputs of the work."""
    takes_lists = pairs.is_run or output.suffix in (".jsonl", ".parquet")
    keys_path, total = folder / "keys.npy", 0
    digest = xxhash.xxh3_128()
    with keys_path.open("wb") as file:
        for columns, keys in pairs.batches():
            if not takes_lists and not pc.all(pc.equal(pc.list_value_length(columns["doc_ids"]), 2)).as_py():
                raise ValueError(f"{output}: rows of more than two documents do not fit into TSV; give a .jsonl file.")
            keys.tofile(file)
            total += len(keys)
            digest.update(keys.tobytes())
    if total == 0:
        raise ValueError(f"{pairs.rows.source} holds no rows.")
    for store in (pairs.queries, pairs.documents):
        digest.update(store.fingerprint().encode())
    if not (folder / "pairs.npy").is_file():
        distinct = np.memmap(keys_path, dtype=np.int64, mode="r+", shape=(total,))
        distinct.sort()  # in the mapped file
        is_first = np.ones(total, dtype=bool)
        is_first[1:] = distinct[1:] != distinct[:-1]
        np.save(folder / "pairs.npy", distinct[is_first])
        del distinct
    keys_path.unlink()
    return {"teacher": teacher.fingerprint, "pairs": digest.hexdigest(), "pairs_per_block": PAIRS_PER_BLOCK}


def _write_output(output: Path, pairs: Pairs, distinct: np.ndarray, parts: list[Path], folder: Path) -> int:
    """Look up the score of every pair, write the output, and return how many rows it has."""
    scores = np.concatenate([np.load(part)["scores"] for part in parts])

    def scored_batches() -> Iterator[pa.RecordBatch]:
        for columns, keys in pairs.batches():
            values = pa.array(scores[np.searchsorted(distinct, keys)], pa.float32())
            lengths = pc.list_value_length(columns["doc_ids"]).to_numpy()
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            lists = pa.ListArray.from_arrays(pa.array(offsets), values)
            yield pa.RecordBatch.from_pydict({**columns, "teacher_scores": lists})

    if pairs.is_run:
        return _write_run(output, scored_batches())
    table_path = folder / "scored.arrow"
    write_arrow(table_path, scored_batches(), pairs.rows.source)
    rows = TeacherRows(datasets.Dataset.from_file(str(table_path)), pairs.rows.source)
    write_teacher_scores(rows, output)
    return len(rows)


def _write_run(output: Path, batches: Iterator[pa.RecordBatch]) -> int:
    run, count = Run(), 0
    for batch in batches:
        for row in batch.to_pylist():
            doc_ids = row["doc_ids"]
            run |= Run.from_scores([row["query_id"]] * len(doc_ids), doc_ids, row["teacher_scores"])
            count += len(doc_ids)
    write_run(run, output)
    return count
