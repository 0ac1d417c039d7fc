"""Ids of rows, the row of an id, and strings on disk, all memory-mapped.

The ids are integers if all of them are plain integers, else strings. They are stored in the order of the rows (not at
all if each id is its row), with a sorted index: the integers, or 64-bit hashes of the strings.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np
import pyarrow as pa
import xxhash

from ..artifacts import existing_file
from ..errors import InputError, UnknownIdError
from .tables import is_plain_integer, plain_integers

Id = int | str
ROWS_AT_ONCE = 10_000


class IdIndex:
    """The ids of rows 0..N-1, and the first row of each id. Look-ups take either spelling of an integer.

    Args:
        count: N.
        ids: (N,) int64, or strings; None if each id is its row.
        keys: the distinct ids, sorted: int64, or uint64 hashes of strings; None if each id is its row.
        rows: int64, the first row of each key.
    """

    folder: Path | None = None  # of a store or an index on disk, for messages

    def __init__(
        self,
        count: int,
        ids: np.ndarray | pa.LargeStringArray | None = None,
        keys: np.ndarray | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        self._count = count
        self._ids = ids
        self._keys = keys
        self._rows = rows
        self.has_integer_ids = not isinstance(ids, pa.LargeStringArray)

    @classmethod
    def build(cls, columns: Sequence[pa.Array], removed: np.ndarray | None = None) -> "IdIndex":
        """Index arrays of strings, those of the first rows first.

        `removed` (N,) is True at rows that no look-up returns; None if there are none.
        """
        ids = keys = _all_integers(columns)
        if ids is None:
            ids = pa.concat_arrays([column.cast(pa.large_string()) for column in columns])
            keys = np.concatenate([_hashes(column.to_pylist()) for column in columns])
        elif removed is None and np.array_equal(keys, np.arange(len(keys))):
            return cls(len(keys))
        if removed is None:
            removed = np.zeros(len(keys), dtype=bool)
        rows = np.flatnonzero(~removed)
        keys, places = np.unique(keys[rows], return_index=True)  # the first place of each
        return cls(len(ids), ids, keys, rows[places])

    def without(self, rows: np.ndarray) -> "IdIndex":
        """Return the index in which the ids of some rows are unknown; the rows stay."""
        ids, keys, known = self._ids, self._keys, self._rows
        if keys is None:  # each id is its row
            ids = keys = known = np.arange(len(self))
        is_kept = np.isin(known, rows, invert=True)
        return IdIndex(len(self), ids, keys[is_kept], known[is_kept])

    def save_ids(self, folder: Path) -> None:
        """Write the index into a folder, unless each id is its row."""
        if self._keys is None:
            return
        if self.has_integer_ids:
            np.save(folder / "ids.npy", self._ids)
        else:
            write_strings(folder / "ids", [self._ids])
        np.save(folder / "keys.npy", self._keys)
        np.save(folder / "rows.npy", self._rows)

    @property
    def strings(self) -> pa.LargeStringArray | None:
        """The ids of the rows if they are strings; None if they are integers."""
        return None if self.has_integer_ids else self._ids

    def __len__(self) -> int:
        return self._count

    def __contains__(self, id_: Id) -> bool:
        return bool(self.rows_of([id_])[0] >= 0)

    def ids(self) -> Iterator[str]:
        """Yield all ids as strings, in the order of the rows."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield from self.ids_of(np.arange(start, min(start + ROWS_AT_ONCE, len(self))))

    def ids_of(self, rows: np.ndarray) -> list[str]:
        """Return the ids of some rows, as strings."""
        if not self.has_integer_ids:
            return take_strings(self._ids, rows, f"The ids of {self.folder or 'an index'}")
        integers = np.asarray(rows if self._ids is None else self._ids[rows])
        return [str(i) for i in integers.tolist()]

    def columns(self, rows: np.ndarray | None = None) -> list[pa.Array]:
        """Return the ids of some rows, or of all, as arrays of strings, for `build`."""
        if rows is None:
            rows = np.arange(len(self))
        starts = range(0, len(rows), 100_000)
        return [pa.array(self.ids_of(rows[start : start + 100_000]), pa.string()) for start in starts]

    def distinct_rows(self) -> np.ndarray:
        """Return the first row of each id, ascending."""
        return np.arange(len(self)) if self._rows is None else np.sort(self._rows)

    def rows_of(self, ids: Sequence[Id] | np.ndarray) -> np.ndarray:
        """Return the row of each id of a flat sequence, -1 for an unknown id; int64."""
        if not isinstance(ids, Sequence | np.ndarray) or isinstance(ids, str):
            raise TypeError(f"Ids are a list, got {type(ids).__name__} {str(ids)[:60]!r}.")
        if len(ids) == 0:
            return np.empty(0, dtype=np.int64)
        keys = self._keys_of(ids)
        if self._keys is None:
            return np.where((keys >= 0) & (keys < len(self)), keys, -1)
        if len(self._keys) == 0:
            return np.full(len(ids), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        rows = np.where(self._keys[places] == keys, self._rows[places], -1).astype(np.int64)
        if not self.has_integer_ids:  # the key is a hash: an unknown id may share it
            known = np.flatnonzero(rows >= 0)
            for place, stored in zip(known, self.ids_of(rows[known]), strict=True):
                if stored != str(ids[place]):
                    rows[place] = -1
        return rows

    def rows_of_array(self, ids: pa.Array) -> np.ndarray:
        """Return `rows_of` an Arrow array of integers or strings, without Python strings if the ids are integers."""
        if pa.types.is_integer(ids.type):
            return self.rows_of(ids.to_numpy())
        integers = plain_integers(ids) if self.has_integer_ids else None
        return self.rows_of(ids.to_pylist() if integers is None else integers)

    def rows_of_known(self, ids: Sequence[Id] | np.ndarray, what: str) -> np.ndarray:
        """Return `rows_of` ids that must be known; messages call the rows `what`.

        Raises:
            UnknownIdError: naming the first missing ids and their count.
        """
        rows = self.rows_of(ids)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            names = ", ".join(repr(str(ids[place])) for place in missing[:3])
            problem = f"{len(missing)} of {len(ids)} ids are not among the {len(self):,} {what}: {names}"
            raise UnknownIdError(f"{problem}; do the files belong to one release?")
        return rows

    def _keys_of(self, ids: Sequence[Id] | np.ndarray) -> np.ndarray:
        if not self.has_integer_ids:
            return _hashes(ids)
        array = np.asarray(ids)
        if array.dtype.kind in "iu":
            return array.astype(np.int64)
        # A string that is not a plain integer is unknown; -1 could be an id, the smallest integer cannot.
        keys = np.full(len(ids), np.iinfo(np.int64).min, dtype=np.int64)
        for place, id_ in enumerate(ids):
            if is_plain_integer(str(id_)):
                keys[place] = int(id_)
        return keys


def open_ids(folder: Path) -> tuple[np.ndarray | pa.LargeStringArray, np.ndarray, np.ndarray] | tuple[()]:
    """Map what `save_ids` wrote, the arguments of `IdIndex` after the count; nothing if each id is its row."""
    if not (folder / "keys.npy").is_file():
        return ()
    if (folder / "ids.bin").is_file():
        ids = open_strings(folder / "ids")
    else:
        ids = map_array(folder / "ids.npy")
    return ids, map_array(folder / "keys.npy"), map_array(folder / "rows.npy")


def map_array(path: Path) -> np.ndarray:
    """Map a .npy file; FileNotFoundError if it does not exist, InputError if it is damaged."""
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError, SyntaxError, TokenError) as error:  # of headers
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception | str) -> InputError:
    return InputError(f"{path} is damaged ({str(error).splitlines()[0][:200]}); build {path.parent} again.")


def write_strings(path: Path, arrays: Iterable[pa.Array]) -> int:
    """Write strings one after another (`path`.bin), where each begins (`path`.offsets.npy); return their number."""
    lengths = [np.zeros(1, dtype=np.int64)]
    with path.with_suffix(".bin").open("wb") as file:
        for array in arrays:
            array = array.cast(pa.large_string())
            _, offsets, data = array.buffers()
            offsets = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
            lengths.append(np.diff(offsets))
            if len(array) and offsets[-1] > offsets[0]:
                file.write(data[offsets[0] : offsets[-1]])
        file.write(b"\n")  # an empty file cannot be mapped
    offsets = np.cumsum(np.concatenate(lengths))
    np.save(path.with_suffix(".offsets.npy"), offsets)
    return len(offsets) - 1


def open_strings(path: Path) -> pa.LargeStringArray:
    """Map what `write_strings` wrote; only rows that are taken are read.

    It is one array, because taking rows of a chunked array copies all of it first.
    """
    data = existing_file(path.with_suffix(".bin"), "text store's")
    offsets = map_array(path.with_suffix(".offsets.npy"))
    if offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) < 1 or data.stat().st_size != offsets[-1] + 1:
        raise _damaged(data, "its size is not that of its texts")
    with pa.memory_map(str(data)) as mapped:
        try:
            return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), mapped.read_buffer())
        except pa.ArrowInvalid as error:
            raise _damaged(data, error) from None


def take_strings(strings: pa.LargeStringArray, rows: np.ndarray, what: str) -> list[str]:
    """Return the strings of some rows; InputError if a file is damaged, so that they are not UTF-8."""
    try:
        return strings.take(pa.array(rows)).to_pylist()
    except UnicodeDecodeError as error:
        raise InputError(f"{what} are damaged: they are not UTF-8 ({error}); build them again.") from None


def _all_integers(columns: Sequence[pa.Array]) -> np.ndarray | None:
    integers = []
    for column in columns:
        numbers = plain_integers(column)
        if numbers is None:
            return None
        integers.append(numbers)
    return np.concatenate(integers)


def _hashes(ids: Iterable[Id]) -> np.ndarray:
    return np.fromiter((xxhash.xxh3_64_intdigest(str(i).encode()) for i in ids), dtype=np.uint64)
