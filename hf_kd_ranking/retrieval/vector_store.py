"""The encoded collection on disk, memory-mapped: one vector per document, one per token, or sparse vectors.

One format for all architectures that store vectors: `vectors.npy` (T, D), `offsets.npy` (N + 1,) where every token has
a vector, and the ids. Vectors are float32 or float16; int8 with `scales.npy` (T,); or codes (T, bytes) of a faiss
codec, `codec.faiss`. Of sparse vectors only the weights other than zero are stored, (T,) in float32 or float16, with
their dimensions in `words.npy` (T,) and `offsets.npy` (N + 1,), where those of each document begin.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
from scipy.sparse import csr_array, issparse

from ..artifacts import (
    compute_blocks,
    has_description,
    new_version,
    open_version,
    read_blocks,
    read_description,
    work_folder,
)
from ..data.ids import IdIndex, map_array, open_ids
from ..data.texts import Collection, TextStore
from ..errors import InputError
from ..inference import encode_texts
from ..models import Cuts
from ..processes import processes
from ..ranker import Ranker
from .base import check_model, model_identity, refuse_replacing

STORAGES = ("float32", "float16", "int8")
# Documents encoded between two saves, the most that a kill loses; sorted by length within. With 768 values per token,
# 0.5 GB.
DOCUMENTS_PER_BLOCK = 1_024
Chunk = tuple[int, np.ndarray, np.ndarray]  # first row, number of vectors per document (n,), vectors (T, D) float32
# Vectors converted to float32 at once: 200 MB of 768 dimensions.
CHUNK_SIZE = 65_536
TRAINING_VECTORS = 262_144


class VectorStore(IdIndex):
    """The vectors of documents by id, and the ranker that made them; make one with `build` or `open`.

    Example:
        >>> ranker, documents = kd.Ranker.from_pretrained("bert_dot"), kd.TextStore.from_tsv("collection.tsv")
        >>> store = kd.VectorStore.build(ranker, documents, "vectors", storage="float16")
        >>> len(store) == len(documents)
        True
    """

    def __init__(self, folder: str | Path, ranker: Ranker | None = None, is_verified: bool = True) -> None:
        self.folder = Path(folder)
        self.ranker = ranker
        self.description, data = open_version(self.folder, "vectors", is_verified)
        self.dimension: int = self.description["dimension"]
        self.values = map_array(data / "vectors.npy")  # (T, D)
        self.scales = _load_optional(data / "scales.npy")  # (T,)
        self.offsets = _load_optional(data / "offsets.npy")  # (N + 1,)
        self.words = _load_optional(data / "words.npy")  # (T,)
        codec = data / "codec.faiss"
        self._codec = faiss.read_index(str(codec)) if codec.is_file() else None
        super().__init__(self.description["documents"], *open_ids(data))
        if ranker is not None:
            check_model(self.description, ranker, self.folder)

    @classmethod
    def build(
        cls,
        ranker: Ranker,
        documents: TextStore,
        folder: str | Path,
        storage: str = "float32",
        overwrite: bool = False,
    ) -> "VectorStore":
        """Encode a collection.

        After an interruption the same call resumes and gives the same bytes; when the store is complete, it opens it.
        Under `accelerate launch` the processes share the work; all must make the same call.

        Args:
            ranker: a ranker whose documents can be encoded without the query.
            documents: the collection; an id that appears twice is encoded once.
            storage: "float32", "float16", or "int8" (with a factor per vector).
            overwrite: True replaces an existing store; its readers keep the old one.

        Raises:
            FileExistsError: if the folder contains other vectors and `overwrite` is False, or other files.
            InputError: if documents need the query, unfinished work has other inputs, or a value exceeds the storage.
        """
        folder = Path(folder)
        if storage not in STORAGES:
            raise InputError(f"Vectors are stored as one of {', '.join(STORAGES)}, got {storage!r}.")
        if storage == "int8" and ranker.model.config.vectors_per_text == "sparse":
            raise InputError("The weights of sparse vectors are stored in float32 or float16, got 'int8'.")
        description = {**model_identity(ranker), "kind": "vectors", "storage": storage}
        description |= {"dimension": vector_dimension(ranker), "collection": documents.fingerprint()}
        is_complete = has_description(folder) and description.items() <= read_description(folder).items()
        if overwrite or not is_complete:
            refuse_replacing(folder, "vectors", overwrite)
            _write_store(ranker, documents, folder, description)
        return cls(folder, ranker, is_verified=False)

    @classmethod
    def open(cls, folder: str | Path, ranker: Ranker | None = None, is_verified: bool = True) -> "VectorStore":
        """Open a store, see `Index`; without a ranker its vectors can only be read."""
        return cls(folder, ranker, is_verified)

    def compress(self, folder: str | Path, factory: str, seed: int = 0, overwrite: bool = False) -> "VectorStore":
        """Write the same vectors as codes of a faiss codec, which every look-up decodes.

        Args:
            folder: the folder of the new store.
            factory: in faiss' notation: "IVF256,SQ4" is the nearest of 256 centroids and 4 bits per value for the
                residual (as in ColBERTv2), "PQ64" 64 bytes per vector.
            seed: seed of the choice of vectors that the codec is trained on.
            overwrite: True replaces an existing store.

        Raises:
            FileExistsError: as of `build`.
            InputError: if faiss cannot build the codec, or the vectors are sparse.
        """
        if self.words is not None:
            raise InputError(f"The vectors in {self.folder} are sparse, which faiss cannot compress.")
        codec = train_index(self, factory, seed)
        codes = (codec.sa_encode(vectors) for _, _, vectors in self.chunks())
        refuse_replacing(Path(folder), "vectors", overwrite)
        with new_version(Path(folder), self.description | {"storage": factory}) as data:
            _write_vectors(data, codes, "uint8", (len(self.values), codec.sa_code_size()))
            faiss.write_index(codec, str(data / "codec.faiss"))
            if self.offsets is not None:
                np.save(data / "offsets.npy", self.offsets)
            self.save_ids(data)
        return type(self)(folder, self.ranker, is_verified=False)

    def sample(self, count: int, seed: int) -> np.ndarray:
        """Return about `count` of the vectors, those of random documents; (S, D) float32."""
        documents = max(1, count * len(self) // max(len(self.values), 1))
        vectors = self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:documents]))
        return np.concatenate(vectors) if self.has_token_vectors else vectors

    @property
    def collection(self) -> Collection:
        """The collection that was encoded."""
        return Collection.of(self.description)

    @property
    def cuts(self) -> dict[str, float]:
        """Shares of the texts and tokens that were cut, see `Cuts.shares`; empty if they are not known."""
        return {name: self.description[name] for name in ("cut_texts", "cut_tokens") if name in self.description}

    @property
    def has_token_vectors(self) -> bool:
        """Whether every token has a vector."""
        return self.offsets is not None and self.words is None

    @property
    def identity(self) -> dict[str, str]:
        """The vectors, their model and their collection, for the description of an index."""
        names = ("architecture", "model_dtype", "model")
        made_from = {**self.collection.describe(), "vectors": self.description["checksum"]}
        return {name: self.description[name] for name in names} | made_from

    @property
    def bytes_per_document(self) -> float:
        """Size on disk without the ids."""
        arrays = (self.values, self.scales, self.offsets, self.words)
        return sum(array.nbytes for array in arrays if array is not None) / len(self)

    def take(self, rows: np.ndarray) -> np.ndarray | csr_array | list[np.ndarray]:
        """Return the vectors of some rows, float32: (N, D), sparse if they are, or a list of (L, D)."""
        if self.offsets is None:
            return self._unpack(np.asarray(rows))
        if self.words is not None:
            lengths, places = self._places(rows)
            values = self.values[places].astype(np.float32)
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            return csr_array((values, self.words[places], offsets), (len(lengths), self.dimension))
        if len(rows) == 0:
            return []
        lengths, vectors = self.take_tokens(rows)
        return np.split(vectors, np.cumsum(lengths)[:-1])

    def take_tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of token vectors of some rows, (N,), and the vectors one after another, (T, D) float32."""
        lengths, places = self._places(rows)
        return lengths, self._unpack(places)

    def _places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how many values some rows have, (N,), and where they are stored, one after another, (T,)."""
        firsts = self.offsets[rows]
        lengths = self.offsets[np.asarray(rows) + 1] - firsts
        return lengths, np.arange(lengths.sum()) + np.repeat(firsts - np.cumsum(lengths) + lengths, lengths)

    def matrix(self) -> csr_array:
        """Return all sparse vectors, (N, V) float32, in memory."""
        values = np.asarray(self.values, dtype=np.float32)
        return csr_array((values, self.words, self.offsets), (len(self), self.dimension))

    def chunks(self, size: int = CHUNK_SIZE) -> Iterator[Chunk]:
        """Yield about `size` vectors at once, in order."""
        offsets = np.arange(len(self) + 1) if self.offsets is None else self.offsets
        start = 0
        while start < len(self):
            stop = int(np.searchsorted(offsets, offsets[start] + size, side="right")) - 1
            stop = max(stop, start + 1)
            yield start, np.diff(offsets[start : stop + 1]), self._unpack(slice(offsets[start], offsets[stop]))
            start = stop

    def _unpack(self, chosen: slice | np.ndarray) -> np.ndarray:
        if self._codec is not None:
            return self._codec.sa_decode(np.ascontiguousarray(self.values[chosen]))
        vectors = self.values[chosen].astype(np.float32)  # also copies what is mapped
        if self.scales is None:
            return vectors
        return vectors * self.scales[chosen][:, None]


def _write_store(ranker: Ranker, documents: TextStore, folder: Path, description: dict) -> None:
    """Encode in blocks, which survive an interruption and are shared among the processes of a job, and join them."""
    inputs = description | {"per_block": DOCUMENTS_PER_BLOCK}
    description = description | {"documents": len(documents), **documents.collection.describe()}

    def encode_block(block: slice) -> dict[str, np.ndarray]:
        texts, before = documents.take(np.arange(block.start, block.stop)), Cuts(ranker.processor.cuts)
        settings = {"batch_size": ranker.batch_size, "tokens_per_batch": ranker.tokens_per_batch, "description": None}
        vectors = encode_texts(ranker.model, ranker.processor, "document", texts, **settings)
        arrays = {}
        if issparse(vectors):
            arrays |= {"lengths": np.diff(vectors.indptr), "words": vectors.indices}
            vectors = vectors.data
        elif isinstance(vectors, list):  # (L, D) each
            arrays["lengths"] = np.array([len(tokens) for tokens in vectors])
            vectors = np.concatenate(vectors)
        arrays["vectors"], scales = pack(vectors, description["storage"])
        if scales is not None:
            arrays["scales"] = scales
        arrays["cuts"] = ranker.processor.cuts.since(before)
        return arrays

    with work_folder(folder, lambda _: inputs) as work:
        blocks, _ = compute_blocks(work, len(documents), DOCUMENTS_PER_BLOCK, encode_block, "Encoding", "passage")
        if processes().is_main_process:
            description |= Cuts.total(read_blocks(blocks, "cuts")).shares(ranker.model.config.max_document_length)
            with new_version(folder, description) as data:
                _write_blocks(blocks, data, description)
                IdIndex.build(documents.columns()).save_ids(data)


def pack(vectors: np.ndarray, storage: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Convert vectors, (T, D) or (T,) float32, to one of `STORAGES`; an InputError says if a value does not fit.

    For int8 the factor of each vector, (T,) float32, is returned as well: its largest value / 127.
    """
    scales = None
    if storage == "int8":
        scales = np.abs(vectors).max(1, initial=0.0) / np.float32(127)
        values = np.rint(vectors / np.where(scales == 0, 1, scales)[:, None])
    else:
        with np.errstate(over="ignore"):
            values = vectors.astype(storage, copy=False)
    if not np.isfinite(values).all():
        raise InputError(f"A vector has a value that is not finite in {storage}; store float32, or encode in float32.")
    return values.astype(storage, copy=False), scales


def _write_blocks(blocks: Sequence[Path], data: Path, description: dict) -> None:
    """Write encoded blocks as one array of vectors, and where the vectors of each document begin."""
    collected = {name: read_blocks(blocks, name) for name in ("lengths", "scales", "words")}
    count = description["documents"]
    if collected["lengths"]:
        offsets = np.cumsum(np.concatenate([[0], *collected["lengths"]]))
        count = int(offsets[-1])
        np.save(data / "offsets.npy", offsets)
    for name in ("scales", "words"):
        if collected[name]:
            np.save(data / f"{name}.npy", np.concatenate(collected[name]))
    vectors = (np.load(path)["vectors"] for path in blocks)
    shape = (count,) if collected["words"] else (count, description["dimension"])
    _write_vectors(data, vectors, description["storage"], shape)


def _write_vectors(data: Path, arrays: Iterable[np.ndarray], dtype: str, shape: tuple[int, ...]) -> None:
    """Write arrays one after another as one array; not mapped, so that a full disk is an error."""
    with (data / "vectors.npy").open("wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for array in arrays:
            file.write(np.ascontiguousarray(array).data)


def _load_optional(path: Path) -> np.ndarray | None:
    return map_array(path) if path.is_file() else None


def vector_dimension(ranker: Ranker) -> int:
    """Return the number of values of a document's vectors; an InputError if it has none without the query."""
    (probe,) = encode_texts(ranker.model, ranker.processor, "document", [""], description=None)
    return probe.shape[-1]


def check_factory(factory: str, dimension: int, count: int) -> None:
    """Refuse, before any vectors are made, a factory that cannot index so many of them.

    Raises:
        InputError: if faiss does not know the factory, or its quantisers need more vectors.
    """
    problem = f"faiss cannot build {factory!r} over {count:,} vectors"
    with faiss_errors(problem):
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    needed, inverted = 0, faiss.try_extract_index_ivf(index)
    if inverted is not None:
        needed = inverted.nlist
        index = faiss.downcast_index(inverted)
    if isinstance(index, faiss.IndexPQ | faiss.IndexIVFPQ):
        needed = max(needed, index.pq.ksub)
    if count < needed:
        raise InputError(f"{problem}: it needs at least {needed:,}, one for each of its centroids.")


def train_index(store: VectorStore, factory: str, seed: int) -> faiss.Index:
    """Return an empty inner-product index for the vectors of a store, its quantisers trained on a sample of them.

    An InputError says if faiss does not know the factory, or if it needs more vectors.
    """
    with faiss_errors(f"faiss cannot build {factory!r} over {len(store.values):,} vectors"):
        index = faiss.index_factory(store.dimension, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(store.sample(TRAINING_VECTORS, seed))
    return index


@contextmanager
def faiss_errors(message: str, error_type: type[Exception] = InputError) -> Iterator[None]:
    """Add a message to the errors of faiss, and leave out the line of its source that they name first."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition(": ")[2]
        raise error_type(f"{message}: {reason}") from None
