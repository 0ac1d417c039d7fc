"""Texts by id, from disk: ids travel through training, texts are looked up in the dataloader workers.

A store is a folder: `texts.arrow` (ids and texts, memory-mapped), `keys.npy` and `rows.npy` (a sorted index over the
ids, memory-mapped) and `store.json`. It pickles to its path, so forked and spawned workers share the mapped pages.
"""

import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import xxhash

from .formats import (
    building,
    cache_folder,
    existing_file,
    is_integer_ids,
    is_plain_integer,
    read_jsonl,
    read_tsv,
    write_arrow,
)

Id = int | str
_ID_KEYS = ("_id", "id", "doc_id", "query_id", "docid", "pid", "qid")


class TextStore:
    """A collection or a set of queries: `store[ids]` gives their texts.

    Make one with `from_tsv`, `from_jsonl`, `from_dataset`, or `open`. Ids are integers where all of them are plain
    integers (`str(int(x)) == x`), else strings; look-ups take either spelling.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        description = existing_file(self.folder / "store.json", "text store's description")
        facts = json.loads(description.read_text())
        self.has_integer_ids: bool = facts["has_integer_ids"]
        self.source: str = facts["source"]  # the file the store was built from, for messages
        self._table = datasets.Dataset.from_file(str(self.folder / "texts.arrow"))
        has_index = (self.folder / "keys.npy").is_file()  # none where id = row
        self._keys = np.load(self.folder / "keys.npy", mmap_mode="r") if has_index else None
        self._rows = np.load(self.folder / "rows.npy", mmap_mode="r") if has_index else None

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "TextStore":
        """Open a store that was built before.

        Raises:
            FileNotFoundError: if the folder is none.
        """
        return cls(folder)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "TextStore":
        """Open a store's folder, or build from a `.jsonl` or TSV file, by what the path is."""
        if Path(path).is_dir():
            return cls.open(path)
        return cls.from_jsonl(path) if Path(path).suffix == ".jsonl" else cls.from_tsv(path)

    @classmethod
    def from_tsv(cls, path: str | os.PathLike, folder: str | os.PathLike | None = None) -> "TextStore":
        """Build from lines of `id<TAB>text` without header (MS MARCO's collection and queries), once.

        Args:
            path: the file.
            folder: where the store is kept; None is a folder in the cache of `datasets` that depends on the file's
                path, size and modification time.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: with file and line, for a wrong number of columns or bad UTF-8; for an id that stands twice
                with different texts; for an empty file.
        """
        path = existing_file(path, "text")
        columns = {"id": pa.string(), "text": pa.string()}
        return cls._build(path, folder, lambda: read_tsv(path, columns))

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike, folder: str | os.PathLike | None = None) -> "TextStore":
        """Build from JSON lines with an id (`_id`, `id`, `doc_id`, `query_id`), `text`, and optionally `title` (BEIR).

        A title is put before its text, with a blank between. Arguments and errors as `from_tsv`.
        """
        path = existing_file(path, "text")
        return cls._build(path, folder, lambda: _read_json_texts(path))

    @classmethod
    def from_dataset(
        cls,
        dataset: datasets.Dataset,
        folder: str | os.PathLike,
        id_column: str = "id",
        text_column: str = "text",
    ) -> "TextStore":
        """Build from two columns of a data set.

        Raises:
            ValueError: if a column is missing, or an id stands twice with different texts.
        """
        if missing := {id_column, text_column} - set(dataset.column_names):
            raise ValueError(
                f"The data set has the columns {', '.join(dataset.column_names)}, not {', '.join(sorted(missing))}; "
                "name them by id_column and text_column."
            )

        def batches() -> Iterator[pa.RecordBatch]:
            for rows in dataset.select_columns([id_column, text_column]).iter(10_000):
                yield _batch([str(i) for i in rows[id_column]], rows[text_column])

        return cls._build(None, folder, batches)

    @classmethod
    def _build(cls, path: Path | None, folder: str | os.PathLike | None, batches) -> "TextStore":
        folder = cache_folder(path, "texts", None) if folder is None else Path(folder)
        if not (folder / "store.json").is_file():
            if folder.is_dir() and any(folder.iterdir()):
                raise FileExistsError(
                    f"{folder} holds something that is no text store; give an empty or a new folder."
                )
            with building(folder) as temporary:
                _write_store(temporary, batches(), str(path or "the data set"))
        return cls(folder)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, ids: Id | Sequence[Id]) -> str | list[str]:
        """Texts of several ids, or of one.

        Raises:
            KeyError: naming the first missing ids and their count.
        """
        if isinstance(ids, (int, str, np.integer)):
            return self[[ids]][0]
        rows = self.rows_of(ids)
        if (rows < 0).any():
            missing = [ids[i] for i in np.flatnonzero(rows < 0)]
            raise KeyError(
                f"{len(missing)} of {len(ids)} ids are not among the {len(self):,} texts of {self.source}: "
                f"{', '.join(repr(str(i)) for i in missing[:3])}; do the files belong to one release?"
            )
        return self._table[rows.tolist()]["text"]

    def __contains__(self, id_: Id) -> bool:
        return bool(self.rows_of([id_])[0] >= 0)

    def ids(self) -> Iterator[str]:
        """All ids as strings, in the order of the source."""
        for rows in self._table.select_columns(["id"]).iter(10_000):
            yield from (str(i) for i in rows["id"])

    def items(self) -> Iterator[tuple[str, str]]:
        """All (id, text) pairs, ids as strings, in the order of the source."""
        for rows in self._table.iter(10_000):
            yield from zip((str(i) for i in rows["id"]), rows["text"], strict=True)

    def rows_of(self, ids: Sequence[Id] | np.ndarray) -> np.ndarray:
        """Row of each id of a flat sequence, -1 where the store does not have it; int64."""
        if len(ids) == 0:
            return np.empty(0, dtype=np.int64)
        keys = self._keys_of(ids)
        if self._keys is None:
            return np.where((keys >= 0) & (keys < len(self)), keys, -1)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        rows = np.where(self._keys[places] == keys, self._rows[places], -1).astype(np.int64)
        if not self.has_integer_ids:  # the key is a hash: an id that is not here may share it
            found = np.flatnonzero(rows >= 0)
            stored = self._table.select_columns(["id"])[rows[found].tolist()]["id"]
            rows[[i for i, name in zip(found, stored, strict=True) if name != str(ids[i])]] = -1
        return rows

    def _keys_of(self, ids: Sequence[Id] | np.ndarray) -> np.ndarray:
        if not self.has_integer_ids:
            return _hashes(str(i) for i in ids)
        array = np.asarray(ids)
        if array.dtype.kind in "iu":
            return array.astype(np.int64)
        # A string that is no plain integer is no id here; -1 could be one, the smallest integer cannot.
        nowhere = np.iinfo(np.int64).min
        return np.asarray([int(i) if is_plain_integer(str(i)) else nowhere for i in ids], dtype=np.int64)

    def __reduce__(self) -> tuple:
        return (type(self), (str(self.folder),))


def _read_json_texts(path: Path) -> Iterator[pa.RecordBatch]:
    rows = read_jsonl(path)
    while chunk := list(islice(rows, 10_000)):
        pairs = [_json_text(path, line, row) for line, row in chunk]
        yield _batch([i for i, _ in pairs], [text for _, text in pairs])


def _json_text(path: Path, line: int, row: dict) -> tuple[str, str]:
    key = next((key for key in _ID_KEYS if key in row), None)
    if key is None or not isinstance(row.get("text"), str):
        raise ValueError(
            f"{path} line {line}: needed an id ({', '.join(_ID_KEYS[:4])}) and a string 'text', got the keys "
            f"{', '.join(row)}."
        )
    return str(row[key]), f"{row.get('title') or ''} {row['text']}".strip() if "title" in row else row["text"]


def _batch(ids: list[str], texts: list[str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"id": pa.array(ids, pa.string()), "text": pa.array(texts, pa.string())})


def _write_store(folder: Path, batches: Iterator[pa.RecordBatch], source: str) -> None:
    ids: list[pa.Array] = []

    def remember() -> Iterator[pa.RecordBatch]:
        for batch in batches:
            ids.append(batch["id"])
            yield batch

    write_arrow(folder / "texts.arrow", remember(), source)
    has_integer_ids = all(is_integer_ids(column) for column in ids)
    if has_integer_ids:
        keys = np.concatenate([column.cast(pa.int64()).to_numpy() for column in ids])
    else:
        keys = _hashes(i for column in ids for i in column.to_pylist())
    if not has_integer_ids or not np.array_equal(keys, np.arange(len(keys))):
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.ones(len(keys), dtype=bool)
        first[1:] = keys[1:] != keys[:-1]
        _check_repeated(folder, keys, order, first, source)
        np.save(folder / "keys.npy", keys[first])
        np.save(folder / "rows.npy", order[first])
    (folder / "store.json").write_text(json.dumps({"has_integer_ids": has_integer_ids, "source": source}))


def _check_repeated(folder: Path, keys: np.ndarray, order: np.ndarray, first: np.ndarray, source: str) -> None:
    """An id may stand twice with one text (the first row serves), not with two."""
    table = datasets.Dataset.from_file(str(folder / "texts.arrow"))
    for place in np.flatnonzero(~first):
        earlier, later = table[int(order[place - 1])], table[int(order[place])]
        if earlier["id"] != later["id"]:
            raise ValueError(
                f"{source}: the ids {earlier['id']!r} and {later['id']!r} share a 64-bit hash; rename one."
            )
        if earlier["text"] != later["text"]:
            raise ValueError(
                f"{source}: id {later['id']!r} stands twice with different texts, in rows {order[place - 1] + 1} and "
                f"{order[place] + 1}; an id must name one text."
            )


def _hashes(ids: Iterator[str]) -> np.ndarray:
    return np.fromiter((xxhash.xxh3_64_intdigest(i.encode()) for i in ids), dtype=np.uint64)
