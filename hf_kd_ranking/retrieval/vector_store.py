"""The encoded collection on disk, memory-mapped: one vector a document, or one a term.

One format for the four architectures that store: `vectors.npy` (T, D), `offsets.npy` (N + 1,) where every term has a
vector, and the ids. Vectors are float32 or float16; int8 with `scales.npy` (T,); or codes (T, bytes) of a faiss codec,
`codec.faiss`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np

from ..artifacts import new_version, open_version
from ..data.ids import IdIndex, open_ids
from ..data.texts import TextStore
from ..ranker import Ranker
from .encode import encode_collection, write_vectors
from .versions import check_model

# Vectors turned to float32 at once: 200 MB of 768 dimensions.
CHUNK_SIZE = 65_536
TRAINING_VECTORS = 262_144


class VectorStore(IdIndex):
    """Vectors of documents by id; make one with `build` or `open`.

    Args:
        folder: that `build` wrote.
        is_verified: False leaves out the comparison of checksums, for which every file is read.
    """

    def __init__(self, folder: str | os.PathLike, is_verified: bool = True) -> None:
        self.folder = Path(folder)
        self.facts, data = open_version(self.folder, "vectors", is_verified)
        self.dimension: int = self.facts["dimension"]
        self.values = np.load(data / "vectors.npy", mmap_mode="r")  # (T, D)
        self.scales = np.load(data / "scales.npy", mmap_mode="r") if (data / "scales.npy").is_file() else None
        has_codec = (data / "codec.faiss").is_file()
        self._codec = faiss.read_index(str(data / "codec.faiss")) if has_codec else None
        has_token_vectors = (data / "offsets.npy").is_file()
        self.offsets = np.load(data / "offsets.npy", mmap_mode="r") if has_token_vectors else None  # (N + 1,)
        super().__init__(self.facts["documents"], *open_ids(data))

    @classmethod
    def build(
        cls,
        ranker: Ranker,
        documents: TextStore,
        folder: str | os.PathLike,
        storage: str = "float32",
        overwrite: bool = False,
    ) -> "VectorStore":
        """Encode a collection; killed at any moment, the same call goes on, and the bytes are the same; once it is
        finished, the same call opens the store.

        Under `accelerate launch` the processes share the work; all must make the same call.

        Args:
            ranker: BERT_DOT, ColBERT, PreTTR (with fixed document positions) or TK.
            documents: the collection; an id that stands twice is encoded once.
            folder: of the store.
            storage: "float32", "float16", or "int8" (a factor per vector).
            overwrite: True replaces a store that exists; readers of the old one keep it.

        Raises:
            FileExistsError: if there is a store of other vectors and it is not to be replaced.
            ValueError: if the ranker cannot encode documents alone, a work folder belongs to other inputs, or a value
                does not fit the storage.
        """
        encode_collection(ranker, documents, Path(folder), storage, overwrite)
        return cls(folder, is_verified=False)

    @classmethod
    def open(cls, folder: str | os.PathLike, ranker: Ranker | None = None, is_verified: bool = True) -> "VectorStore":
        """Open a store.

        Args:
            ranker: must be the one that made the vectors; None asks nothing.
            is_verified: see the class.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it was made by another model, or a file is truncated or damaged.
        """
        store = cls(folder, is_verified)
        if ranker is not None:
            check_model(store.facts, ranker, store.folder)
        return store

    def compress(self, folder: str | os.PathLike, factory: str, seed: int = 0) -> "VectorStore":
        """Write the same vectors as codes of a faiss codec, which every look-up decodes.

        Args:
            folder: of the new store.
            factory: in faiss' notation: "IVF256,SQ4" is the nearest of 256 centroids and 4 bits a value for what is
                left (residual compression, as in ColBERTv2), "PQ64" 64 bytes a vector.
            seed: of the vectors that the codec is trained on.

        Raises:
            ValueError: if faiss cannot build the codec.
        """
        codec = train_index(self, factory, seed)

        def codes() -> Iterator[np.ndarray]:
            return (codec.sa_encode(vectors) for _, _, vectors in self.chunks())

        with new_version(Path(folder), self.facts | {"storage": factory}) as data:
            write_vectors(data / "vectors.npy", codes(), (len(self.values), codec.sa_code_size()))
            faiss.write_index(codec, str(data / "codec.faiss"))
            if self.offsets is not None:
                np.save(data / "offsets.npy", self.offsets)
            IdIndex.build(self.columns()).save_ids(data)
        return type(self)(folder, is_verified=False)

    def sample(self, count: int, seed: int) -> np.ndarray:
        """About so many of the vectors, of random documents; (S, D) float32."""
        documents = max(1, count * len(self) // max(len(self.values), 1))
        vectors = self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:documents]))
        return np.concatenate(vectors) if self.has_token_vectors else vectors

    @property
    def has_token_vectors(self) -> bool:
        """True where every term has a vector."""
        return self.offsets is not None

    @property
    def bytes_per_document(self) -> float:
        """On disk, ids left out."""
        parts = [part.nbytes for part in (self.values, self.scales, self.offsets) if part is not None]
        return sum(parts) / len(self)

    def take(self, rows: np.ndarray) -> np.ndarray | list[np.ndarray]:
        """Vectors of some rows, float32: (N, D), or a list of (L, D)."""
        if self.offsets is None:
            return self._unpacked(np.asarray(rows))
        return [self._unpacked(slice(self.offsets[row], self.offsets[row + 1])) for row in rows]

    def chunks(self, size: int = CHUNK_SIZE) -> Iterator[tuple[int, int, np.ndarray]]:
        """All vectors in order: first row, row behind the last, and their vectors, (T, D) float32, about `size`."""
        start = 0
        while start < len(self):
            stop = start + size if self.offsets is None else self._row_after(int(self.offsets[start]) + size)
            stop = min(max(stop, start + 1), len(self))
            bounds = (start, stop) if self.offsets is None else self.offsets[[start, stop]].tolist()
            yield start, stop, self._unpacked(slice(*bounds))
            start = stop

    def _row_after(self, vector: int) -> int:
        return int(np.searchsorted(self.offsets, vector, side="right")) - 1

    def _unpacked(self, chosen: slice | np.ndarray) -> np.ndarray:
        if self._codec is not None:
            return self._codec.sa_decode(np.ascontiguousarray(self.values[chosen]))
        vectors = self.values[chosen].astype(np.float32)  # also a copy of what is mapped
        return vectors if self.scales is None else vectors * self.scales[chosen][:, None]


def train_index(store: VectorStore, factory: str, seed: int) -> faiss.Index:
    """An empty inner-product index for the vectors of a store, its quantisers trained on a sample of them.

    Raises:
        ValueError: if the factory is not faiss', or needs more vectors.
    """
    try:
        index = faiss.index_factory(store.dimension, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(store.sample(TRAINING_VECTORS, seed))
    except RuntimeError as error:
        reason = faiss_reason(error)
        raise ValueError(f"faiss cannot build {factory!r} over {len(store.values):,} vectors: {reason}.") from None
    return index


def faiss_reason(error: RuntimeError) -> str:
    """What faiss says, without the line of its source that it names first."""
    return str(error).strip().splitlines()[-1].rpartition(": ")[2]


def best_of(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest scores, falling, and their rows; ties by row. A row of -1 is none (faiss')."""
    scores, rows = scores[rows >= 0], rows[rows >= 0]
    order = np.lexsort((rows, -scores))[:k]
    return scores[order], rows[order]
