"""Encode a collection in blocks, which survive an interruption and are shared among the processes of a job."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from ..artifacts import compute_blocks
from ..data.texts import TextStore
from ..inference import encode_texts
from ..ranker import Ranker

STORAGES = ("float32", "float16", "int8")
# Documents encoded between two saves, the most that a kill loses; sorted by length within. With 768 values per token,
# 0.5 GB.
DOCUMENTS_PER_BLOCK = 1_024


def pack(vectors: np.ndarray, storage: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Convert vectors, (T, D) float32, to one of `STORAGES`.

    Returns:
        (T, D), and for int8 the factor of each vector, (T,) float32: its largest value / 127.

    Raises:
        ValueError: if a value is not finite, or too large for float16.
    """
    scales = None
    if storage == "int8":
        scales = np.abs(vectors).max(1, initial=0.0) / np.float32(127)
        values = np.rint(vectors / np.where(scales == 0, 1, scales)[:, None])
    else:
        with np.errstate(over="ignore"):
            values = vectors.astype(storage, copy=False)
    if not np.isfinite(values).all():
        raise ValueError(f"A vector has a value that is not finite in {storage}; store float32, or encode in float32.")
    return values.astype(storage, copy=False), scales


def encode_blocks(ranker: Ranker, documents: TextStore, rows: np.ndarray, work: Path, storage: str) -> list[Path]:
    """Encode rows of a text store into the blocks of a work folder, see `artifacts.compute_blocks`.

    Returns:
        The .npz files: `vectors` (T, D), `scales` (T,) for int8, and `lengths` (n,), the vectors of each document,
        where every token has a vector.
    """

    def encode_block(block: slice) -> dict[str, np.ndarray]:
        texts = documents.texts.take(pa.array(rows[block])).to_pylist()
        vectors = encode_texts(ranker.model, ranker.processor, "document", texts, ranker.batch_size, description=None)
        arrays = {}
        if isinstance(vectors, list):  # (L, D) each
            arrays["lengths"] = np.array([len(tokens) for tokens in vectors])
            vectors = np.concatenate(vectors)
        arrays["vectors"], scales = pack(vectors, storage)
        if scales is not None:
            arrays["scales"] = scales
        return arrays

    blocks, _ = compute_blocks(work, len(rows), DOCUMENTS_PER_BLOCK, encode_block, "Encoding", "passage")
    return blocks
