"""Rows of similar length run together, so that hardly any padding is computed."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

# Tokens that fill a device, about: below that one more row costs less than one more forward.
GROUP_TOKENS = {"cpu": 384, "cuda": 8192}


def run_by_length(run: Callable[..., Tensor], inputs: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """Run groups of rows, each without the padding that it does not need.

    Args:
        run: of inputs (n, l, ...), given by name, states (n, l, H), or the first few of a row; rows must not depend on
            one another.
        inputs: tensors (N, L, ...).
        mask: (N, L), nonzero at tokens.

    Returns:
        (N, L, H), zero behind the last state that a row's group has.
    """
    groups, width = length_groups(mask), mask.shape[1]
    if len(groups) == 1:
        groups = [(slice(None), length) for _, length in groups]  # a view, where an index would copy
    parts = []
    for rows, length in groups:
        states = run(**{name: tensor[rows, :length] for name, tensor in inputs.items()})
        parts.append(nn.functional.pad(states, (0, 0, 0, width - states.shape[1])))
    if len(groups) == 1:
        return parts[0]
    order = torch.cat([rows for rows, _ in groups])
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return torch.cat(parts)[place]


def length_groups(mask: Tensor) -> list[tuple[Tensor, int]]:
    """Group the rows of a mask, (N, L), by where their last token stands.

    Returns:
        Row indices, longest rows first, and the length of the longest row, per group.
    """
    ends = (mask.bool() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)  # (N,)
    ends, order = ends.clamp(min=1).sort(descending=True)
    lengths, enough = ends.tolist(), GROUP_TOKENS.get(mask.device.type, GROUP_TOKENS["cuda"])
    starts = [0]
    for row, length in enumerate(lengths):
        first = starts[-1]
        if length < lengths[first] and (row - first) * lengths[first] >= enough:
            starts.append(row)
    return [(order[start:stop], lengths[start]) for start, stop in pairwise([*starts, len(lengths)])]
