"""The one scoring and encoding loop: length-sorted batches, results in the order of the input.

Everything that scores outside training calls it: the ranker, the evaluators, the teachers, the indexes.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import xxhash
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from .models import RankerModel, RankingProcessor, TokenLists
from .processes import processes

# Texts tokenised, and so sorted by length, at once. Bounds memory on long inputs: all query vectors of a block of
# pairs are held, up to 0.1 MB each where every term has one.
BLOCK_SIZE = 4_096
# Work below this many texts finishes before anyone wonders: no progress bar.
PROGRESS_FROM = 2_000


def score_pairs(
    model: RankerModel,
    tokenizer: RankingProcessor,
    queries: Sequence[str],
    documents: Sequence[str],
    batch_size: int = 64,
    is_distributed: bool = False,
    description: str | None = "Scoring",
) -> np.ndarray:
    """Score query i with document i.

    Rankers that encode the sides apart encode each distinct text of a block once, and hold the vectors of one batch of
    documents at a time.

    Args:
        batch_size: texts (or pairs) a forward.
        is_distributed: True shares the pairs among the processes of an `accelerate` job; all must call with the same
            arguments, all get all scores.
        description: of the progress bar, which long work shows; None for none.

    Returns:
        (N,) float32.

    Raises:
        ValueError: if the numbers of queries and documents differ, or a score is no finite number.
    """
    if len(queries) != len(documents):
        raise ValueError(f"Scoring pairs needs one document a query, got {len(queries)} and {len(documents)}.")

    def score_block(start: int, stop: int) -> list[np.ndarray]:
        block = queries[start:stop], documents[start:stop]
        is_apart = not tokenizer.joins_texts and model.config.is_storable
        return (_score_apart if is_apart else _score_together)(model, tokenizer, *block, batch_size)

    scores = np.asarray(_over_blocks(model, len(queries), score_block, is_distributed, description))
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(
            f"The score of pair {bad} is {scores[bad]} (query {queries[bad][:60]!r}); the model's weights "
            f"or its dtype ({model.dtype}) overflow: try float32."
        )
    return scores


def encode_texts(
    model: RankerModel,
    tokenizer: RankingProcessor,
    side: str,
    texts: Sequence[str],
    batch_size: int = 64,
    is_distributed: bool = False,
    description: str = "Encoding",
) -> np.ndarray | list[np.ndarray]:
    """Vectors of texts in the order given, float32.

    Args:
        side: "query" or "document".

    Returns:
        (N, D); where every term has a vector, a list of one (L, D) a text without its padding.

    Raises:
        ValueError: if the ranker's documents cannot be encoded without their query.
    """
    if tokenizer.joins_texts:
        raise ValueError(
            f"{type(model).__name__} reads query and document as one sequence and has no vectors of either."
        )

    def encode_block(start: int, stop: int) -> list[np.ndarray]:
        return _encode(model, tokenizer, side, texts[start:stop], batch_size)

    vectors = _over_blocks(model, len(texts), encode_block, is_distributed, description)
    return np.stack(vectors) if vectors[0].ndim == 1 else vectors


def score_stored(
    model: RankerModel, query: np.ndarray, documents: np.ndarray | Sequence[np.ndarray], batch_size: int = 64
) -> np.ndarray:
    """Score one query with documents that were encoded ahead, as `encode_texts` returned them or in another dtype.

    Args:
        query: (D,), or (Lq, D) where every term has a vector.
        documents: (N, D), which are scored at once, or N of (Ld, D).
        batch_size: documents a forward, similar lengths together.

    Returns:
        (N,) float32.
    """
    query_vectors, query_mask = _stacked([query], model.device)
    with torch.inference_mode():
        if query.ndim == 1:
            vectors = torch.from_numpy(np.asarray(documents)).to(model.device)
            return model.score_vectors(query_vectors, vectors.unsqueeze(0))[0].cpu().numpy()
        scores = np.empty(len(documents), dtype=np.float32)
        order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            vectors, mask = _stacked([documents[row] for row in rows], model.device)
            scores[rows] = model.score_vectors(query_vectors, vectors.unsqueeze(0), query_mask, mask.unsqueeze(0))[
                0
            ].cpu()
    return scores


def fingerprint(model: nn.Module, *settings: object) -> str:
    """A short name of weights and settings, the same on every device: changes if any of them does."""
    digest = xxhash.xxh3_128(repr(settings).encode())
    for name, tensor in model.state_dict().items():
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _over_blocks(
    model: RankerModel,
    count: int,
    compute: Callable[[int, int], list[np.ndarray]],
    is_distributed: bool,
    description: str | None,
) -> list[np.ndarray]:
    """Run `compute` over blocks of 0..count, this process's share of them, and gather the results in order."""
    if count == 0:
        raise ValueError(f"{description or 'Scoring'} needs at least one text, got none.")
    state = processes() if is_distributed else None
    rank, world = (state.process_index, state.num_processes) if state else (0, 1)
    start, stop = count * rank // world, count * (rank + 1) // world
    was_training = model.training
    model.eval()
    results = []
    try:
        with (
            torch.inference_mode(),
            tqdm(
                total=stop - start,
                desc=description,
                unit="text",
                disable=description is None or rank > 0 or count < PROGRESS_FROM,
            ) as progress,
        ):
            for block in range(start, stop, BLOCK_SIZE):
                end = min(block + BLOCK_SIZE, stop)
                results += compute(block, end)
                progress.update(end - block)
    finally:
        model.train(was_training)
    return gather_object(results) if world > 1 else results


def _score_together(
    model: RankerModel, tokenizer: RankingProcessor, queries: Sequence[str], documents: Sequence[str], batch_size: int
) -> list[np.ndarray]:
    """Each document with its query: one sequence (BERT_CAT), or two of which one depends on the other (PreTTR)."""
    joins, scores = tokenizer.joins_texts, np.empty(len(queries), dtype=np.float32)
    query_tokens = None if joins else tokenizer.queries(queries)
    tokens = tokenizer.pairs(queries, documents) if joins else tokenizer.documents(documents)
    for rows, batch in _sorted_batches(tokens, tokenizer, batch_size, model.device):
        if not joins:
            batch = {"query": _padded(query_tokens, rows, tokenizer, model.device), "document": batch}
        scores[rows] = model(**batch).scores.cpu()
    return list(scores)


def _score_apart(
    model: RankerModel, tokenizer: RankingProcessor, queries: Sequence[str], documents: Sequence[str], batch_size: int
) -> list[np.ndarray]:
    """Distinct queries first, then batches of distinct documents, each with the queries that it is paired with."""
    query_texts, query_of = np.unique(np.asarray(queries, dtype=object), return_inverse=True)
    document_texts, document_of = np.unique(np.asarray(documents, dtype=object), return_inverse=True)
    query_vectors = _encode(model, tokenizer, "query", list(query_texts), batch_size)
    by_document = np.argsort(document_of, kind="stable")  # pairs, those of one document together
    first_pair = np.searchsorted(document_of[by_document], np.arange(len(document_texts) + 1))
    scores = np.empty(len(queries), dtype=np.float32)
    tokens = tokenizer.documents(list(document_texts))
    for rows, batch in _sorted_batches(tokens, tokenizer, batch_size, model.device):
        output = model(document=batch)
        pairs = np.concatenate([by_document[first_pair[row] : first_pair[row + 1]] for row in rows])
        places = np.repeat(np.arange(len(rows)), first_pair[np.asarray(rows) + 1] - first_pair[rows])
        for start in range(0, len(pairs), batch_size):
            chosen, place = pairs[start : start + batch_size], torch.from_numpy(places[start : start + batch_size])
            query, query_mask = _stacked([query_vectors[i] for i in query_of[chosen]], model.device)
            document_mask = None if output.document_mask is None else output.document_mask[place]
            scores[chosen] = model.score_vectors(
                query, output.document_vectors[place], query_mask, document_mask
            ).cpu()
    return list(scores)


def _encode(
    model: RankerModel, tokenizer: RankingProcessor, side: str, texts: Sequence[str], batch_size: int
) -> list[np.ndarray]:
    """The vector of each text, (D,); or of each of its terms, (L, D)."""
    tokens = tokenizer.queries(texts) if side == "query" else tokenizer.documents(texts)
    results: list[np.ndarray] = [None] * len(texts)
    for rows, batch in _sorted_batches(tokens, tokenizer, batch_size, model.device):
        output = model(**{side: batch})
        vectors, mask = output[f"{side}_vectors"].float().cpu(), output.get(f"{side}_mask")
        for place, row in enumerate(rows):
            terms = vectors[place] if mask is None else vectors[place][mask[place].cpu()]
            results[row] = terms.numpy()
    return results


def _sorted_batches(
    tokens: TokenLists, tokenizer: RankingProcessor, batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Rows and padded inputs; similar lengths together, longest first (memory runs out at once or not at all)."""
    order = sorted(range(len(tokens["input_ids"])), key=lambda i: -len(tokens["input_ids"][i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, _padded(tokens, rows, tokenizer, device)


def _padded(
    tokens: TokenLists, rows: Sequence[int], tokenizer: RankingProcessor, device: torch.device
) -> dict[str, Tensor]:
    batch = tokenizer.pad({name: [values[i] for i in rows] for name, values in tokens.items()})
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _stacked(vectors: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Vectors of several texts as one tensor, (N, D) or padded (N, L, D), and the mask of the terms."""
    tensors = [torch.from_numpy(vector) for vector in vectors]
    if tensors[0].dim() == 1:
        return torch.stack(tensors).to(device), None
    lengths = torch.tensor([len(tensor) for tensor in tensors], device=device)
    padded = pad_sequence(tensors, batch_first=True).to(device)
    return padded, torch.arange(padded.shape[1], device=device) < lengths.unsqueeze(1)
