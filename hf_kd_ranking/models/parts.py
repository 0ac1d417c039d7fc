"""Layers run on parts of a batch that keep only their outputs: the backward pass runs each part again.

A part is run again with the random numbers of its first run, so that gradients are those of one run over all parts.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def run_in_parts(run: Callable[..., tuple[Tensor | None, ...]], size: int, *sides: Mapping | None) -> list:
    """Run the rows of a batch, `size` at once: a gradient cache.

    Gao et al. 2021, https://arxiv.org/abs/2101.06983: the backward pass first computes the gradients of all outputs,
    then passes them on part by part.

    Args:
        run: returns outputs, (B, ...) each or None, from the sides.
        sides: inputs by name, (B, ...) each; None is passed on.

    Returns:
        The outputs of all rows, (B, ...) each or None.
    """
    count = max(len(side["input_ids"]) for side in sides if side is not None)
    parts = []
    for start in range(0, count, size):
        rows: list[dict | None] = []
        for side in sides:
            if side is None:
                rows.append(None)
            else:
                rows.append({name: values[start : start + size] for name, values in side.items()})
        parts.append(checkpoint(run, *rows, use_reentrant=False))
    outputs = []
    for values in zip(*parts, strict=True):
        outputs.append(None if values[0] is None else torch.cat(values))
    return outputs


def score_in_blocks(
    score: Callable[..., Tensor], query: Tensor, document: Tensor, query_mask: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Score every query with every document by layers that read pairs, N / B documents at once.

    Args:
        score: as `RankerModel.score_vectors`.
        query, document, query_mask, mask: as in `RankerModel.score_all_pairs`.

    Returns:
        (B, N).
    """
    size = max(1, len(document) // len(query))  # as many pairs as a batch has
    scores = []
    for start in range(0, len(document), size):
        block, block_mask = document[start : start + size], None
        block = block.expand(len(query), *block.shape)
        if mask is not None:
            block_mask = mask[start : start + size].expand(len(query), *block.shape[1:-1])
        scores.append(checkpoint(score, query, block, query_mask, block_mask, use_reentrant=False))
    return torch.cat(scores, 1)
