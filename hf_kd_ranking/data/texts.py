"""Texts by id, from disk: ids travel through training, texts are looked up in the dataloader workers.

A store is a folder: the texts and the ids in the order of their source, a sorted index over the ids (`keys.npy`,
`rows.npy`), all memory-mapped, and `store.json`. It pickles to its path, so forked and spawned workers share the
mapped pages.
"""

import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
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
    plain_integers,
    read_jsonl,
    read_tsv,
)
from .strings import open_strings, write_strings

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
        self.texts = open_strings(self.folder / "texts")
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
        return cls.from_jsonl(path) if ".jsonl" in Path(path).suffixes else cls.from_tsv(path)

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
        folder = cache_folder(path, "store", None) if folder is None else Path(folder)
        if not (folder / "store.json").is_file():
            if folder.is_dir() and any(folder.iterdir()):
                raise FileExistsError(
                    f"{folder} holds something that is no text store; give an empty or a new folder."
                )
            with building(folder) as temporary:
                _write_store(temporary, batches(), str(path or "the data set"))
        return cls(folder)

    def __len__(self) -> int:
        return len(self.texts)

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
        return self.texts.take(pa.array(rows)).to_pylist()

    def __contains__(self, id_: Id) -> bool:
        return bool(self.rows_of([id_])[0] >= 0)

    def ids(self) -> Iterator[str]:
        """All ids as strings, in the order of the source."""
        for start in range(0, len(self), 10_000):
            yield from self.ids_of(np.arange(start, min(start + 10_000, len(self))))

    def items(self) -> Iterator[tuple[str, str]]:
        """All (id, text) pairs, ids as strings, in the order of the source."""
        for start in range(0, len(self), 10_000):
            rows = np.arange(start, min(start + 10_000, len(self)))
            yield from zip(self.ids_of(rows), self.texts.take(pa.array(rows)).to_pylist(), strict=True)

    def ids_of(self, rows: np.ndarray) -> list[str]:
        """The ids of some rows, as strings."""
        if not self.has_integer_ids:
            return self._string_ids.take(pa.array(rows)).to_pylist()
        return [str(i) for i in (rows if self._keys is None else self._integer_ids[rows]).tolist()]

    @cached_property
    def _string_ids(self) -> pa.LargeStringArray:
        return open_strings(self.folder / "ids")

    @cached_property
    def _integer_ids(self) -> np.ndarray:
        return np.load(self.folder / "ids.npy", mmap_mode="r")

    def fingerprint(self) -> str:
        """A short name of the content: other texts or other ids give another one."""
        digest = xxhash.xxh3_128()
        for path in sorted([*self.folder.glob("*.bin"), *self.folder.glob("*.npy")]):
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()

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
            stored = self.ids_of(rows[found])
            rows[[i for i, name in zip(found, stored, strict=True) if name != str(ids[i])]] = -1
        return rows

    def rows_of_strings(self, ids: pa.Array) -> np.ndarray:
        """`rows_of` an Arrow array of strings, without Python strings where ids are integers."""
        integers = plain_integers(ids) if self.has_integer_ids else None
        return self.rows_of(ids.to_pylist() if integers is None else integers)

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

    def texts() -> Iterator[pa.Array]:
        for batch in batches:
            ids.append(batch["id"])
            yield batch["text"]

    if write_strings(folder / "texts", texts()) == 0:
        raise ValueError(f"{source} holds no rows.")
    has_integer_ids = all(is_integer_ids(column) for column in ids)
    if has_integer_ids:
        keys = np.concatenate([column.cast(pa.int64()).to_numpy() for column in ids])
    else:
        keys = _hashes(i for column in ids for i in column.to_pylist())
    if not has_integer_ids or not np.array_equal(keys, np.arange(len(keys))):
        if has_integer_ids:
            np.save(folder / "ids.npy", keys)
        else:
            write_strings(folder / "ids", iter(ids))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.ones(len(keys), dtype=bool)
        first[1:] = keys[1:] != keys[:-1]
        np.save(folder / "keys.npy", keys[first])
        np.save(folder / "rows.npy", order[first])
        _write_facts(folder, has_integer_ids, source)
        _check_repeated(TextStore(folder), order, first)
    _write_facts(folder, has_integer_ids, source)


def _write_facts(folder: Path, has_integer_ids: bool, source: str) -> None:
    (folder / "store.json").write_text(json.dumps({"has_integer_ids": has_integer_ids, "source": source}))


def _check_repeated(store: TextStore, order: np.ndarray, first: np.ndarray) -> None:
    """An id may stand twice with one text (the first row serves), not with two."""
    for place in np.flatnonzero(~first):
        rows = order[place - 1 : place + 1]
        earlier, later = store.ids_of(rows)
        if earlier != later:
            raise ValueError(f"{store.source}: the ids {earlier!r} and {later!r} share a 64-bit hash; rename one.")
        if store.texts[int(rows[0])] != store.texts[int(rows[1])]:
            raise ValueError(
                f"{store.source}: id {later!r} stands twice with different texts, in rows {rows[0] + 1} and "
                f"{rows[1] + 1}; an id must name one text."
            )


def _hashes(ids: Iterator[str]) -> np.ndarray:
    return np.fromiter((xxhash.xxh3_64_intdigest(i.encode()) for i in ids), dtype=np.uint64)
