"""Long pairs cut into windows: pairs of the whole query and some tokens of the document."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError


class Windows(NamedTuple):
    """The windows of N pairs, those of the first pair first.

    Args:
        inputs: name -> (P, l), the encoder's inputs, and their `lengths`, see `RankerModel.forward`.
        rows: (P,), the pair of each window, on the CPU.
        places: (P,), its place among the windows of the pair, on the CPU.
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
    last, query_end, separators = _find_separators(ids, mask)
    document_start = query_end + separators
    query_size = torch.minimum(query_end, (query_length - separators).clamp(min=1))
    rest = (last - document_start - (window_length - 1)).clamp(min=0)  # tokens after the first window
    counts = 1 + (rest + stride - 1) // stride

    rows = torch.arange(len(ids)).repeat_interleave(counts)  # (P,)
    places = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    last, query_end, query_size = last[rows], query_end[rows], query_size[rows]
    start = document_start[rows] + places * stride
    prefix = query_size + separators[rows]
    end = prefix + (last - start).clamp(max=window_length - 1)  # the place of the last separator
    columns = torch.arange(int(end.max()) + 1).expand(len(rows), -1)  # (P, l)
    source = torch.where(columns < query_size[:, None], columns, columns + (query_end - query_size)[:, None])
    source = torch.where(columns < prefix[:, None], source, columns + (start - prefix)[:, None])
    source = torch.where(columns < end[:, None], source, last[:, None]).to(ids.device)
    is_token = (columns <= end[:, None]).to(ids.device)
    own_rows = rows.to(ids.device)[:, None]
    taken = {name: tensor[own_rows, source] for name, tensor in inputs.items()}
    taken["attention_mask"] = taken["attention_mask"] * is_token
    return Windows(taken | {"lengths": end + 1}, rows, places)


def _find_separators(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places of the last token and of the first separator of N pairs, and how many follow; on the CPU."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    last = (mask * positions).amax(1)  # (N,)
    is_separator = (ids == ids.gather(1, last.unsqueeze(1))) & mask
    query_end = _first_place(is_separator, last)
    is_after = ~is_separator & (positions > query_end.unsqueeze(1))
    # No tokenizer puts more than two: others are part of the text.
    separators = (_first_place(is_after, last) - query_end).clamp(max=2)
    # The one time that the CPU waits for a GPU: it needs the number of windows.
    has_tokens, last, query_end, separators = torch.stack([mask.any(1), last, query_end, separators]).cpu()
    if (has_tokens * (query_end == last)).any():
        raise InputError(
            "passage_length needs pairs in which the same separator follows the query and ends the document; give a "
            "query and a document, or leave passage_length out if the tokenizer makes other pairs."
        )
    return last, query_end, separators


def _first_place(is_chosen: Tensor, last: Tensor) -> Tensor:
    """Return the first chosen column of each row, (N, L), at most its last token: (N,)."""
    positions = torch.arange(is_chosen.shape[1], device=last.device)
    first = torch.where(is_chosen, positions, is_chosen.shape[1]).amin(1)
    return torch.minimum(first, last)


def by_pair(states: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Return the states of windows, (P, H), by pair, (N, M, H), and which are windows of the pair, (N, M)."""
    shape = (int(windows.rows[-1]) + 1, int(windows.places.max()) + 1)
    at = (windows.rows.to(states.device), windows.places.to(states.device))
    is_window = torch.zeros(shape, dtype=torch.bool, device=states.device)
    is_window[at] = True
    return states.new_zeros(*shape, states.shape[1]).index_put(at, states), is_window
