"""The one scoring and encoding loop: length-sorted batches, results in the order of the input.

Everything that scores outside training calls it: the ranker, the evaluators, the teachers, the indexes.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from .data.collate import RankingTokenizer, TokenLists
from .models import RankerModel

# Texts tokenised, and so sorted by length, at once; bounds memory on long inputs.
BLOCK_SIZE = 16_384
# Work below this many texts finishes before anyone wonders: no progress bar.
PROGRESS_FROM = 2_000


def score_pairs(
    model: RankerModel,
    tokenizer: RankingTokenizer,
    queries: Sequence[str],
    documents: Sequence[str],
    batch_size: int = 64,
    is_distributed: bool = False,
    description: str = "Scoring",
) -> np.ndarray:
    """Score query i with document i.

    Rankers that encode the sides apart encode each distinct text of a block once.

    Args:
        batch_size: texts (or pairs) a forward.
        is_distributed: True shares the pairs among the processes of an `accelerate` job; all must call with the same
            arguments, all get all scores.
        description: of the progress bar.

    Returns:
        (N,) float32.

    Raises:
        ValueError: if the numbers of queries and documents differ, or a score is no finite number.
    """
    if len(queries) != len(documents):
        raise ValueError(f"Scoring pairs needs one document a query, got {len(queries)} and {len(documents)}.")

    def score_block(start: int, stop: int) -> np.ndarray:
        block = queries[start:stop], documents[start:stop]
        if tokenizer.joins_texts:
            return _forward_sorted(
                tokenizer.pairs(*block), tokenizer, lambda batch: model(**batch).scores, model.device, batch_size
            )
        query_vectors, query_rows = _encode_distinct(model, tokenizer, "query", block[0], batch_size)
        document_vectors, document_rows = _encode_distinct(model, tokenizer, "document", block[1], batch_size)
        scores = [
            model.score_vectors(
                torch.from_numpy(query_vectors[query_rows[i : i + BLOCK_SIZE // 16]]),
                torch.from_numpy(document_vectors[document_rows[i : i + BLOCK_SIZE // 16]]),
            )
            for i in range(0, len(query_rows), BLOCK_SIZE // 16)
        ]
        return torch.cat(scores).numpy()

    scores = _over_blocks(model, len(queries), score_block, is_distributed, description)
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(
            f"The score of pair {bad} is {scores[bad]} (query {queries[bad][:60]!r}); the model's weights "
            f"or its dtype ({model.dtype}) overflow: try float32."
        )
    return scores


def encode_texts(
    model: RankerModel,
    tokenizer: RankingTokenizer,
    side: str,
    texts: Sequence[str],
    batch_size: int = 64,
    is_distributed: bool = False,
    description: str = "Encoding",
) -> np.ndarray:
    """Vectors of texts, (N, H) float32, in the order given.

    Args:
        side: "query" or "document".

    Raises:
        ValueError: if the ranker reads query and document together, so that there is nothing to encode alone.
    """
    if tokenizer.joins_texts:
        raise ValueError(
            f"{type(model).__name__} reads query and document as one sequence and has no vectors of either."
        )

    def encode_block(start: int, stop: int) -> np.ndarray:
        return _encode(model, tokenizer, side, texts[start:stop], batch_size)

    return _over_blocks(model, len(texts), encode_block, is_distributed, description)


def _over_blocks(
    model: RankerModel, count: int, compute: Callable[[int, int], np.ndarray], is_distributed: bool, description: str
) -> np.ndarray:
    """Run `compute` over blocks of 0..count, this process's share of them, and gather the results in order."""
    if count == 0:
        raise ValueError(f"{description} needs at least one text, got none.")
    state = PartialState() if is_distributed else None
    rank, world = (state.process_index, state.num_processes) if state else (0, 1)
    start, stop = count * rank // world, count * (rank + 1) // world
    was_training = model.training
    model.eval()
    results = []
    try:
        with (
            torch.inference_mode(),
            tqdm(
                total=stop - start, desc=description, unit="text", disable=rank > 0 or count < PROGRESS_FROM
            ) as progress,
        ):
            for block in range(start, stop, BLOCK_SIZE):
                end = min(block + BLOCK_SIZE, stop)
                results.append(compute(block, end))
                progress.update(end - block)
    finally:
        model.train(was_training)
    return np.concatenate(gather_object(results) if world > 1 else results)


def _encode_distinct(
    model: RankerModel, tokenizer: RankingTokenizer, side: str, texts: Sequence[str], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the distinct texts, and for each text the row of its vector."""
    row_of: dict[str, int] = {}
    rows = np.asarray([row_of.setdefault(text, len(row_of)) for text in texts])
    return _encode(model, tokenizer, side, list(row_of), batch_size), rows


def _encode(
    model: RankerModel, tokenizer: RankingTokenizer, side: str, texts: Sequence[str], batch_size: int
) -> np.ndarray:
    tokens = tokenizer.queries(texts) if side == "query" else tokenizer.documents(texts)

    def forward(batch: dict[str, Tensor]) -> Tensor:
        return model(**{side: batch})[f"{side}_vectors"]

    return _forward_sorted(tokens, tokenizer, forward, model.device, batch_size)


def _forward_sorted(
    tokens: TokenLists,
    tokenizer: RankingTokenizer,
    forward: Callable[[dict[str, Tensor]], Tensor],
    device: torch.device,
    batch_size: int,
) -> np.ndarray:
    """Batches of similar lengths, longest first (memory runs out at once or not at all); results in input order."""
    order = sorted(range(len(tokens["input_ids"])), key=lambda i: -len(tokens["input_ids"][i]))
    results = None
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({name: [values[i] for i in chosen] for name, values in tokens.items()})
        output = forward({name: tensor.to(device) for name, tensor in batch.items()}).float().cpu().numpy()
        if results is None:
            results = np.empty((len(order), *output.shape[1:]), dtype=np.float32)
        results[chosen] = output
    return results
