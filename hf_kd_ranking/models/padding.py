"""Rows of similar length run in one group, so that hardly any padding is computed."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

# About as many tokens as fill a device: with fewer, one more row costs less than one more forward pass.
GROUP_TOKENS = {"cpu": 384, "cuda": 8192}


def run_by_length(run: Callable[..., Tensor], inputs: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """Run groups of rows, each without the padding that it does not need.

    Args:
        run: computes states (n, l, H), the first few of each row, or one vector per row, (n, D), from inputs
            (n, l, ...) given by name.
        inputs: tensors (N, L, ...).
        mask: (N, L), nonzero at tokens.

    Returns:
        (N, L, H), zero after the last state that a row's group has; or (N, D).
    """
    groups, width = length_groups(mask), mask.shape[1]
    if len(groups) == 1:
        groups = [(slice(None), groups[0][1])]  # a view, where an index would copy
    outputs = []
    for rows, length in groups:
        states = run(**{name: tensor[rows, :length] for name, tensor in inputs.items()})
        if states.dim() > 2:
            states = nn.functional.pad(states, (0, 0, 0, width - states.shape[1]))
        outputs.append(states)
    if len(groups) == 1:
        return outputs[0]
    order = torch.cat([rows for rows, _ in groups])
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return torch.cat(outputs)[place]


def length_groups(mask: Tensor) -> list[tuple[Tensor, int]]:
    """Group the rows of a mask, (N, L), by length: per group its row indices, longest first, and its length."""
    ends = (mask.bool() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)  # (N,)
    ends, order = ends.clamp(min=1).sort(descending=True)
    lengths = ends.tolist()
    enough = GROUP_TOKENS.get(mask.device.type, GROUP_TOKENS["cuda"])
    groups, start = [], 0
    for row, length in enumerate(lengths):
        if length < lengths[start] and (row - start) * lengths[start] >= enough:
            groups.append((order[start:row], lengths[start]))
            start = row
    groups.append((order[start:], lengths[start]))
    return groups
