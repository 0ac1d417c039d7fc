"""Score rows or candidates with a teacher: every distinct pair once, in blocks that survive an interruption."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from ..artifacts import compute_blocks, existing_file, read_blocks, refuse_existing, work_folder
from ..data.passages import passages_of, split_id, to_passages
from ..data.rankings import Ranking, Run, as_run
from ..data.rows import TeacherRows, load_teacher_scores, write_teacher_scores
from ..data.runs import check_run_ids, read_run, write_run
from ..data.tables import write_arrow
from ..data.texts import TextStore
from ..errors import InputError, UnknownIdError
from ..models import Cuts
from ..processes import processes
from .endpoint import Endpoint
from .load import Teacher, load_teacher

# Distinct pairs scored between two saves, which is the most that an interruption loses; the progress bar moves by as
# many. They are sorted by length within a block; a larger block would hardly be faster.
PAIRS_PER_BLOCK = 2_048
ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class _Pairs:
    """Rows, or the candidates of a run as rows, whose (query, document) pairs are to be scored."""

    rows: TeacherRows
    queries: TextStore
    documents: TextStore
    is_run: bool
    by_query: bool = False  # their order, else by document

    def batches(self) -> Iterator[tuple[dict[str, pa.Array], np.ndarray]]:
        """Yield columns of ids, and a number for each pair, which `texts` reads."""
        for start, columns in self.rows.batches(("query_id", "doc_ids"), ROWS_AT_ONCE):
            lengths = pc.list_value_length(columns["doc_ids"]).to_numpy()
            rows = np.arange(len(lengths))
            row_of_pair = np.repeat(rows, lengths)
            query_rows = self._find_texts(self.queries, columns["query_id"], start + rows)
            document_rows = self._find_texts(self.documents, columns["doc_ids"].flatten(), start + row_of_pair)
            sides = document_rows, query_rows[row_of_pair]
            if self.by_query:
                yield columns, sides[1] * len(self.documents) + sides[0]
            else:
                yield columns, sides[0] * len(self.queries) + sides[1]

    def texts(self, numbers: np.ndarray) -> tuple[list[str], list[str]]:
        """Return the texts of the queries and the documents of pairs."""
        if self.by_query:
            query_rows, document_rows = np.divmod(numbers, len(self.documents))
        else:
            document_rows, query_rows = np.divmod(numbers, len(self.queries))
        return self.queries.take(query_rows), self.documents.take(document_rows)

    def _find_texts(self, store: TextStore, ids: pa.Array, row_numbers: np.ndarray) -> np.ndarray:
        """Return the rows of texts in a store, given ids and the numbers of the rows that have them."""
        found = store.rows_of_array(ids)
        missing = np.flatnonzero(found < 0)
        if len(missing):
            row = int(row_numbers[missing[0]])
            where = self.rows.row_name(row)
            if self.is_run:
                where = f"{self.rows.source} query {self.rows[row]['query_id']!r}"
            raise UnknownIdError(
                f"{where}: id {str(ids[missing[0]])!r} is not among the {len(store):,} texts of {store.source} "
                f"({len(missing):,} of the {len(ids):,} ids looked up are not)."
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

    In a collection of passages, all passages of each document are scored: rows have the best passage of each document
    in its place, with its score, and a run has all passages.

    Pairs are scored in the order of their documents, so that a teacher that encodes the sides separately encodes a
    document once; for an endpoint in the order of their queries. Under `accelerate launch` the processes share the
    blocks; all must make the same call.

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
        Counts: `rows` written, distinct `pairs`, how many of them were `resumed`, the shares of `Cuts.shares` where
        the teacher counts them, and the `usage` of an endpoint.

    Raises:
        FileNotFoundError: if the source does not exist.
        FileExistsError: if the output exists and `overwrite` is False.
        UnknownIdError: naming file, line and id, if an id has no text.
        InputError: if there is a work folder of other inputs, a score is not finite, or the output cannot hold the
            rows.

    Example:
        >>> queries, documents = kd.TextStore.from_tsv("queries.tsv"), kd.TextStore.from_tsv("collection.tsv")
        >>> counts = kd.score_teacher("BAAI/bge-reranker-base", "triples.tsv", queries, documents, "scored.tsv")
        >>> counts["rows"], counts["pairs"]
        (40, 80)
    """
    state, output = processes(), Path(output)
    refuse_existing(output, overwrite)
    if isinstance(teacher, str):
        teacher = load_teacher(teacher, device=state.device)
    with state.main_process_first():  # one process builds the table, the others open it
        rows, is_run = _open_source(source, documents)
    pairs = _Pairs(rows, queries, documents, is_run, teacher.reads_by_query)

    def score_block(block: slice) -> dict[str, np.ndarray]:
        before = Cuts() if teacher.processor is None else Cuts(teacher.processor.cuts)
        scores = teacher.score(*pairs.texts(distinct[block]))
        if not np.isfinite(scores).all():
            raise InputError(f"{teacher.name} gave a score that is not finite; try float32 weights.")
        if teacher.processor is None:
            return {"scores": scores}
        return {"scores": scores, "cuts": teacher.processor.cuts.since(before)}

    count, cuts = 0, {}
    with work_folder(output, lambda folder: _find_distinct(folder, pairs, teacher, output)) as folder:
        distinct = np.load(folder / "pairs.npy", mmap_mode="r")
        description = f"Scoring with {teacher.name}"
        parts, resumed = compute_blocks(folder, len(distinct), PAIRS_PER_BLOCK, score_block, description, "pair")
        if state.is_main_process:
            scores = np.concatenate(read_blocks(parts, "scores"))
            if teacher.processor is not None:
                longest = teacher.processor.max_document_length
                cuts = Cuts.total(read_blocks(parts, "cuts")).shares(longest)
            count = _write_output(output, pairs, distinct, scores, folder)
    return {"rows": count, "pairs": len(distinct), "resumed": resumed, **cuts, **teacher.usage}


def plan_requests(
    endpoint: Endpoint,
    source: str | os.PathLike | datasets.Dataset | TeacherRows | Run,
    queries: TextStore,
    documents: TextStore,
) -> dict[str, int]:
    """Estimate what `score_teacher` asks of an endpoint, without asking: distinct `pairs`, `requests` and `tokens`.

    Tokens are a quarter of the characters of all pairs, and of their prompts for a chat model. Arguments and errors as
    `score_teacher`.
    """
    rows, is_run = _open_source(source, documents)
    all_pairs = _Pairs(rows, queries, documents, is_run, by_query=True)
    keys = [of_batch for _, of_batch in all_pairs.batches()]
    distinct = np.unique(np.concatenate(keys))
    requests = tokens = 0
    for start in range(0, len(distinct), PAIRS_PER_BLOCK):
        of_block = endpoint.requests(*all_pairs.texts(distinct[start : start + PAIRS_PER_BLOCK]))
        requests += len(of_block)
        for pairs in of_block:
            for query, document in pairs:
                tokens += endpoint.tokens(query, document)
    return {"pairs": len(distinct), "requests": requests, "tokens": tokens}


def _open_source(
    source: str | os.PathLike | datasets.Dataset | TeacherRows | Run, documents: TextStore
) -> tuple[TeacherRows, bool]:
    """Return the rows, of passages if the documents are split, and whether they are the candidates of a run."""
    name = "the run"
    if isinstance(source, str | os.PathLike):
        path = existing_file(source, "triples")
        if {".trec", ".run"} & set(path.suffixes):
            source, name = read_run(path), str(path)
    if not isinstance(source, Mapping):
        rows = load_teacher_scores(source)
        return (rows if documents.aggregation is None else _of_passages(rows, documents)), False
    source, lists = as_run(source), []
    if documents.aggregation is not None:
        source = to_passages(source, documents, f"texts of {documents.source}")
    check_run_ids(source, "queries")
    for ranking in source.values():
        lists.append(pa.array([doc_id for doc_id, _ in ranking], pa.string()))
    offsets = np.cumsum([0, *map(len, lists)])
    documents = pa.concat_arrays([pa.array([], pa.string()), *lists])
    check_run_ids(documents, "documents")
    doc_ids = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), documents)
    ids = {"query_id": pa.array(list(source), pa.string()), "doc_ids": doc_ids}
    return TeacherRows(datasets.Dataset(pa.table(ids)), name), True


def _of_passages(rows: TeacherRows, documents: TextStore) -> TeacherRows:
    """Return rows with all passages of each document in its place."""
    columns: dict[str, list] = {"query_id": [], "doc_ids": []}
    for _, batch in rows.batches(("query_id", "doc_ids"), ROWS_AT_ONCE):
        found = passages_of(documents, batch["doc_ids"].flatten().to_pylist(), f"texts of {documents.source}")
        columns["query_id"] += batch["query_id"].to_pylist()
        for doc_ids in batch["doc_ids"].to_pylist():
            columns["doc_ids"].append(list(chain.from_iterable(found[str(doc_id)] for doc_id in doc_ids)))
    return TeacherRows(datasets.Dataset.from_dict(columns), rows.source)


def _find_distinct(folder: Path, pairs: _Pairs, teacher: Teacher, output: Path) -> dict[str, str | int]:
    """Write the distinct pairs into a work folder that lacks them, and return the inputs of the work."""
    # The rows of passages are shorter when they are written.
    takes_lists = pairs.is_run or output.suffix in (".jsonl", ".parquet") or pairs.documents.aggregation is not None
    keys_path = folder / "keys.npy"
    digest = xxhash.xxh3_128()
    with keys_path.open("wb") as file:
        for columns, keys in pairs.batches():
            if not takes_lists and not pc.all(pc.equal(pc.list_value_length(columns["doc_ids"]), 2)).as_py():
                raise InputError(f"{output}: rows of more than two documents do not fit into TSV; give a .jsonl file.")
            keys.tofile(file)
            digest.update(keys.tobytes())
    if keys_path.stat().st_size == 0:
        raise InputError(f"{pairs.rows.source} holds no rows.")
    for store in (pairs.queries, pairs.documents):
        digest.update(store.fingerprint().encode())
    if not (folder / "pairs.npy").is_file():
        distinct = np.memmap(keys_path, dtype=np.int64, mode="r+")
        distinct.sort()  # in the mapped file
        np.save(folder / "pairs.npy", distinct[np.append(True, distinct[1:] != distinct[:-1])])
        del distinct
    keys_path.unlink()
    return {"teacher": teacher.fingerprint, "pairs": digest.hexdigest(), "pairs_per_block": PAIRS_PER_BLOCK}


def _write_output(output: Path, pairs: _Pairs, distinct: np.ndarray, scores: np.ndarray, folder: Path) -> int:
    """Look up the score of every pair, write the output, and return how many rows it has."""

    def scored_batches() -> Iterator[pa.RecordBatch]:
        for columns, keys in pairs.batches():
            values = pa.array(scores[np.searchsorted(distinct, keys)], pa.float32())
            lengths = pc.list_value_length(columns["doc_ids"]).to_numpy()
            offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
            columns["teacher_scores"] = pa.ListArray.from_arrays(pa.array(offsets), values)
            if pairs.documents.aggregation is not None and not pairs.is_run:
                columns = _best_passages(columns)
            yield pa.RecordBatch.from_pydict(columns)

    table_path = folder / "scored.arrow"
    write_arrow(table_path, scored_batches(), pairs.rows.source)
    rows = TeacherRows(datasets.Dataset.from_file(str(table_path)), pairs.rows.source)
    if not pairs.is_run:
        write_teacher_scores(rows, output)
        return len(rows)
    return write_run(_rankings(rows), output)


def _best_passages(columns: dict[str, pa.Array]) -> dict[str, pa.Array]:
    """Return rows of passages with the best one of each document only."""
    doc_ids, scores = [], []
    for passages, values in zip(columns["doc_ids"].to_pylist(), columns["teacher_scores"].to_pylist(), strict=True):
        best: dict[str, tuple[str, float]] = {}
        for passage_id, score in zip(passages, values, strict=True):
            doc_id, _ = split_id(passage_id)
            if doc_id not in best or score > best[doc_id][1]:
                best[doc_id] = (passage_id, score)
        doc_ids.append([passage_id for passage_id, _ in best.values()])
        scores.append([score for _, score in best.values()])
    lists = {"doc_ids": pa.array(doc_ids), "teacher_scores": pa.array(scores, pa.list_(pa.float32()))}
    return {"query_id": columns["query_id"], **lists}


def _rankings(rows: TeacherRows) -> Iterator[tuple[str, Ranking]]:
    """Yield query ids and their documents in the order of the scores; ties keep the order of the rows."""
    for _, columns in rows.batches(size=ROWS_AT_ONCE):
        for query_id, doc_ids, scores in zip(*columns.values(), strict=True):
            order = np.argsort(-scores.values.to_numpy(), kind="stable")
            yield query_id.as_py(), Ranking(doc_ids.values.take(pa.array(order)), scores.values.to_numpy()[order])
