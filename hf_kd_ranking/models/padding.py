"""Rows of similar length run in one group, or all rows as one sequence, so that hardly any padding is computed."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Implementations of attention that read packed rows; VARLEN is torch's own, registered below.
FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
VARLEN = "varlen"
# Places of the first tokens while packed rows run, for hooks; threads that share a model have their own.
FIRST_TOKENS: ContextVar[Tensor | None] = ContextVar("first_tokens", default=None)
# About as many tokens as fill a device: with fewer, one more row costs less than one more forward pass.
GROUP_TOKENS = {"cpu": 384, "cuda": 8192}


def run_by_length(
    run: Callable[..., Tensor], inputs: Mapping[str, Tensor], mask: Tensor, lengths: list[int] | None = None
) -> Tensor:
    """Run groups of rows, each without the padding that it does not need.

    Args:
        run: computes states (n, l, H), the first few of each row, or one vector per row, (n, D), from inputs
            (n, l, ...) given by name.
        inputs: tensors (N, L, ...).
        mask: (N, L), nonzero at tokens.
        lengths: as in `length_groups`.

    Returns:
        (N, L, H), zero after the last state that a row's group has; or (N, D).
    """
    groups, width = length_groups(mask, lengths), mask.shape[1]
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


def run_packed(run: Callable[..., Tensor], states: Tensor, mask: Tensor) -> Tensor:
    """Run layers over the tokens of all rows as one sequence, without padding.

    Args:
        run: computes states (1, T, H), or (1, N, H) of the tokens at `FIRST_TOKENS`, from states (1, T, H) and the
            arguments of attention that keep the rows apart.
        states: (N, L, H).
        mask: (N, L), nonzero at tokens.

    Returns:
        (N, L, H), zero at padding; or (N, 1, H).
    """
    is_kept = mask.to("cpu", torch.bool, copy=True)  # the one time that the CPU waits for a GPU
    is_kept[:, 0] = True  # a row without tokens has a state, too
    counts = is_kept.sum(1)  # (N,)
    longest = int(counts.max())
    places = is_kept.flatten().nonzero().squeeze(1).to(mask.device)  # (T,)
    ends = nn.functional.pad(counts.cumsum(0), (1, 0)).int().to(mask.device)  # (N + 1,)
    attention = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    token = FIRST_TOKENS.set(ends[:-1].long())
    try:
        packed = run(states.flatten(0, 1)[places].unsqueeze(0), **attention).squeeze(0)
    finally:
        FIRST_TOKENS.reset(token)
    if len(packed) == len(mask):
        return packed.unsqueeze(1)
    padded = packed.new_zeros(mask.numel(), packed.shape[1]).index_copy(0, places, packed)
    return padded.view(*mask.shape, -1)


def can_run_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch has attention over packed rows for a device and a dtype."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    is_recent = torch.cuda.get_device_capability(device) >= (8, 0)
    return is_recent and find_spec("torch.nn.attention.varlen") is not None


def _varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Compute attention within packed rows, (1, heads, T, D) to (1, T, heads, D); other rows as "sdpa" does."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    from torch.nn.attention import varlen  # which older versions of torch lack

    rows = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))  # (T, heads, D) each
    output = varlen.varlen_attn(*rows, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return output.unsqueeze(0), None


AttentionInterface.register(VARLEN, _varlen_attention)
AttentionMaskInterface.register(VARLEN, sdpa_mask)
