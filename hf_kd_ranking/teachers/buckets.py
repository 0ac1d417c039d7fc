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

# With 40 million rows a bucket holds 300,000 (query, document) pairs of each file.
BUCKETS = 256
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by it: neighboring ids go to different buckets


class BucketFile:
    """Entries of one teacher file on disk, by bucket.

    Args:
        path: file to write.
        dtype: structured type of the entries.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._path = path
        self._dtype = dtype
        self._starts: list[np.ndarray] = []  # for each batch (BUCKETS + 1,), where its buckets begin in the file
        self._count = 0
        path.touch()

    def __len__(self) -> int:
        return self._count

    def add(self, entries: np.ndarray, keys: Sequence[np.ndarray]) -> None:
        """Append entries to the buckets of their keys, int64 arrays of the same length."""
        buckets = bucket_of(*keys)
        with self._path.open("ab") as file:
            entries[np.argsort(buckets, kind="stable")].tofile(file)
        sizes = np.bincount(buckets, minlength=BUCKETS)
        self._starts.append(self._count + np.concatenate([[0], np.cumsum(sizes)]))
        self._count += len(entries)

    def read(self, bucket: int) -> np.ndarray:
        """Read the entries of a bucket, in the order in which they were added."""
        parts = [np.empty(0, dtype=self._dtype)]
        for starts in self._starts:
            begin, end = starts[bucket : bucket + 2].tolist()
            offset = begin * self._dtype.itemsize
            parts.append(np.fromfile(self._path, self._dtype, end - begin, offset=offset))
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
        return ids.cast(pa.int64()).to_numpy()
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


def bucket_of(*keys: np.ndarray) -> np.ndarray:
    """Return the number of the bucket of each entry, uint16."""
    mixed = np.zeros(len(keys[0]), dtype=np.uint64)
    for key in keys:
        mixed = (mixed ^ key.view(np.uint64)) * GOLDEN_RATIO
    return ((mixed >> np.uint64(40)) % np.uint64(BUCKETS)).astype(np.uint16)


def matched_buckets(
    files: Sequence[BucketFile], keys: Sequence[str], description: str
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray], int]]:
    """Match the entries of all files, one bucket after another.

    Args:
        files: entries of each file.
        keys: fields of the entries that are their keys.
        description: title of the progress bar.

    Yields:
        The entries of each file in one bucket, for each file the numbers of its entries' keys, and how many distinct
        keys the bucket has. Empty buckets are left out.
    """
    for bucket in tqdm(range(BUCKETS), desc=description, unit="bucket"):
        entries = [file.read(bucket) for file in files]
        together = np.concatenate(entries)
        if len(together) == 0:
            continue
        numbers = number_rows(*(together[key] for key in keys))
        ends = np.cumsum([len(part) for part in entries])
        yield entries, np.split(numbers, ends[:-1]), int(numbers.max()) + 1


def number_rows(*columns: np.ndarray) -> np.ndarray:
    """Number the distinct rows of some columns from 0, and return the number of each row."""
    order = np.lexsort(columns[::-1])
    is_new = np.zeros(len(order), dtype=bool)
    for column in columns:
        ordered = column[order]
        is_new[1:] |= ordered[1:] != ordered[:-1]
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.cumsum(is_new)
    return numbers
