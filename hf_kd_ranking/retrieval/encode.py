"""Encode a collection: in blocks that survive an interruption, shared among the processes of an `accelerate` job."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..artifacts import compute_blocks, has_description, new_version, read_description, work_folder
from ..data.ids import IdIndex
from ..data.texts import TextStore
from ..inference import encode_texts
from ..processes import processes
from ..ranker import Ranker
from .versions import model_facts

STORAGES = ("float32", "float16", "int8")
# Documents encoded between two saves, and so lost at most; sorted by length within. With 768 values a term, 0.5 GB.
DOCUMENTS_PER_BLOCK = 1_024


def pack(vectors: np.ndarray, storage: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Vectors in the dtype that they are stored in.

    Args:
        vectors: (T, D) float32.
        storage: one of `STORAGES`.

    Returns:
        (T, D), and for int8 the factor of each vector, (T,) float32: its largest value / 127.

    Raises:
        ValueError: if a value is not finite, or none in float16.
    """
    if storage == "int8":
        scales = np.abs(vectors).max(1, initial=0.0) / np.float32(127)
        values = np.rint(vectors / np.where(scales == 0, 1, scales)[:, None])
    else:
        scales = None
        with np.errstate(over="ignore"):
            values = vectors.astype(storage, copy=False)
    if not np.isfinite(values).all():
        raise ValueError(f"A vector has a value that is not finite in {storage}; store float32, or encode in float32.")
    return values.astype(storage, copy=False), scales


def encode_collection(
    ranker: Ranker, documents: TextStore, folder: Path, storage: str = "float32", overwrite: bool = False
) -> None:
    """Encode all texts and write a store, see `VectorStore.build`."""
    if storage not in STORAGES:
        raise ValueError(f"Vectors are stored as one of {', '.join(STORAGES)}, got {storage!r}.")
    state = processes()
    (probe,) = encode_texts(ranker.model, ranker.processor, "document", [""], description=None)
    facts = model_facts(ranker) | {"kind": "vectors", "storage": storage, "dimension": probe.shape[-1]}
    facts["collection"] = documents.fingerprint()
    if has_description(folder) and not overwrite:
        if facts.items() <= read_description(folder).items():
            return  # nothing is left to do
        raise FileExistsError(
            f"{folder} holds other vectors; give another output, or --overwrite (overwrite=True) to replace them."
        )
    rows = documents.distinct_rows()

    def encode_block(block: slice) -> dict[str, np.ndarray]:
        return _encode_block(ranker, documents.texts.take(pa.array(rows[block])).to_pylist(), storage)

    with work_folder(folder, lambda _: facts | {"per_block": DOCUMENTS_PER_BLOCK}) as work:
        parts, _ = compute_blocks(work, len(rows), DOCUMENTS_PER_BLOCK, encode_block, "Encoding", "passage")
        if state.is_main_process:
            with new_version(folder, facts | {"documents": len(rows)}) as data:
                _join(parts, data)
                IdIndex.build(documents.columns(rows)).save_ids(data)


def _encode_block(ranker: Ranker, texts: list[str], storage: str) -> dict[str, np.ndarray]:
    vectors = encode_texts(
        ranker.model, ranker.processor, "document", texts, ranker.batch_size, description=None
    )  # (N, D), or N of (L, D)
    arrays = {}
    if isinstance(vectors, list):
        arrays["lengths"] = np.array([len(terms) for terms in vectors])
        vectors = np.concatenate(vectors)
    arrays["vectors"], scales = pack(vectors, storage)
    return arrays if scales is None else arrays | {"scales": scales}


def _join(paths: list[Path], data: Path) -> None:
    """Write the blocks as one array of vectors, and where each document's vectors begin."""
    columns: dict[str, list[np.ndarray]] = {"lengths": [], "scales": []}
    total, dimension = 0, 0
    for path in paths:
        with np.load(path) as part:
            for name in columns.keys() & set(part.files):
                columns[name].append(part[name])
            total += len(part["vectors"])
            dimension = part["vectors"].shape[1]
    write_vectors(data / "vectors.npy", (np.load(path)["vectors"] for path in paths), (total, dimension))
    if columns["lengths"]:
        np.save(data / "offsets.npy", np.cumsum(np.concatenate([[0], *columns["lengths"]])))
    if columns["scales"]:
        np.save(data / "scales.npy", np.concatenate(columns["scales"]))


def write_vectors(path: Path, arrays: Iterable[np.ndarray], shape: tuple[int, int]) -> None:
    """Write arrays of one dtype one after another as one array; not mapped, so that a full disk is an error."""
    with path.open("wb") as file:
        for number, array in enumerate(arrays):
            if number == 0:
                descr = np.lib.format.dtype_to_descr(array.dtype)
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(array).data)
