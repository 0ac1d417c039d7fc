"""Ids of rows, and the row of an id: integers where all are plain integers, else strings; on disk memory-mapped.

In the order of the rows stand the ids (nothing where an id is its row), beside them a sorted index: the integers, or
64-bit hashes of the strings.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from .strings import open_strings, write_strings
from .tables import is_plain_integer, plain_integers

Id = int | str


class IdIndex:
    """The ids of rows 0..N-1, and the first row of each id. Look-ups take either spelling of an integer.

    Args:
        count: N.
        ids: (N,) int64, or strings; None where an id is its row.
        keys: of the distinct ids, sorted: int64, or uint64 hashes of strings; None where an id is its row.
        rows: int64, the first row of each key.
    """

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
        """Index ids given as arrays of strings, those of the first rows first.

        Args:
            removed: (N,) True at rows that no id finds; None for none.
        """
        integers = [plain_integers(column) for column in columns]
        if all(numbers is not None for numbers in integers):
            ids = keys = np.concatenate(integers)
            if removed is None and np.array_equal(keys, np.arange(len(keys))):
                return cls(len(keys))
        else:
            ids = pa.concat_arrays([column.cast(pa.large_string()) for column in columns])
            keys = _hashes(i for column in columns for i in column.to_pylist())
        order = np.argsort(keys, kind="stable")
        order = order if removed is None else order[~removed[order]]
        keys = keys[order]
        first = np.ones(len(keys), dtype=bool)
        first[1:] = keys[1:] != keys[:-1]
        return cls(len(ids), ids, keys[first], order[first])

    def save_ids(self, folder: Path) -> None:
        """Write the index into a folder, where an id is not its row."""
        if self._keys is None:
            return
        if self.has_integer_ids:
            np.save(folder / "ids.npy", self._ids)
        else:
            write_strings(folder / "ids", iter([self._ids]))
        np.save(folder / "keys.npy", self._keys)
        np.save(folder / "rows.npy", self._rows)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, id_: Id) -> bool:
        return bool(self.rows_of([id_])[0] >= 0)

    def ids(self) -> Iterator[str]:
        """All ids as strings, in the order of the rows."""
        for start in range(0, len(self), 10_000):
            yield from self.ids_of(np.arange(start, min(start + 10_000, len(self))))

    def ids_of(self, rows: np.ndarray) -> list[str]:
        """The ids of some rows, as strings."""
        if not self.has_integer_ids:
            return self._ids.take(pa.array(rows)).to_pylist()
        return [str(i) for i in (rows if self._ids is None else self._ids[rows]).tolist()]

    def columns(self, rows: np.ndarray | None = None) -> list[pa.Array]:
        """The ids of some rows, or of all, as arrays of strings, for `build`."""
        rows = np.arange(len(self)) if rows is None else rows
        return [pa.array(self.ids_of(rows[i : i + 100_000]), pa.string()) for i in range(0, len(rows), 100_000)]

    def distinct_rows(self) -> np.ndarray:
        """The first row of each id, ascending."""
        return np.arange(len(self)) if self._rows is None else np.sort(self._rows)

    def rows_of(self, ids: Sequence[Id] | np.ndarray) -> np.ndarray:
        """Row of each id of a flat sequence, -1 where there is none; int64."""
        if len(ids) == 0:
            return np.empty(0, dtype=np.int64)
        keys = self._keys_of(ids)
        if self._keys is None:
            return np.where((keys >= 0) & (keys < len(self)), keys, -1)
        if len(self._keys) == 0:
            return np.full(len(ids), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        rows = np.where(self._keys[places] == keys, self._rows[places], -1).astype(np.int64)
        if not self.has_integer_ids:  # the key is a hash: an id that is not here may share it
            found = np.flatnonzero(rows >= 0)
            stored = self.ids_of(rows[found])
            rows[[i for i, name in zip(found, stored, strict=True) if name != str(ids[i])]] = -1
        return rows

    def rows_of_array(self, ids: pa.Array) -> np.ndarray:
        """Return `rows_of` an Arrow array of integers or strings, without Python strings if the ids are integers."""
        if pa.types.is_integer(ids.type):
            return self.rows_of(ids.to_numpy())
        integers = plain_integers(ids) if self.has_integer_ids else None
        return self.rows_of(ids.to_pylist() if integers is None else integers)

    def rows_of_known(self, ids: Sequence[Id] | np.ndarray, what: str) -> np.ndarray:
        """`rows_of` ids that must be here.

        Args:
            what: the rows are, for the message.

        Raises:
            KeyError: naming the first missing ids and their count.
        """
        rows = self.rows_of(ids)
        if (rows < 0).any():
            missing = [ids[i] for i in np.flatnonzero(rows < 0)]
            raise KeyError(
                f"{len(missing)} of {len(ids)} ids are not among the {len(self):,} {what}: "
                f"{', '.join(repr(str(i)) for i in missing[:3])}; do the files belong to one release?"
            )
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


def open_ids(folder: Path) -> tuple[np.ndarray | pa.LargeStringArray, np.ndarray, np.ndarray] | tuple[()]:
    """Map what `save_ids` wrote: what `IdIndex` takes after the count; nothing where an id is its row."""
    if not (folder / "keys.npy").is_file():
        return ()
    has_strings = (folder / "ids.bin").is_file()
    ids = open_strings(folder / "ids") if has_strings else np.load(folder / "ids.npy", mmap_mode="r")
    return ids, np.load(folder / "keys.npy", mmap_mode="r"), np.load(folder / "rows.npy", mmap_mode="r")


def _hashes(ids: Iterator[str]) -> np.ndarray:
    return np.fromiter((xxhash.xxh3_64_intdigest(i.encode()) for i in ids), dtype=np.uint64)
