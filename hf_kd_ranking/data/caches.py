"""Folders for what is built from a user's files, so that it is built once."""

import hashlib
import os
from pathlib import Path

import xxhash

CACHE_VERSION = 3  # of what is built from files; folders of other versions are not read
EDGE = 1 << 16  # bytes of the first and the last block of a file


def cache_folder(path: Path, kind: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """Return the folder for what is built from a file; its name changes whenever the file is written.

    It depends on the file's path, size, first and last block, and on the times of the last change: tools that copy
    files set that of the content (mtime) to an earlier one, but not that of the file (ctime).
    """
    status = path.stat()
    with path.open("rb") as file:
        blocks = file.read(EDGE)
        file.seek(max(0, status.st_size - EDGE))
        blocks += file.read(EDGE)
    times = f"{status.st_mtime_ns}|{status.st_ctime_ns}"
    key = f"{path.resolve()}|{status.st_size}|{times}|{xxhash.xxh3_128_hexdigest(blocks)}|{kind}|{CACHE_VERSION}"
    root = cache_root() if cache_dir is None else Path(cache_dir)
    return root / f"{path.stem}-{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def cache_root() -> Path:
    """Return our folder in the cache of `datasets`."""
    import datasets  # only here: batches are collated without it

    return Path(datasets.config.HF_DATASETS_CACHE) / "hf_kd_ranking"
