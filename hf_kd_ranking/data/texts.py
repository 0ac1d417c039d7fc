"""Texts by id, on disk: ids travel through training, texts are looked up in the dataloader workers.

A store is a folder: texts and ids in the order of their source, a sorted index over the ids (`keys.npy`, `rows.npy`),
all memory-mapped, and `store.json`. It pickles to its path, so forked and spawned workers share the mapped pages.
"""

import hashlib
import json
import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from ..artifacts import building, existing_file, file_digest, read_json, write_json
from ..errors import InputError
from .caches import cache_folder
from .ids import ROWS_AT_ONCE, Id, IdIndex, open_ids, open_strings, take_strings, write_strings
from .tables import json_id, read_jsonl, read_tsv

if TYPE_CHECKING:
    import datasets

PASSAGE_SETTINGS = ("passages", "aggregation")  # of a store of passages, in its description
AGGREGATIONS = ("max", "first", "mean_top3")  # of the scores of passages to that of their document
_ID_KEYS = ("_id", "id", "doc_id", "query_id", "docid", "pid", "qid")


class Collection(NamedTuple):
    """The identity of a collection, which its texts and all that is built from them have in common."""

    fingerprint: str | None  # of ids and texts; None where an earlier release did not store it
    source: str  # name of the file, for messages
    aggregation: str | None = None  # if its texts are passages of documents, see `passages.split_documents`

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> "Collection":
        """Return the collection in the description of an index."""
        source = description.get("source", "an unknown source")
        return cls(description.get("collection"), source, description.get("aggregation"))

    def describe(self) -> dict[str, str | None]:
        """Return what the description of an index says of its collection, which `of` reads."""
        return {"collection": self.fingerprint, "source": self.source, "aggregation": self.aggregation}


def check_same_collection(parts: Mapping[str, Collection]) -> None:
    """Refuse, by an InputError that names them, parts (name -> collection) that were made from different texts."""
    if len({collection.fingerprint for collection in parts.values()}) > 1:
        found = []
        for name, collection in parts.items():
            found.append(f"{name}: {collection.source} (fingerprint {str(collection.fingerprint)[:12]})")
        problem = f"The parts have one collection; these have different ones: {', '.join(found)}"
        raise InputError(f"{problem}; open what was built from these texts, or build it again.")


def normalized(text: str) -> str:
    """Return a text in composed Unicode (NFC), case-folded, with single blanks: equal for copies of a text."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


class TextStore(IdIndex):
    """A collection or a set of queries: `store[ids]` returns their texts.

    Make one with `from_tsv`, `from_jsonl`, `from_dataset`, or `open`. Ids are integers where all of them are plain
    integers (`str(int(x)) == x`), else strings; look-ups take either spelling. An id that its source repeats with the
    same text is there once.

    Example:
        >>> documents = kd.TextStore.from_tsv("collection.tsv")  # or from_file, which also reads JSON lines
        >>> len(documents[["3", "17"]])
        2
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.description = _read_description(self.folder)
        self.source: str = self.description["source"]  # the file the store was built from, for messages
        self.aggregation: str | None = self.description.get("aggregation")  # None if the texts are not passages
        self.texts = open_strings(self.folder / "texts")
        super().__init__(len(self.texts), *open_ids(self.folder))

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "TextStore":
        """Open a store that was built before.

        Raises:
            FileNotFoundError: if there is none.
            InputError: if its description is damaged, or of an earlier release.
        """
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

        The folder of the store is, if none is given, one in the cache of `datasets` that depends on the file, see
        `cache_folder`.

        Raises:
            FileExistsError: if the folder contains a store of other texts, or something else.
            FileNotFoundError: if the file does not exist.
            InputError: with file and line, for a wrong number of columns or bad UTF-8; for an id that appears twice
                with different texts; for an empty file.
        """
        path = existing_file(path, "text")
        return cls._from_path(path, folder, read_tsv(path, {"id": pa.string(), "text": pa.string()}))

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike, folder: str | os.PathLike | None = None) -> "TextStore":
        """Build from JSON lines with an id (`_id`, `id`, `doc_id`, `query_id`), `text`, and optionally `title` (BEIR).

        A title is put before its text, with a blank between. Folder and errors are those of `from_tsv`.
        """
        path = existing_file(path, "text")
        return cls._from_path(path, folder, _read_json_texts(path))

    @classmethod
    def from_dataset(
        cls,
        dataset: "datasets.Dataset",
        folder: str | os.PathLike,
        id_column: str = "id",
        text_column: str = "text",
        title_column: str = "title",
    ) -> "TextStore":
        """Build from columns of a data set; if it has titles, they are put before their texts as by `from_jsonl`.

        Raises:
            FileExistsError: if the folder contains a store of other texts, or something else.
            InputError: if a column or a value is missing, or an id appears twice with different texts.
            TypeError: if it is not a data set.
        """
        import datasets  # only here: collections in files are read without it

        if not isinstance(dataset, datasets.Dataset):
            raise TypeError(f"Needed a datasets.Dataset, got {type(dataset).__name__}; Dataset.from_list makes one.")
        missing = {id_column, text_column} - set(dataset.column_names)
        if missing:
            raise InputError(
                f"The data set has the columns {', '.join(dataset.column_names)}, not {', '.join(sorted(missing))}; "
                "name them by id_column and text_column."
            )
        columns = [id_column, text_column]
        if title_column in dataset.column_names:
            columns.append(title_column)
        made_from = xxhash.xxh3_128()
        for batch in _read_dataset(dataset, columns):
            made_from.update(batch.serialize())
        return cls.build(Path(folder), _read_dataset(dataset, columns), "the data set", made_from.hexdigest())

    @classmethod
    def _from_path(
        cls, path: Path, folder: str | os.PathLike | None, batches: Iterator[pa.RecordBatch]
    ) -> "TextStore":
        made_from = ""  # the name of a folder in the cache says it
        if folder is None:
            folder = cache_folder(path, "store")
        else:
            made_from = file_digest(path)
        return cls.build(Path(folder), batches, str(path), made_from)

    @classmethod
    def build(
        cls,
        folder: Path,
        batches: Iterator[pa.RecordBatch],
        source: str,
        made_from: str,
        settings: Mapping[str, str] | None = None,
    ) -> "TextStore":
        """Build a store of batches of `id` and `text`, unless the folder contains the one of this content.

        Args:
            source: name of the source, for messages.
            made_from: digest of the content.
            settings: how documents were split if the texts are passages, see `passages.split_documents`.
        """
        if (folder / "store.json").is_file():
            store = cls(folder)
            if store.description["made_from"] != made_from:
                raise FileExistsError(
                    f"{folder} holds the texts of {store.source}, and {source} has other content; give another "
                    "folder, or remove it."
                )
            return store
        if folder.is_dir() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} holds something that is not a text store; give an empty folder.")
        with building(folder) as temporary:
            _write_store(temporary, batches, source, made_from, settings or {})
        return cls(folder)

    def save(self, folder: str | os.PathLike) -> None:
        """Copy the store into a new folder, which names the source without its folders."""
        shutil.copytree(self.folder, folder)
        write_json(Path(folder, "store.json"), {**self.description, "source": Path(self.source).name})

    def __getitem__(self, ids: Id | Sequence[Id]) -> str | list[str]:
        """Return the texts of ids, or the text of one id; missing ids are an UnknownIdError."""
        if isinstance(ids, (int, str, np.integer)):
            return self[[ids]][0]
        return self.take(self.rows_of_texts(ids))

    def rows_of_texts(self, ids: Sequence[Id]) -> np.ndarray:
        """Return the rows of ids, (N,) int64; UnknownIdError if one is missing."""
        return self.rows_of_known(ids, f"texts of {self.source}")

    def rows_of_documents(self, ids: Sequence[Id]) -> np.ndarray:
        """Return the row of each document, of its first passage if it is split; (N,) int64, -1 for an unknown one."""
        rows = self.rows_of(ids)
        if self.aggregation is not None:
            split = np.flatnonzero(rows < 0)
            rows[split] = self.rows_of([f"{ids[place]}#0" for place in split])
        return rows

    def take(self, rows: np.ndarray) -> list[str]:
        """Return the texts of some rows; InputError if the files of the store are damaged."""
        return take_strings(self.texts, rows, f"The texts in {self.folder}")

    def items(self) -> Iterator[tuple[str, str]]:
        """Yield all (id, text) pairs, ids as strings, in the order of the source."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            rows = np.arange(start, min(start + ROWS_AT_ONCE, len(self)))
            yield from zip(self.ids_of(rows), self.take(rows), strict=True)

    def fingerprint(self) -> str:
        """Return the digest of texts and ids that was computed when the store was built."""
        return self.description["fingerprint"]

    @property
    def collection(self) -> Collection:
        """The collection that the texts are."""
        return Collection(self.fingerprint(), Path(self.source).name, self.aggregation)

    def compute_fingerprint(self) -> str:
        """Return `fingerprint` of the files as they are now, which differs if one is damaged."""
        return _fingerprint(self.folder, self.description)

    def __reduce__(self) -> tuple:
        return (type(self), (str(self.folder),))


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    name = unicodedata.name(character, "").partition(" ")[0].removesuffix("-HIRAGANA")
    if name in ("HIRAGANA", "KATAKANA"):
        return "CJK"
    return name


def scripts(text: str) -> Counter[str]:
    """Count the letters of a text by their script, such as LATIN or CYRILLIC; those of Japanese are all CJK."""
    return Counter(_script(character) for character in unicodedata.normalize("NFKC", text) if character.isalpha())


def read_titles(path: str | os.PathLike) -> dict[str, str]:
    """Return doc_id -> title, as it begins the text in a store, of JSON lines with titles; empty for other files."""
    path, titles = Path(path), {}
    if path.is_file() and ".jsonl" in path.suffixes:
        for line, row in read_jsonl(path):
            keys = [key for key in _ID_KEYS if key in row]
            if keys and isinstance(row.get("title"), str):
                titles[json_id(path, line, keys[0], row[keys[0]])] = row["title"].strip()
    return titles


def titled(title: str | None, text: str) -> str:
    """Return a text after its title, with a blank between; one without a title as it is."""
    return f"{title} {text}".strip() if title and title.strip() else text


def _read_json_texts(path: Path) -> Iterator[pa.RecordBatch]:
    ids, texts = [], []
    for line, row in read_jsonl(path):
        keys = [key for key in _ID_KEYS if key in row]
        text, title = row.get("text"), row.get("title")
        if not keys or not isinstance(text, str):
            needed = f"an id ({', '.join(_ID_KEYS[:4])}) and a string 'text'"
            raise InputError(f"{path} line {line}: needed {needed}, got the keys {', '.join(row)}.")
        if not isinstance(title, str | None):
            raise InputError(f"{path} line {line}: title must be a string or null, got {json.dumps(title)}.")
        ids.append(json_id(path, line, keys[0], row[keys[0]]))
        texts.append(titled(title, text))
        if len(ids) == ROWS_AT_ONCE:
            yield text_batch(ids, texts)
            ids, texts = [], []
    if ids:
        yield text_batch(ids, texts)


def _read_dataset(dataset: "datasets.Dataset", columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Read ids and texts from the columns of a data set: ids, texts, and optionally titles."""
    row = -1
    for part in dataset.select_columns(list(columns)).iter(ROWS_AT_ONCE):
        ids, texts = [], []
        titles = part[columns[2]] if len(columns) == 3 else repeat(None)
        for id_, text, title in zip(part[columns[0]], part[columns[1]], titles, strict=False):
            row += 1
            is_id = isinstance(id_, str | int) and not isinstance(id_, bool)
            if not is_id or not isinstance(text, str) or not isinstance(title, str | None):
                values = f"{id_!r}, {str(text)[:40]!r} of type {type(text).__name__}, and the title {title!r}"
                raise InputError(f"The data set, row {row}: needed an id, a text and at most a title; got {values}.")
            ids.append(str(id_))
            texts.append(titled(title, text))
        yield text_batch(ids, texts)


def text_batch(ids: Sequence[str], texts: Sequence[str]) -> pa.RecordBatch:
    """Return ids and texts as `TextStore.build` reads them."""
    return pa.RecordBatch.from_pydict({"id": pa.array(ids, pa.string()), "text": pa.array(texts, pa.string())})


def _write_store(
    folder: Path, batches: Iterator[pa.RecordBatch], source: str, made_from: str, settings: Mapping[str, str]
) -> None:
    ids: list[pa.Array] = []

    def texts() -> Iterator[pa.Array]:
        for batch in batches:
            ids.append(batch["id"])
            yield batch["text"]

    if write_strings(folder / "texts", texts()) == 0:
        raise InputError(f"{source} holds no rows.")
    index = IdIndex.build(ids)
    rows = index.distinct_rows()
    if len(rows) < len(index):
        _keep_rows(folder, index, rows, source)
        index = IdIndex.build(index.columns(rows))
    index.save_ids(folder)
    description = {"source": source, "made_from": made_from, "fingerprint": _fingerprint(folder, settings), **settings}
    write_json(folder / "store.json", description)


def _keep_rows(folder: Path, index: IdIndex, rows: np.ndarray, source: str) -> None:
    """Keep the texts of the first row of each id; an InputError if another row of an id has another text."""
    texts = open_strings(folder / "texts")
    for row in np.setdiff1d(np.arange(len(index)), rows):
        (later,) = index.ids_of([row])
        first = int(index.rows_of([later])[0])
        if first < 0:
            raise InputError(f"{source}: the id {later!r} shares its 64-bit hash with another; rename it.")
        if texts[first] != texts[int(row)]:
            places = f"rows {first + 1} and {row + 1}"
            raise InputError(f"{source}: id {later!r} appears twice with different texts, in {places}.")
    starts = range(0, len(rows), ROWS_AT_ONCE)
    write_strings(folder / "kept", (texts.take(pa.array(rows[start : start + ROWS_AT_ONCE])) for start in starts))
    for suffix in (".bin", ".offsets.npy"):
        (folder / f"kept{suffix}").replace(folder / f"texts{suffix}")


def _fingerprint(folder: Path, settings: Mapping[str, str]) -> str:
    """Return the digest of the files of a store, and of the settings by which its passages were made, if any."""
    digest = xxhash.xxh3_128("".join(settings.get(name, "") for name in PASSAGE_SETTINGS).encode())
    for path in sorted([*folder.glob("*.bin"), *folder.glob("*.npy")]):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _read_description(folder: Path) -> dict[str, str]:
    path = folder / "store.json"
    description = read_json(path, what="text store's description")
    if not all(isinstance(description.get(name), str) for name in ("source", "made_from", "fingerprint")):
        raise InputError(f"{path} is damaged, or of an earlier release; remove {folder} and build the store again.")
    return description
