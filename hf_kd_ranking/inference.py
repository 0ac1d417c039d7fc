"""The one scoring and encoding loop: length-sorted batches, results in the order of the input.

Only training has its own loop. A thread tokenises and pads the next batches while the model computes the present one.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from accelerate.utils import gather_object
from scipy.sparse import csr_array, issparse, vstack
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from .batches import Batcher, fetched, longest_first
from .errors import InputError
from .models import RankerModel, RankingProcessor, TokenLists
from .processes import processes

QUERIES_AT_ONCE = 4_096
# Bytes of the query vectors that are held while documents are scored; each document is encoded once for all of them.
QUERY_BYTES = 2**30
PROGRESS_FROM = 2_000  # texts; less work is so short that it needs no progress bar
_MODE_LOCK = threading.Lock()
_MODELS_IN_USE: dict[nn.Module, tuple[int, bool]] = {}  # model -> threads that use it, and its mode before


def score_pairs(
    model: RankerModel,
    processor: RankingProcessor,
    queries: Sequence[str],
    documents: Sequence[str],
    batch_size: int = 64,
    is_distributed: bool = False,
    description: str | None = "Scoring",
    tokens_per_batch: int | None = None,
) -> np.ndarray:
    """Score query i with document i; a ranker that encodes the sides separately encodes each distinct text once.

    Args:
        batch_size: texts (or pairs) per forward pass.
        is_distributed: True shares the pairs among the processes of an `accelerate` job; all must call with the same
            arguments, all get all scores.
        description: title of the progress bar, which long work shows; None shows no progress bar.
        tokens_per_batch: tokens per forward pass, padding included, at least those of one text; it replaces
            `batch_size`. None reads `batch_size`.

    Returns:
        (N,) float32.

    Raises:
        InputError: if the numbers of queries and documents differ, or a score is not a finite number.
        TypeError: if either of them is one string.
    """
    check_pairs(queries, documents)
    loop = _Loop(model, Batcher(processor, model.device, batch_size, tokens_per_batch))
    if processor.joins_texts or not model.config.is_storable:
        lengths = [len(query) + len(document) for query, document in zip(queries, documents, strict=True)]
        rows = _share(longest_first(lengths), is_distributed)
        results = loop.score_jointly(queries, documents, rows)
    else:
        rows = _pairs_by_document(documents, is_distributed)
        results = loop.score_separately(queries, documents, rows)
    scores = np.empty(len(queries), dtype=np.float32)
    for chosen, values in _run(model, fetched(results), len(rows), is_distributed, description):
        scores[chosen] = values
    is_finite = np.isfinite(scores)
    if not is_finite.all():
        bad = int(np.argmin(is_finite))
        problem = f"The score of pair {bad} is {scores[bad]} (query {queries[bad][:60]!r})"
        raise InputError(f"{problem}; the model's weights or its dtype ({model.dtype}) overflow: try float32.")
    return scores


def encode_texts(
    model: RankerModel,
    processor: RankingProcessor,
    side: str,
    texts: Sequence[str],
    batch_size: int = 64,
    is_distributed: bool = False,
    description: str | None = "Encoding",
    tokens_per_batch: int | None = None,
) -> np.ndarray | csr_array | list[np.ndarray]:
    """Encode texts in the order given.

    Args:
        side: "query" or "document".
        batch_size, is_distributed, description, tokens_per_batch: as in `score_pairs`.

    Returns:
        (N, D) float32, sparse if the ranker's vectors are; with one vector per token, a list of one (L, D) per text
        without its padding.

    Raises:
        InputError: if the ranker's documents cannot be encoded without their query.
        TypeError: if the texts are one string.
    """
    _check_texts(texts, "texts")
    if model.config.vectors_per_text == "none":
        raise InputError(f"{type(model).__name__} reads query and document as one sequence and has no vectors.")
    rows = _share(longest_first([len(text) for text in texts]), is_distributed)
    loop = _Loop(model, Batcher(processor, model.device, batch_size, tokens_per_batch))
    results = loop.encode(side, texts, rows)
    return _in_order(_run(model, fetched(results), len(rows), is_distributed, description), len(texts))


def check_pairs(queries: Sequence[str], documents: Sequence[str]) -> None:
    """Raise an InputError or a TypeError unless there is a list of one document per query."""
    _check_texts(queries, "queries")
    _check_texts(documents, "documents")
    if len(queries) != len(documents):
        raise InputError(f"Scoring pairs needs one document per query, got {len(queries)} and {len(documents)}.")


def _check_texts(texts: Sequence[str], what: str) -> None:
    if isinstance(texts, str | bytes):  # each letter would be a text
        raise TypeError(f"Needed a list of {what}, got the string {str(texts)[:60]!r}; put it into a list.")
    if not isinstance(texts, Sequence | np.ndarray):
        raise TypeError(f"Needed a list of {what}, got {type(texts).__name__} {str(texts)[:60]!r}.")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Needed strings as {what}, got {type(text).__name__} {str(text)[:60]!r} in place {row}.")


def fingerprint(model: nn.Module, *settings: object) -> str:
    """Return a short name of weights and settings, the same on every device: it changes if any of them does."""
    digest = xxhash.xxh3_128(repr(settings).encode())
    for name, tensor in model.state_dict().items():
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _share(rows: np.ndarray, is_distributed: bool) -> np.ndarray:
    """Return the rows of this process: of every length as many as the others have."""
    if not is_distributed:
        return rows
    return rows[processes().process_index :: processes().num_processes]


def _pairs_by_document(documents: Sequence[str], is_distributed: bool) -> np.ndarray:
    """Return the pairs whose documents this process encodes, those of one document in a row, longest first."""
    numbers: dict[str, int] = {}
    document_of_pair = np.array([numbers.setdefault(text, len(numbers)) for text in documents])
    order = longest_first([len(text) for text in numbers])
    place = np.full(len(numbers), -1)  # of the documents of other processes
    share = _share(order, is_distributed)
    place[share] = np.arange(len(share))
    pairs = np.argsort(place[document_of_pair], kind="stable")
    return pairs[place[document_of_pair][pairs] >= 0]


def _run(
    model: RankerModel,
    results: Iterator[tuple],
    total: int,
    is_distributed: bool,
    description: str | None,
) -> list[tuple]:
    """Compute the results of this process, rows and values, and return those of all processes."""
    rank, world = 0, 1
    if is_distributed:
        rank, world = processes().process_index, processes().num_processes
    is_quiet = description is None or rank > 0 or total * world < PROGRESS_FROM
    progress = tqdm(total=total, desc=description, unit="text", disable=is_quiet)
    batches = []
    with _evaluating(model), torch.inference_mode(), progress, closing(results):
        for rows, values, mask in results:
            batches.append(_as_arrays(model, rows, values, mask))
            progress.update(len(rows))
    return gather_object(batches) if world > 1 else batches


def _as_arrays(
    model: RankerModel, rows: np.ndarray, values: Tensor, mask: Tensor | None
) -> tuple[np.ndarray, np.ndarray | csr_array | list]:
    """Return rows with their scores or vectors in float32; of token vectors one (L, D) per row, without padding."""
    arrays = values.float().numpy()
    if arrays.ndim == 2 and model.config.vectors_per_text == "sparse":
        return rows, csr_array(arrays)
    if mask is None:
        return rows, arrays
    return rows, np.split(arrays[mask.numpy()], mask.sum(1).cumsum(0)[:-1].numpy())


def _in_order(batches: list[tuple], count: int) -> np.ndarray | csr_array | list[np.ndarray]:
    """Return the vectors of all rows, (count, D) or `count` of (L, D)."""
    if issparse(batches[0][1]) and count == 1:
        return batches[0][1]
    if issparse(batches[0][1]):
        order = np.argsort(np.concatenate([rows for rows, _ in batches]))
        return vstack([vectors for _, vectors in batches], format="csr")[order]
    is_list = isinstance(batches[0][1], list)
    result = [None] * count if is_list else np.empty((count, batches[0][1].shape[1]), dtype=np.float32)
    while batches:  # freed one by one, so that the vectors are not in memory twice
        rows, values = batches.pop()
        for row, vector in zip(rows, values, strict=True):
            result[row] = vector
    return result


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off; the last of the threads that use the model switches it on again, if it was on."""
    with _MODE_LOCK:
        threads, was_training = _MODELS_IN_USE.get(model, (0, model.training))
        _MODELS_IN_USE[model] = (threads + 1, was_training)
        # Setting the mode of every module takes as long as a query without an encoder.
        if any(module.training for module in model.modules()):
            model.eval()
    try:
        yield
    finally:
        with _MODE_LOCK:
            threads, was_training = _MODELS_IN_USE.pop(model)
            if threads > 1:
                _MODELS_IN_USE[model] = (threads - 1, was_training)
            elif was_training:
                model.train()


@dataclass(frozen=True)
class _Loop:
    """A model and what makes its batches; the methods yield rows, their results, and the masks of token vectors."""

    model: RankerModel
    batcher: Batcher

    @property
    def processor(self) -> RankingProcessor:
        return self.batcher.processor

    def score_jointly(self, queries: Sequence[str], documents: Sequence[str], rows: np.ndarray) -> Iterator[tuple]:
        """Score each document with its query: as one sequence, or since its vectors depend on the query."""

        def tokenize(chosen: np.ndarray) -> dict[str, TokenLists]:
            sides = [queries[row] for row in chosen], [documents[row] for row in chosen]
            if self.processor.joins_texts:
                return {"pair": self.processor.pairs(*sides)}
            return {"query": self.processor.queries(sides[0]), "document": self.processor.documents(sides[1])}

        with closing(self.batcher.batches(rows, tokenize)) as batches:
            for chosen, inputs in batches:
                yield chosen, self.model(**inputs.get("pair", inputs)).scores, None

    def score_separately(self, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray) -> Iterator[tuple]:
        """Encode distinct queries, as many as fit into memory, then the documents paired with them; and so on."""
        numbers: dict[str, int] = {}
        query_of_pair = np.array([numbers.setdefault(queries[pair], len(numbers)) for pair in pairs])
        texts, first = list(numbers), 0
        while first < len(texts):
            vectors = self._encode_queries(texts[first:])
            is_chosen = (query_of_pair >= first) & (query_of_pair < first + len(vectors))
            yield from self._score_documents(vectors, query_of_pair[is_chosen] - first, documents, pairs[is_chosen])
            first += len(vectors)

    def encode(self, side: str, texts: Sequence[str], rows: np.ndarray) -> Iterator[tuple]:
        """Encode one side."""

        def tokenize(chosen: np.ndarray) -> dict[str, TokenLists]:
            chosen_texts = [texts[row] for row in chosen]
            if side == "query":
                return {side: self.processor.queries(chosen_texts)}
            return {side: self.processor.documents(chosen_texts)}

        with closing(self.batcher.batches(rows, tokenize)) as batches:
            for chosen, inputs in batches:
                output = self.model(**inputs)
                yield chosen, output[f"{side}_vectors"], output.get(f"{side}_mask")

    def _encode_queries(self, texts: Sequence[str]) -> list[np.ndarray] | list[csr_array]:
        """Return the vectors of the first texts, until they have `QUERY_BYTES`; sparse vectors are small."""
        vectors: list = []
        for start in range(0, len(texts), QUERIES_AT_ONCE):
            block = texts[start : start + QUERIES_AT_ONCE]
            results = fetched(self.encode("query", block, longest_first([len(text) for text in block])))
            vectors += list(_in_order([_as_arrays(self.model, *result) for result in results], len(block)))
            if not issparse(vectors[0]) and sum(vector.nbytes for vector in vectors) >= QUERY_BYTES:
                break
        return vectors

    def _score_documents(
        self,
        query_vectors: list[np.ndarray] | list[csr_array],
        query_of_pair: np.ndarray,
        documents: Sequence[str],
        pairs: np.ndarray,
    ) -> Iterator[tuple]:
        """Encode the distinct documents of pairs, in which those of one document are in a row, and score the pairs."""
        texts, starts = [], []
        for place, pair in enumerate(pairs):
            if not texts or documents[pair] != texts[-1]:
                texts.append(documents[pair])
                starts.append(place)
        starts.append(len(pairs))
        queries = _Queries(query_vectors, self.model.device)

        def tokenize(chosen: np.ndarray) -> dict[str, TokenLists]:
            return {"document": self.processor.documents([texts[row] for row in chosen])}

        with closing(self.batcher.batches(np.arange(len(texts)), tokenize)) as batches:
            for rows, inputs in batches:
                output = self.model(**inputs)
                places, document_of = _places(rows, starts)
                size = max(len(rows), self.batcher.batch_size)
                for start in range(0, len(places), size):
                    chosen = places[start : start + size]
                    query, query_mask = queries.take(query_of_pair[chosen])
                    index = torch.from_numpy(document_of[start : start + size]).to(self.model.device)
                    mask = None if output.document_mask is None else output.document_mask[index]
                    scores = self.model.score_vectors(query, output.document_vectors[index], query_mask, mask)
                    yield pairs[chosen], scores, None


class _Queries:
    """The vectors of queries on the device of a model; sparse ones are stacked when they are taken."""

    def __init__(self, vectors: Sequence[np.ndarray] | Sequence[csr_array], device: torch.device) -> None:
        self._device = device
        self._sparse = vstack(vectors, format="csr") if issparse(vectors[0]) else None
        if self._sparse is None:
            self._lengths = np.array([len(vector) for vector in vectors])
            self._vectors, self._mask = stack_vectors(vectors, device)

    def take(self, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Return vectors, (n, D) or (n, L, D) with the L of the longest of them, and the mask of their tokens."""
        if self._sparse is not None:
            return torch.from_numpy(self._sparse[rows].toarray()).to(self._device), None
        index = torch.from_numpy(rows).to(self._vectors.device)
        if self._mask is None:
            return self._vectors[index], None
        width = self._lengths[rows].max()
        return self._vectors[index, :width], self._mask[index, :width]


def _places(rows: np.ndarray, starts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the pairs of documents, and for each the number of its document among `rows`."""
    places, numbers = [], []
    for number, row in enumerate(rows):
        places.append(np.arange(starts[row], starts[row + 1]))
        numbers.append(np.full(len(places[-1]), number))
    return np.concatenate(places), np.concatenate(numbers)


def stack_vectors(vectors: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Stack the vectors of texts as one tensor, (N, D) or padded (N, L, D), and return the mask of the tokens."""
    tensors = [torch.from_numpy(vector) for vector in vectors]
    if tensors[0].dim() == 1:
        return torch.stack(tensors).to(device), None
    lengths = torch.tensor([len(tensor) for tensor in tensors], device=device)
    padded = pad_sequence(tensors, batch_first=True).to(device)
    return padded, torch.arange(padded.shape[1], device=device) < lengths.unsqueeze(1)
