"""Batches of texts: tokenised and padded by a thread while a model computes, and its results copied to the CPU."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .models import RankingProcessor, TokenLists

# Texts tokenised at once: in descending order of their characters, and sorted by their tokens within.
TOKENIZED_AT_ONCE = 512
BATCHES_AHEAD = 8  # prepared while the model computes: enough to hide the tokenising of the next texts

Batch = tuple[np.ndarray, dict[str, dict[str, Tensor]]]  # rows of texts, and their padded inputs by side
Tokenize = Callable[[np.ndarray], dict[str, TokenLists]]  # rows of texts -> their tokens by side


@dataclass(frozen=True)
class Batcher:
    """Makes the batches of a model's inputs.

    Args:
        processor: pads them.
        device: the model's.
        batch_size: texts (or pairs) per batch.
        tokens_per_batch: tokens per batch, padding included, in place of `batch_size`; None reads `batch_size`. A
            text that has more is a batch of its own.
    """

    processor: RankingProcessor
    device: torch.device
    batch_size: int
    tokens_per_batch: int | None = None

    def batches(self, rows: np.ndarray, tokenize: Tokenize) -> Iterator[Batch]:
        """Yield batches of the texts in `rows`, in descending order of length; `tokenize` is called in a thread."""
        batches = self._prepare(rows, tokenize)
        return _ahead(batches) if len(rows) > self.batch_size else batches

    def _prepare(self, rows: np.ndarray, tokenize: Tokenize) -> Iterator[Batch]:
        pending: list[tuple[int, dict[str, TokenLists], int]] = []  # row, tokens, and the place of the row in them
        longest = np.zeros(1, dtype=int)  # of each side
        for start in range(0, len(rows), TOKENIZED_AT_ONCE):
            chosen = rows[start : start + TOKENIZED_AT_ONCE]
            tokens = tokenize(chosen)
            sides = []
            for side in tokens.values():
                sides.append(list(map(len, side["input_ids"])))
            lengths = np.stack(sides, 1)  # (n, sides)
            for place in longest_first(lengths.sum(1)):
                longest = np.maximum(longest, lengths[place])
                if self._is_full(len(pending), longest.sum()):
                    yield self._pad(pending)
                    pending, longest = [], lengths[place]
                pending.append((chosen[place], tokens, place))
        if pending:
            yield self._pad(pending)

    def _is_full(self, count: int, width: int) -> bool:
        """Return whether a batch of `count` texts has no room for one more, with which it has this width."""
        if self.tokens_per_batch is None:
            return count == self.batch_size
        return count > 0 and (count + 1) * width > self.tokens_per_batch

    def _pad(self, texts: list[tuple[int, dict[str, TokenLists], int]]) -> Batch:
        """Return the rows of texts, and their inputs on the model's device."""
        inputs: dict[str, dict[str, Tensor]] = {}
        for side in texts[0][1]:
            inputs[side], lists = {}, defaultdict(list)
            for _, tokens, place in texts:
                for name, rows in tokens[side].items():
                    lists[name].append(rows[place])
            for name, tensor in self.processor.pad(lists).items():
                if self.device.type == "cuda":
                    tensor = tensor.pin_memory()  # copied while the model computes
                inputs[side][name] = tensor.to(self.device, non_blocking=True)
        return np.array([row for row, _, _ in texts]), inputs


def longest_first(lengths: Sequence[int]) -> np.ndarray:
    """Return rows, longest first: memory runs out at once or never."""
    if len(lengths) == 0:
        raise InputError("Scoring or encoding needs at least one text, got none.")
    return np.argsort(-np.array(lengths), kind="stable")


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches, the next of which a thread prepares while the caller computes; its errors are raised in turn."""
    thread = ThreadPoolExecutor(1, "prepare batches")
    try:
        futures = deque(thread.submit(next, batches, None) for _ in range(BATCHES_AHEAD))
        batch = futures.popleft().result()
        while batch is not None:
            futures.append(thread.submit(next, batches, None))
            yield batch
            batch = futures.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def fetched(results: Iterator[tuple]) -> Iterator[tuple]:
    """Copy results to the CPU, each while the next one is computed."""
    late = []
    for rows, *tensors in results:
        copies, event = [], None
        for tensor in tensors:
            # Only CUDA says when such a copy has ended.
            copies.append(None if tensor is None else tensor.to("cpu", non_blocking=tensor.is_cuda))
        if tensors[0].is_cuda:
            event = torch.cuda.current_stream(tensors[0].device).record_event()
        late.append((rows, copies, event))
        if len(late) == 2:
            yield _arrived(*late.pop(0))
    for result in late:
        yield _arrived(*result)


def _arrived(rows: np.ndarray, copies: list[Tensor | None], event: torch.cuda.Event | None) -> tuple:
    if event is not None:
        event.synchronize()
    return rows, *copies
