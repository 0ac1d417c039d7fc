"""Token ids on disk: the texts of a store are tokenised once, and batches are joined from memory-mapped arrays.

A folder in the cache of `datasets`, named by a digest of the texts, the tokenizer and the prefix, holds the ids of all
texts one after another, neither cut nor with special tokens. It serves every length, every architecture and every job
that reads these texts with this tokenizer.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..artifacts import building, read_description, write_description
from ..errors import InputError
from .caches import cache_root
from .ids import ROWS_AT_ONCE, map_array
from .texts import TextStore

SAMPLE = 24  # texts of each side on which the joined inputs are compared with the processor's, a third the longest
# Lengths of the comparison besides the processor's own: short ones cut every pair, to an even and to an odd number.
SHORT_LENGTHS = ((5, 7), (5, 8))


class TokenStore:
    """The token ids of the texts of a `TextStore`, in its order. It pickles to its path, as the text store does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        dtype = read_description(folder)["dtype"]
        # Plain arrays over the mapped files, because a slice of a memmap takes several times as long.
        self._ids = np.memmap(folder / "ids.bin", dtype, mode="r").view(np.ndarray)  # (tokens + 1,)
        self._offsets = map_array(folder / "offsets.npy").view(np.ndarray)  # (N + 1,)
        if len(self._ids) != self._offsets[-1] + 1:
            raise InputError(f"{folder} is damaged: ids.bin has another size than its texts; remove the folder.")

    @classmethod
    def build(
        cls, texts: TextStore, tokenizer: PreTrainedTokenizerBase, prefix: str = "", splits_special: bool = False
    ) -> "TokenStore":
        """Tokenise all texts, each after the prefix, or open what was stored before; a kill leaves nothing behind.

        Args:
            splits_special: True reads special tokens in a text as its characters, whatever the tokenizer does.

        Raises:
            InputError: if the tokenizer is not a fast one.
        """
        if not tokenizer.is_fast:
            raise InputError(f"Token ids are stored for fast tokenizers, got {type(tokenizer).__name__}.")
        backend = without_limits(tokenizer, splits_special)
        settings = [backend.to_str(), backend.encode_special_tokens, tokenizers.__version__, prefix]
        name = hashlib.sha256(json.dumps([texts.fingerprint(), *settings]).encode()).hexdigest()[:16]
        folder = cache_root() / f"{Path(texts.source).stem}-tokens-{name}"
        if not folder.is_dir():
            with building(folder) as temporary:
                _write_ids(temporary, texts, backend, prefix)
        return cls(folder)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def take(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Return the ids of some texts."""
        return [self._ids[self._offsets[row] : self._offsets[row + 1]] for row in rows]

    def sample(self) -> np.ndarray:
        """Return `SAMPLE` rows, repeated if the store has fewer: the longest texts, and others at random."""
        longest = np.argsort(-np.diff(self._offsets), kind="stable")[: SAMPLE // 3]
        others = np.random.default_rng(0).integers(len(self), size=SAMPLE - len(longest))
        return np.concatenate([longest, others])

    def __reduce__(self) -> tuple:
        return (type(self), (self.folder,))


@dataclass(frozen=True)
class _Frame:
    """The special tokens of a sequence of one or two texts."""

    parts: tuple[np.ndarray | None, ...]  # in order, the ids of special tokens that have one type, or None for a text
    types: tuple[int, ...]  # the `token_type_ids` of each part

    @classmethod
    def read(cls, encoding: Encoding) -> "_Frame":
        """Read the frame from a sequence of which no text is empty."""
        parts, types, start = [], [], 0
        for (text, type_id), run in groupby(zip(encoding.sequence_ids, encoding.type_ids, strict=True)):
            stop = start + len(list(run))
            parts.append(np.array(encoding.ids[start:stop]) if text is None else None)
            types.append(type_id)
            start = stop
        return cls(tuple(parts), tuple(types))

    @property
    def count(self) -> int:
        return sum(len(ids) for ids in self.parts if ids is not None)


@dataclass(frozen=True)
class StoredInputs:
    """Join the inputs of a ranker from stored token ids, equal to those that its processor makes of texts."""

    processor: Any  # a `models.RankingProcessor`, for its settings
    queries: TokenStore
    documents: TokenStore
    frame: _Frame  # of a text, or of a pair where the processor joins texts

    @classmethod
    def build(cls, processor: Any, queries: TextStore, documents: TextStore) -> "StoredInputs":
        """Tokenise both stores, or open what was stored; refuse inputs that are not the processor's."""
        tokenizer = processor.tokenizer
        splits = processor.reads_separators
        query_ids = TokenStore.build(queries, tokenizer, processor.query_prefix, splits)
        document_ids = TokenStore.build(documents, tokenizer, processor.document_prefix, splits)
        rows = query_ids.sample(), document_ids.sample()
        texts = queries.take(rows[0]), documents.take(rows[1])
        if len(document_ids.take(rows[1])[0]) == 0:
            raise InputError(f"No text of {documents.source} has a token.")
        longest = processor.document_prefix + texts[1][0]
        example = [longest, longest] if processor.joins_texts else [longest]
        backend = without_limits(tokenizer, splits)
        encoding = backend.encode(*example, add_special_tokens=processor.adds_special_tokens)
        inputs = cls(processor, query_ids, document_ids, _Frame.read(encoding))
        for lengths in ((processor.max_query_length, processor.max_document_length), *SHORT_LENGTHS):
            cut = replace(processor, max_query_length=lengths[0], max_document_length=lengths[1])
            if not _are_equal(replace(inputs, processor=cut)(*rows), cut(*texts)):
                name = type(tokenizer).__name__
                raise InputError(f"The tokenizer, a {name}, makes other inputs than its ids of each text, joined.")
        return inputs

    def __call__(self, query_rows: np.ndarray, document_rows: np.ndarray) -> dict[str, Any]:
        """Return the processor's result for the texts of B rows and B * n rows, see `RankingProcessor.__call__`."""
        processor, n = self.processor, len(document_rows) // len(query_rows)
        shape = (len(query_rows), n)
        queries, documents = self.queries.take(query_rows), self.documents.take(document_rows)
        if processor.joins_texts:
            room = processor.max_query_length + processor.max_document_length - self.frame.count
            pairs = []
            for place, document in enumerate(documents):
                query = queries[place // n]
                kept = cut_pair(len(query), len(document), room)
                pairs.append((query[: kept[0]], document[: kept[1]]))
            return self._join(pairs, shape)
        room = processor.max_query_length - self.frame.count
        query = self._join([(ids[:room],) for ids in queries], shape[:1], processor.query_augmentation)
        room = processor.max_document_length - self.frame.count
        return {"query": query, "document": self._join([(ids[:room],) for ids in documents], shape)}

    def _join(
        self, sequences: Sequence[tuple[np.ndarray, ...]], shape: tuple[int, ...], masks: int = 0
    ) -> dict[str, Tensor]:
        """Put special tokens around texts, [MASK] tokens after them, and pad: tensors of `shape` + (L,)."""
        tokenizer = self.processor.tokenizer
        last = np.full(masks, tokenizer.mask_token_id if masks else 0)
        parts = []
        for texts in sequences:
            remaining = iter(texts)
            for ids in self.frame.parts:
                parts.append(next(remaining) if ids is None else ids)
            parts.append(last)
        counts = np.fromiter(map(len, parts), dtype=np.int64).reshape(len(sequences), -1)
        lengths = counts.sum(1, keepdims=True)  # (N, 1)
        is_token = np.arange(max(lengths.max(), 1)) < lengths  # (N, L)
        ids = np.full(is_token.shape, tokenizer.pad_token_id)
        ids[is_token] = np.concatenate(parts)
        inputs = {"input_ids": ids}
        if "token_type_ids" in tokenizer.model_input_names:
            types = np.full(is_token.shape, tokenizer.pad_token_type_id)
            types[is_token] = np.repeat(np.tile([*self.frame.types, 0], len(sequences)), counts.ravel())
            inputs["token_type_ids"] = types
        inputs["attention_mask"] = is_token.astype(np.int64)
        return {name: torch.from_numpy(array).view(*shape, -1) for name, array in inputs.items()}


def cut_pair(query: int, document: int, room: int) -> tuple[int, int]:
    """Return how many tokens of each text stay where a pair has `room`: the longer one is cut first, as by tokenizers.

    If neither fits into half of the room, both get half of it, and the longer one what is left of an odd number.
    """
    if query + document <= room:
        return query, document
    shorter, longer = sorted((query, document))
    longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return (longer, shorter) if query > document else (shorter, longer)


def without_limits(tokenizer: PreTrainedTokenizerBase, splits_special: bool = False) -> Tokenizer:
    """Return a copy of a fast tokenizer's backend that neither cuts nor pads, and that no other thread uses.

    `splits_special` is True where special tokens in a text are read as its characters.
    """
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    # Not that of the backend, which every call of the tokenizer changes.
    copy.encode_special_tokens = splits_special or tokenizer.split_special_tokens
    return copy


def _write_ids(folder: Path, texts: TextStore, tokenizer: Tokenizer, prefix: str) -> None:
    dtype = "uint16" if max(tokenizer.get_vocab().values()) < 2**16 else "uint32"
    lengths = [0]
    with (
        (folder / "ids.bin").open("wb") as file,
        tqdm(total=len(texts), desc="Tokenising", unit="text", disable=len(texts) <= ROWS_AT_ONCE) as progress,
    ):
        for start in range(0, len(texts), ROWS_AT_ONCE):
            rows = np.arange(start, min(start + ROWS_AT_ONCE, len(texts)))
            prefixed = [prefix + text for text in texts.take(rows)]
            for encoding in tokenizer.encode_batch_fast(prefixed, add_special_tokens=False):
                lengths.append(len(encoding.ids))
                file.write(np.array(encoding.ids, dtype=dtype).tobytes())
            progress.update(len(rows))
        file.write(bytes(np.dtype(dtype).itemsize))  # an empty file cannot be mapped
    np.save(folder / "offsets.npy", np.cumsum(lengths))
    write_description(folder, {"dtype": dtype, "source": texts.source, "prefix": prefix})


def _are_equal(first: Any, second: Any) -> bool:
    """Return whether inputs, by name or by side and name, are the same tensors."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    return list(first) == list(second) and all(_are_equal(first[name], second[name]) for name in first)
