"""Strings on disk, memory-mapped as one Arrow array: rows are read when they are taken, and no others.

An array in one piece, because taking rows of a chunked one copies all of it first.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..artifacts import existing_file


def write_strings(path: Path, arrays: Iterator[pa.Array]) -> int:
    """Write strings one after another (`path`.bin) and where each begins (`path`.offsets.npy).

    Returns:
        Their number.
    """
    lengths = [np.zeros(1, dtype=np.int64)]
    with path.with_suffix(".bin").open("wb") as file:
        for array in arrays:
            array = array.cast(pa.large_string())
            _, offsets, data = array.buffers()
            offsets = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
            if len(array):
                file.write(data[offsets[0] : offsets[-1]] if offsets[-1] > offsets[0] else b"")
                lengths.append(np.diff(offsets))
        file.write(b"\n")  # an empty file cannot be mapped
    offsets = np.cumsum(np.concatenate(lengths))
    np.save(path.with_suffix(".offsets.npy"), offsets)
    return len(offsets) - 1


def open_strings(path: Path) -> pa.LargeStringArray:
    """Map what `write_strings` wrote: an array whose rows are read when they are taken, and no other.

    Raises:
        FileNotFoundError: if it is not there.
    """
    data = existing_file(path.with_suffix(".bin"), "text store's")
    offsets = np.load(path.with_suffix(".offsets.npy"), mmap_mode="r")
    with pa.memory_map(str(data)) as mapped:
        return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), mapped.read_buffer())
