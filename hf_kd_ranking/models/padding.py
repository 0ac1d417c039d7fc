"""Rows of similar length run in one group, so that hardly any padding is computed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# About as many tokens as fill a device: with fewer, one more row costs less than one more forward pass.
GROUP_TOKENS = {"cpu": 384, "cuda": 8192}


def run_by_length(
    run: Callable[..., Tensor], inputs: Mapping[str, Tensor], mask: Tensor, lengths: list[int] | None = None
) -> Tensor:
    """Run groups of rows, each without the padding that it does not need.

    Args:
        run: computes states (n, l, H), or the first few of each row, from inputs (n, l, ...) given by name.
        inputs: tensors (N, L, ...).
        mask: (N, L), nonzero at tokens.
        lengths: as in `length_groups`.

    Returns:
        (N, L, H), zero after the last state that a row's group has.
    """
    groups, width = length_groups(mask, lengths), mask.shape[1]
    if len(groups) == 1:
        groups = [(slice(None), groups[0][1])]  # a view, where an index would copy
    outputs = []
    for rows, length in groups:
        states = run(**{name: tensor[rows, :length] for name, tensor in inputs.items()})
        outputs.append(nn.functional.pad(states, (0, 0, 0, width - states.shape[1])))
    if len(groups) == 1:
        return outputs[0]
    order = torch.cat([rows for rows, _ in groups])
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return torch.cat(outputs)[place]


def length_groups(mask: Tensor, lengths: list[int] | None = None) -> list[tuple[Tensor, int]]:
    """Group the rows of a mask, (N, L), by length: per group its row indices, longest first, and its length.

    `lengths` are the places of the last nonzero elements, counted from 1, and 0 for none. None reads them from the
    mask, for which the CPU waits until a GPU has done all work before.
    """
    ends = (mask.bool() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)  # (N,)
    ends, order = ends.sort(descending=True)
    lengths = ends.tolist() if lengths is None else sorted(lengths, reverse=True)
    lengths = [max(length, 1) for length in lengths]
    enough = GROUP_TOKENS.get(mask.device.type, GROUP_TOKENS["cuda"])
    groups, start = [], 0
    for row, length in enumerate(lengths):
        if length < lengths[start] and (row - start) * lengths[start] >= enough:
            groups.append((order[start:row], lengths[start]))
            start = row
    groups.append((order[start:], lengths[start]))
    return groups


def row_lengths(inputs: Mapping[str, Any]) -> list[int] | None:
    """Return the lengths of all texts, see `RankerModel.forward`, one after another; None if the inputs lack them."""
    if "lengths" not in inputs or torch.compiler.is_compiling():
        return None
    return inputs["lengths"].flatten().tolist()
