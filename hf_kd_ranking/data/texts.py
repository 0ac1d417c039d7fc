"""Texts by id, on disk: ids travel through training, texts are looked up in the dataloader workers.

A store is a folder: texts and ids in the order of their source, a sorted index over the ids (`keys.npy`, `rows.npy`),
all memory-mapped, and `store.json`. It pickles to its path, so forked and spawned workers share the mapped pages.
"""

import hashlib
import json
import os
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import xxhash

from ..artifacts import building, cache_folder, existing_file, write_json
from ..errors import InputError
from .ids import ROWS_AT_ONCE, Id, IdIndex, open_ids, open_strings, take_strings, write_strings
from .tables import read_jsonl, read_tsv

_ID_KEYS = ("_id", "id", "doc_id", "query_id", "docid", "pid", "qid")


def normalized(text: str) -> str:
    """Return a text in composed Unicode (NFC), case-folded, with single blanks: equal for copies of a text."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


class TextStore(IdIndex):
    """A collection or a set of queries: `store[ids]` returns their texts.

    Make one with `from_tsv`, `from_jsonl`, `from_dataset`, or `open`. Ids are integers where all of them are plain
    integers (`str(int(x)) == x`), else strings; look-ups take either spelling.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        path = existing_file(self.folder / "store.json", "text store's description")
        description = json.loads(path.read_text(encoding="utf-8"))
        self.source: str = description["source"]  # the file the store was built from, for messages
        self.texts = open_strings(self.folder / "texts")
        super().__init__(len(self.texts), *open_ids(self.folder))

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "TextStore":
        """Open a store that was built before, or raise FileNotFoundError."""
        return cls(folder)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "TextStore":
        """Open the folder of a store, or build one from a `.jsonl` or TSV file."""
        if Path(path).is_dir():
            return cls.open(path)
        return cls.from_jsonl(path) if ".jsonl" in Path(path).suffixes else cls.from_tsv(path)

    @classmethod
    def from_tsv(cls, path: str | os.PathLike, folder: str | os.PathLike | None = None) -> "TextStore":
        """Build from lines of `id<TAB>text` without header (MS MARCO's collection and queries), once.

        The folder of the store is, if none is given, one in the cache of `datasets` that depends on the file's path,
        size and modification time.

        Raises:
            FileNotFoundError: if the file does not exist.
            InputError: with file and line, for a wrong number of columns or bad UTF-8; for an id that appears twice
                with different texts; for an empty file.
        """
        path = existing_file(path, "text")
        return cls._build(path, folder, read_tsv(path, {"id": pa.string(), "text": pa.string()}))

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike, folder: str | os.PathLike | None = None) -> "TextStore":
        """Build from JSON lines with an id (`_id`, `id`, `doc_id`, `query_id`), `text`, and optionally `title` (BEIR).

        A title is put before its text, with a blank between. Folder and errors are those of `from_tsv`.
        """
        path = existing_file(path, "text")
        return cls._build(path, folder, _read_json_texts(path))

    @classmethod
    def from_dataset(
        cls, dataset: datasets.Dataset, folder: str | os.PathLike, id_column: str = "id", text_column: str = "text"
    ) -> "TextStore":
        """Build from two columns of a data set.

        Raises:
            InputError: if a column is missing, or an id appears twice with different texts.
        """
        missing = {id_column, text_column} - set(dataset.column_names)
        if missing:
            raise InputError(
                f"The data set has the columns {', '.join(dataset.column_names)}, not {', '.join(sorted(missing))}; "
                "name them by id_column and text_column."
            )
        rows = dataset.select_columns([id_column, text_column]).iter(ROWS_AT_ONCE)
        return cls._build(None, folder, (_batch(map(str, part[id_column]), part[text_column]) for part in rows))

    @classmethod
    def _build(
        cls, path: Path | None, folder: str | os.PathLike | None, batches: Iterator[pa.RecordBatch]
    ) -> "TextStore":
        folder = cache_folder(path, "store") if folder is None else Path(folder)
        if not (folder / "store.json").is_file():
            if folder.is_dir() and any(folder.iterdir()):
                raise FileExistsError(f"{folder} holds something that is not a text store; give an empty folder.")
            with building(folder) as temporary:
                _write_store(temporary, batches, str(path or "the data set"))
        return cls(folder)

    def save(self, folder: str | os.PathLike) -> None:
        """Copy the store into a new folder, which names the source without its folders."""
        shutil.copytree(self.folder, folder)
        source = Path(self.source).name
        write_json(Path(folder, "store.json"), {"has_integer_ids": self.has_integer_ids, "source": source})

    def __getitem__(self, ids: Id | Sequence[Id]) -> str | list[str]:
        """Return the texts of ids, or the text of one id.

        Raises:
            UnknownIdError: naming the first missing ids and their count.
        """
        if isinstance(ids, (int, str, np.integer)):
            return self[[ids]][0]
        rows = self.rows_of_known(ids, f"texts of {self.source}")
        return self.take(rows)

    def take(self, rows: np.ndarray) -> list[str]:
        """Return the texts of some rows; InputError if the files of the store are damaged."""
        return take_strings(self.texts, rows, f"The texts in {self.folder}")

    def items(self) -> Iterator[tuple[str, str]]:
        """Yield all (id, text) pairs, ids as strings, in the order of the source."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            rows = np.arange(start, min(start + ROWS_AT_ONCE, len(self)))
            yield from zip(self.ids_of(rows), self.take(rows), strict=True)

    def fingerprint(self) -> str:
        """Return a digest of texts and ids."""
        digest = xxhash.xxh3_128()
        for path in sorted([*self.folder.glob("*.bin"), *self.folder.glob("*.npy")]):
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        return digest.hexdigest()

    def __reduce__(self) -> tuple:
        return (type(self), (str(self.folder),))


def _read_json_texts(path: Path) -> Iterator[pa.RecordBatch]:
    ids, texts = [], []
    for line, row in read_jsonl(path):
        keys = [key for key in _ID_KEYS if key in row]
        text = row.get("text")
        if not keys or not isinstance(text, str):
            needed = f"an id ({', '.join(_ID_KEYS[:4])}) and a string 'text'"
            raise InputError(f"{path} line {line}: needed {needed}, got the keys {', '.join(row)}.")
        if "title" in row:
            text = f"{row['title'] or ''} {text}".strip()
        ids.append(str(row[keys[0]]))
        texts.append(text)
        if len(ids) == ROWS_AT_ONCE:
            yield _batch(ids, texts)
            ids, texts = [], []
    if ids:
        yield _batch(ids, texts)


def _batch(ids: Iterable[str], texts: Iterable[str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"id": pa.array(ids, pa.string()), "text": pa.array(texts, pa.string())})


def _write_store(folder: Path, batches: Iterator[pa.RecordBatch], source: str) -> None:
    ids: list[pa.Array] = []

    def texts() -> Iterator[pa.Array]:
        for batch in batches:
            ids.append(batch["id"])
            yield batch["text"]

    if write_strings(folder / "texts", texts()) == 0:
        raise InputError(f"{source} holds no rows.")
    index = IdIndex.build(ids)
    index.save_ids(folder)
    write_json(folder / "store.json", {"has_integer_ids": index.has_integer_ids, "source": source})
    _check_repeated(TextStore(folder))


def _check_repeated(store: TextStore) -> None:
    """Refuse an id that appears twice with different texts; with the same text its first row is used."""
    for row in np.setdiff1d(np.arange(len(store)), store.distinct_rows()):
        (later,) = store.ids_of([row])
        first = int(store.rows_of([later])[0])
        if first < 0:
            raise InputError(f"{store.source}: the id {later!r} shares its 64-bit hash with another; rename it.")
        if store.texts[first] != store.texts[int(row)]:
            places = f"rows {first + 1} and {row + 1}"
            raise InputError(f"{store.source}: id {later!r} appears twice with different texts, in {places}.")
