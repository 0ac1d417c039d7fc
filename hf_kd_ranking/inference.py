"""The one scoring and encoding loop: length-sorted batches, results in the order of the input.

Only training has its own loop.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import xxhash
from accelerate.utils import gather_object
from scipy.sparse import csr_array, issparse, vstack
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from .errors import InputError
from .models import RankerModel, RankingProcessor, TokenLists
from .processes import processes

# Texts tokenised, and so sorted by length, at once. Bounds memory: all query vectors of a block of pairs are held, up
# to 0.1 MB each with one vector per token.
BLOCK_SIZE = 4_096
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
) -> np.ndarray:
    """Score query i with document i.

    Args:
        batch_size: texts (or pairs) per forward pass.
        is_distributed: True shares the pairs among the processes of an `accelerate` job; all must call with the same
            arguments, all get all scores.
        description: title of the progress bar, which long work shows; None shows no progress bar.

    Returns:
        (N,) float32.

    Raises:
        InputError: if the numbers of queries and documents differ, or a score is not a finite number.
        TypeError: if either of them is one string.
    """
    check_pairs(queries, documents)

    def score_block(start: int, stop: int) -> list[np.ndarray]:
        block = (model, processor, queries[start:stop], documents[start:stop], batch_size)
        if processor.joins_texts or not model.config.is_storable:
            return _score_jointly(*block)
        return _score_separately(*block)

    scores = np.asarray(_over_blocks(model, len(queries), score_block, is_distributed, description))
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
    description: str = "Encoding",
) -> np.ndarray | csr_array | list[np.ndarray]:
    """Encode texts in the order given.

    Args:
        side: "query" or "document".

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

    def encode_block(start: int, stop: int) -> list[np.ndarray] | list[csr_array]:
        return _encode(model, processor, side, texts[start:stop], batch_size)

    vectors = _over_blocks(model, len(texts), encode_block, is_distributed, description)
    if model.config.vectors_per_text == "sparse":
        return vstack(vectors, format="csr")
    return vectors if model.config.vectors_per_text == "per_token" else np.stack(vectors)


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


def score_stored(
    model: RankerModel,
    query: np.ndarray | csr_array,
    documents: np.ndarray | csr_array | Sequence[np.ndarray],
    batch_size: int = 64,
) -> np.ndarray:
    """Score one query with documents that were encoded in advance by `encode_texts`, in any dtype; (N,) float32.

    Args:
        query: (D,), or (Lq, D) with one vector per token.
        documents: (N, D), which are scored at once, or N of (Ld, D).
        batch_size: documents per forward pass; those of similar length share one.
    """
    if issparse(documents):  # their similarity is the dot product
        return (documents @ query).toarray()
    query_vectors, query_mask = _stacked([query], model.device)
    with torch.inference_mode():
        if query_mask is None:
            vectors = torch.from_numpy(np.asarray(documents)).to(model.device)
            return model.score_vectors(query_vectors, vectors.unsqueeze(0))[0].cpu().numpy()
        scores = np.empty(len(documents), dtype=np.float32)
        order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            vectors, mask = _stacked([documents[row] for row in rows], model.device)
            batch = model.score_vectors(query_vectors, vectors.unsqueeze(0), query_mask, mask.unsqueeze(0))  # (1, n)
            scores[rows] = batch[0].cpu()
    return scores


def fingerprint(model: nn.Module, *settings: object) -> str:
    """Return a short name of weights and settings, the same on every device: it changes if any of them does."""
    digest = xxhash.xxh3_128(repr(settings).encode())
    for name, tensor in model.state_dict().items():
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _over_blocks(
    model: RankerModel, count: int, compute: Callable, is_distributed: bool, description: str | None
) -> list[np.ndarray]:
    """Run `compute` over this process's share of 0..count, in blocks, and gather the results in order."""
    if count == 0:
        raise InputError(f"{description or 'Scoring'} needs at least one text, got none.")
    rank, world = 0, 1
    if is_distributed:
        rank, world = processes().process_index, processes().num_processes
    start, stop = count * rank // world, count * (rank + 1) // world
    is_quiet = description is None or rank > 0 or count < PROGRESS_FROM
    progress = tqdm(total=stop - start, desc=description, unit="text", disable=is_quiet)
    results = []
    with _evaluating(model), torch.inference_mode(), progress:
        for block in range(start, stop, BLOCK_SIZE):
            end = min(block + BLOCK_SIZE, stop)
            results += compute(block, end)
            progress.update(end - block)
    return gather_object(results) if world > 1 else results


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off; the last of the threads that use the model switches it on again, if it was on."""
    with _MODE_LOCK:
        threads, was_training = _MODELS_IN_USE.get(model, (0, model.training))
        _MODELS_IN_USE[model] = (threads + 1, was_training)
        model.eval()
    try:
        yield
    finally:
        with _MODE_LOCK:
            threads, was_training = _MODELS_IN_USE.pop(model)
            if threads > 1:
                _MODELS_IN_USE[model] = (threads - 1, was_training)
            else:
                model.train(was_training)


def _score_jointly(
    model: RankerModel, processor: RankingProcessor, queries: Sequence[str], documents: Sequence[str], batch_size: int
) -> list[np.ndarray]:
    """Score each document with its query: as one sequence, or since its vectors depend on the query."""
    scores = np.empty(len(queries), dtype=np.float32)
    if processor.joins_texts:
        tokens = processor.pairs(queries, documents)
    else:
        query_tokens, tokens = processor.queries(queries), processor.documents(documents)
    for rows, batch in _sorted_batches(tokens, processor, batch_size, model.device):
        if not processor.joins_texts:
            batch = {"query": _padded(query_tokens, rows, processor, model.device), "document": batch}
        scores[rows] = model(**batch).scores.cpu()
    return list(scores)


def _score_separately(
    model: RankerModel, processor: RankingProcessor, queries: Sequence[str], documents: Sequence[str], batch_size: int
) -> list[np.ndarray]:
    """Encode distinct queries once, then batches of distinct documents, which are scored with the queries paired."""
    query_texts, query_of_pair = np.unique(np.asarray(queries, dtype=object), return_inverse=True)
    document_texts, document_of_pair = np.unique(np.asarray(documents, dtype=object), return_inverse=True)
    query_vectors = _encode(model, processor, "query", list(query_texts), batch_size)
    by_document = np.argsort(document_of_pair, kind="stable")  # pairs, those of one document in a row
    first_pair = np.searchsorted(document_of_pair[by_document], np.arange(len(document_texts) + 1))
    scores = np.empty(len(queries), dtype=np.float32)
    tokens = processor.documents(list(document_texts))
    for rows, batch in _sorted_batches(tokens, processor, batch_size, model.device):
        output = model(document=batch)
        pairs = np.concatenate([by_document[first_pair[row] : first_pair[row + 1]] for row in rows])
        places = np.repeat(np.arange(len(rows)), first_pair[np.asarray(rows) + 1] - first_pair[rows])
        for start in range(0, len(pairs), batch_size):
            chosen = pairs[start : start + batch_size]
            place = torch.from_numpy(places[start : start + batch_size])
            query, query_mask = _stacked([query_vectors[i] for i in query_of_pair[chosen]], model.device)
            document_mask = None if output.document_mask is None else output.document_mask[place]
            batch_scores = model.score_vectors(query, output.document_vectors[place], query_mask, document_mask)
            scores[chosen] = batch_scores.cpu()
    return list(scores)


def _encode(
    model: RankerModel, processor: RankingProcessor, side: str, texts: Sequence[str], batch_size: int
) -> list[np.ndarray] | list[csr_array]:
    """Return the vector of each text, (D,) or sparse (1, D), or those of its tokens, (L, D)."""
    tokens = processor.queries(texts) if side == "query" else processor.documents(texts)
    results: list = [None] * len(texts)
    for rows, batch in _sorted_batches(tokens, processor, batch_size, model.device):
        output = model(**{side: batch})
        vectors, mask = output[f"{side}_vectors"].float().cpu(), output.get(f"{side}_mask")
        if model.config.vectors_per_text == "sparse":
            matrix = csr_array(vectors.numpy())
            for place, row in enumerate(rows):
                results[row] = matrix[[place]]
            continue
        for place, row in enumerate(rows):
            text_vectors = vectors[place] if mask is None else vectors[place][mask[place].cpu()]
            results[row] = text_vectors.numpy()
    return results


def _sorted_batches(
    tokens: TokenLists, processor: RankingProcessor, batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield rows and padded inputs; similar lengths share a batch, longest first: memory runs out at once or never."""
    order = sorted(range(len(tokens["input_ids"])), key=lambda i: -len(tokens["input_ids"][i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, _padded(tokens, rows, processor, device)


def _padded(
    tokens: TokenLists, rows: Sequence[int], processor: RankingProcessor, device: torch.device
) -> dict[str, Tensor]:
    chosen = {}
    for name, values in tokens.items():
        chosen[name] = [values[row] for row in rows]
    return {name: tensor.to(device) for name, tensor in processor.pad(chosen).items()}


def _stacked(
    vectors: Sequence[np.ndarray] | Sequence[csr_array], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Stack the vectors of texts as one tensor, (N, D) or padded (N, L, D), and return the mask of the tokens."""
    if issparse(vectors[0]):
        return torch.from_numpy(vstack(vectors).toarray()).to(device), None
    tensors = [torch.from_numpy(vector) for vector in vectors]
    if tensors[0].dim() == 1:
        return torch.stack(tensors).to(device), None
    lengths = torch.tensor([len(tensor) for tensor in tensors], device=device)
    padded = pad_sequence(tensors, batch_first=True).to(device)
    return padded, torch.arange(padded.shape[1], device=device) < lengths.unsqueeze(1)
