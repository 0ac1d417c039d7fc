"""Match the rows of files that are larger than memory by their ids: an external hash join.

The entries of each file are first distributed over buckets on disk by a hash of their keys, so that entries with the
same keys are in the same bucket whatever file they come from. Then one bucket after another is matched in memory.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from tqdm.auto import tqdm

from ..data.tables import is_plain_integer, plain_integers

BUCKETS = 256  # with 40 million rows a bucket holds 300,000 (query, document) pairs of each file
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by it: neighboring ids go to different buckets


class BucketFile:
    """Entries of one teacher file on disk, by bucket.

    Args:
        path: file to write.
        dtype: structured type of the entries: int64 keys, then `place`, then values.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.dtype = dtype
        self._path = path
        self._starts: list[np.ndarray] = []  # for each batch (BUCKETS + 1,), where its buckets begin in the file
        self._count = 0
        path.touch()

    def __len__(self) -> int:
        return self._count

    def add(self, entries: np.ndarray, *keys: str) -> None:
        """Append entries to the buckets that the fields `keys` give."""
        mixed = np.zeros(len(entries), dtype=np.uint64)
        for key in keys:
            mixed = (mixed ^ entries[key].astype(np.uint64)) * GOLDEN_RATIO
        buckets = ((mixed >> np.uint64(40)) % np.uint64(BUCKETS)).astype(np.uint16)
        with self._path.open("ab") as file:
            entries[np.argsort(buckets, kind="stable")].tofile(file)
        sizes = np.bincount(buckets, minlength=BUCKETS)
        self._starts.append(self._count + np.append(0, np.cumsum(sizes)))
        self._count += len(entries)

    def read(self, bucket: int) -> np.ndarray:
        """Read the entries of a bucket, in the order in which they were added."""
        parts = [np.empty(0, dtype=self.dtype)]
        for starts in self._starts:
            begin, end = starts[bucket : bucket + 2].tolist()
            parts.append(np.fromfile(self._path, self.dtype, end - begin, offset=begin * self.dtype.itemsize))
        return np.concatenate(parts)


@contextmanager
def bucket_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder for bucket files, without what a killed run left in it, and remove it at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def id_keys(ids: pa.Array) -> np.ndarray:
    """Return an int64 key for each id: its value for a plain integer, a 64-bit hash for other strings.

    Two of 10 million strings have the same hash with a probability of 3e-6.
    """
    if pa.types.is_integer(ids.type):
        keys = ids.cast(pa.int64()).to_numpy()
        if len(keys) == 0 or -(10**18) < keys.min() <= keys.max() < 10**18:  # as all plain integers
            return keys
        ids = ids.cast(pa.string())
    integers = plain_integers(ids)
    if integers is not None:
        return integers
    distinct = ids.cast(pa.string()).dictionary_encode()
    keys = np.empty(len(distinct.dictionary), dtype=np.int64)
    for i, text in enumerate(distinct.dictionary.to_pylist()):
        if is_plain_integer(text):
            keys[i] = int(text)
        else:
            keys[i] = xxhash.xxh3_64_intdigest(text.encode()) - (1 << 63)
    return keys[distinct.indices.to_numpy()]


def matched_buckets(files: Sequence[BucketFile], description: str) -> Iterator[tuple[np.ndarray, ...]]:
    """Match the entries of all files by their keys, one bucket after another; empty buckets are left out.

    Yields:
        (files, columns) entries, a column for each distinct key; the last one of a file's entries with this key, and
        the place -1 where it has none. Then all entries of the first file in this bucket, and their columns.
    """
    dtype = files[0].dtype
    keys = dtype.names[: dtype.names.index("place")]
    for bucket in tqdm(range(BUCKETS), desc=description, unit="bucket"):
        entries = [file.read(bucket) for file in files]
        together = np.concatenate(entries)
        if len(together) == 0:
            continue
        columns = number_rows(*(together[key] for key in keys))
        matched = np.zeros((len(files), columns.max() + 1), dtype)
        matched["place"] = -1
        file_numbers = np.repeat(np.arange(len(files)), [len(part) for part in entries])
        matched[file_numbers, columns] = together
        yield matched, entries[0], columns[: len(entries[0])]


def number_rows(*columns: np.ndarray) -> np.ndarray:
    """Number the distinct rows of some columns from 0, and return the number of each row."""
    order = np.lexsort(columns[::-1])
    ordered = np.stack(columns)[:, order]
    numbers = np.zeros(len(order), dtype=np.int64)
    numbers[order[1:]] = np.cumsum((ordered[:, 1:] != ordered[:, :-1]).any(0))
    return numbers
