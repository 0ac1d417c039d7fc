"""Long pairs cut into windows: pairs of the whole query and some tokens of the document."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError


class Windows(NamedTuple):
    """The windows of N pairs, those of the first pair first.

    Args:
        inputs: name -> (P, l), the encoder's inputs.
        rows: (P,), the pair of each window.
        places: (P,), its place among the windows of the pair.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    places: Tensor


def cut_pairs(inputs: Mapping[str, Tensor], query_length: int, window_length: int, stride: int) -> Windows:
    """Cut the documents of pairs into windows.

    The last token of a pair is the separator, and the query ends at the first one: this holds for "[CLS] query [SEP]
    document [SEP]" as for "<s> query </s></s> document </s>". A window is a pair of the same form.

    Args:
        inputs: a tokenizer's output for N pairs with padding on the right, (N, L) each.
        query_length: longest query in tokens, special tokens included; a longer one is cut.
        window_length: tokens of a document in a window, and the separator after them.
        stride: tokens between the beginnings of two windows.

    Raises:
        InputError: if a pair has no separator after its query.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    row_count, length = ids.shape
    positions = torch.arange(length, device=ids.device)
    last = (mask * positions).amax(1)  # (N,)
    is_separator = (ids == ids.gather(1, last.unsqueeze(1))) & mask
    query_end = _first_place(is_separator, last)
    if ((query_end == last) & mask.any(1)).any():
        raise InputError(
            "passage_length needs pairs in which the same separator follows the query and ends the document; this "
            "tokenizer makes other pairs, so leave passage_length out."
        )
    is_after = ~is_separator & (positions > query_end.unsqueeze(1))
    # No tokenizer puts more than two: others are part of the text.
    separators = (_first_place(is_after, last) - query_end).clamp(max=2)
    document_start = query_end + separators
    query_size = torch.minimum(query_end, (query_length - separators).clamp(min=1))
    rest = (last - document_start - (window_length - 1)).clamp(min=0)  # tokens after the first window
    counts = 1 + (rest + stride - 1) // stride

    rows = torch.arange(row_count, device=ids.device).repeat_interleave(counts)  # (P,)
    places = torch.arange(len(rows), device=ids.device) - (counts.cumsum(0) - counts)[rows]
    start = document_start[rows] + places * stride
    size = torch.minimum(last[rows] - start, torch.full_like(start, window_length - 1))
    prefix = (query_size + separators)[rows]
    end = prefix + size  # the place of the last separator
    columns = torch.arange(int(end.max()) + 1, device=ids.device)  # (l,)
    query_size, query_end, start, prefix, end = (
        values.unsqueeze(1) for values in (query_size[rows], query_end[rows], start, prefix, end)
    )
    source = torch.where(columns < query_size, columns, query_end + columns - query_size)
    source = torch.where(columns < prefix, source, start + columns - prefix)
    source = torch.where(columns < end, source, last[rows].unsqueeze(1))  # (P, l)
    taken = {name: tensor[rows.unsqueeze(1), source] for name, tensor in inputs.items()}
    taken["attention_mask"] = taken["attention_mask"] * (columns <= end)
    return Windows(taken, rows, places)


def _first_place(is_chosen: Tensor, last: Tensor) -> Tensor:
    """Return the first chosen column of each row, (N, L), at most its last token: (N,)."""
    positions = torch.arange(is_chosen.shape[1], device=last.device)
    first = torch.where(is_chosen, positions, is_chosen.shape[1]).amin(1)
    return torch.minimum(first, last)


def by_pair(states: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Return the states of windows, (P, H), by pair, (N, M, H), and which are windows of the pair, (N, M)."""
    shape = (int(windows.rows[-1]) + 1, int(windows.places.max()) + 1)
    at = (windows.rows, windows.places)
    is_window = torch.zeros(shape, dtype=torch.bool, device=states.device)
    is_window[at] = True
    return states.new_zeros(*shape, states.shape[1]).index_put(at, states), is_window
