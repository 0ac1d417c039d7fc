"""Texts to a ranker's inputs: lengths, prefixes and query augmentation on top of any tokenizer."""

import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .base import RankerConfig
from .errors import InputError

# One entry per text and not yet padded: input name -> token lists, {"input_ids": [[101, ...], ...], ...}.
TokenLists = dict[str, list[list[int]]]
# Held during a call: fast tokenizers keep a call's lengths in an object that all threads, and several rankers, share.
TOKENIZER_LOCK = threading.Lock()


@dataclass(frozen=True)
class RankingProcessor:
    """Turns texts into the inputs of a ranker: a tokenizer with fields of its `RankerConfig`.

    Args:
        tokenizer: the tokenizer of the ranker's encoder.
        truncation: True cuts texts beyond the lengths, of a pair the longer one first; False makes them an error.
        padding_side: "right" for all rankers, whatever the tokenizer says: on the left, padding would take the place
            of the first token and move the positions of the others.
    """

    tokenizer: PreTrainedTokenizerBase
    max_query_length: int
    max_document_length: int
    query_prefix: str = ""
    document_prefix: str = ""
    joins_texts: bool = False
    adds_special_tokens: bool = True
    query_augmentation: int = 0
    truncation: bool = True
    padding_side: Literal["left", "right"] = "right"

    @classmethod
    def from_config(
        cls, tokenizer: PreTrainedTokenizerBase, config: RankerConfig, truncation: bool = True
    ) -> "RankingProcessor":
        """Take all settings from a ranker's config.

        Raises:
            InputError: if the tokenizer has ids that the encoder has no embedding for, or lacks the padding or the
                [MASK] token.
        """
        vocab_size = config.get_text_config().vocab_size
        if len(tokenizer) > vocab_size:
            raise InputError(
                f"The tokenizer has {len(tokenizer)} tokens, the encoder embeddings for {vocab_size}; take the "
                "encoder's own tokenizer or call model.resize_token_embeddings(len(tokenizer))."
            )
        if tokenizer.pad_token_id is None:
            raise InputError("The tokenizer has no padding token, which batches need; set tokenizer.pad_token.")
        if config.query_augmentation and tokenizer.mask_token_id is None:
            raise InputError(
                f"{config.model_type} adds {config.query_augmentation} [MASK] tokens after each query, and the "
                "tokenizer has no mask token; set query_augmentation=0."
            )
        tokenizer.padding_side = "right"  # also where other libraries read it from a folder that is saved with it
        own = ("tokenizer", "truncation", "padding_side")
        names = [field.name for field in fields(cls) if field.name not in own]
        return cls(tokenizer, truncation=truncation, **{name: getattr(config, name) for name in names})

    def __call__(self, queries: Sequence[str], documents: Sequence[str]) -> dict[str, Any]:
        """Make the ranker's inputs for B queries and B * n documents, those of the first query first.

        Returns:
            `query` (B, Lq) and `document` (B, n, Ld); for a ranker that joins texts (B, n, L).
        """
        shape = (len(queries), len(documents) // len(queries))
        if not self.joins_texts:
            return {"query": self.pad(self.queries(queries)), "document": self.pad(self.documents(documents), shape)}
        repeated = [query for query in queries for _ in range(shape[1])]
        return self.pad(self.pairs(repeated, documents), shape)

    def queries(self, texts: Sequence[str]) -> TokenLists:
        """Tokenise queries; [MASK] tokens come after they are cut."""
        tokens = self._tokenize(_prefixed(self.query_prefix, texts), max_length=self.max_query_length)
        if self.query_augmentation:
            values = {"input_ids": self.tokenizer.mask_token_id, "attention_mask": 1}
            for name, rows in tokens.items():
                added = [values.get(name, 0)] * self.query_augmentation
                tokens[name] = [row + added for row in rows]
        return tokens

    def documents(self, texts: Sequence[str]) -> TokenLists:
        """Tokenise documents."""
        return self._tokenize(_prefixed(self.document_prefix, texts), max_length=self.max_document_length)

    def pairs(self, queries: Sequence[str], documents: Sequence[str]) -> TokenLists:
        """Tokenise each query with its document as one sequence."""
        texts = (_prefixed(self.query_prefix, queries), _prefixed(self.document_prefix, documents))
        return self._tokenize(*texts, max_length=self.max_query_length + self.max_document_length)

    def pad(self, tokens: TokenLists, shape: tuple[int, ...] = (-1,)) -> dict[str, Tensor]:
        """Pad token lists to their longest, with the tokenizer's ids; tensors of `shape` + (L,)."""
        length = max(len(row) for row in tokens["input_ids"])
        values = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        padded = {}
        for name, rows in tokens.items():
            flat: list[int] = []
            for row in rows:
                padding = [values.get(name, 0)] * (length - len(row))
                if self.padding_side == "left":
                    flat += padding + row
                else:
                    flat += row + padding
            # An array, because torch reads a list of numbers one by one, in six times the time.
            padded[name] = torch.frombuffer(array("q", flat), dtype=torch.int64).view(*shape, length)
        return padded

    def encode(self, *texts: str | Sequence[str], **settings: Any) -> BatchEncoding:
        """Call the tokenizer, in one thread at a time.

        Raises:
            InputError: if a text has half of a surrogate pair, which no tokenizer takes.
        """
        with TOKENIZER_LOCK:
            try:
                return self.tokenizer(*texts, **settings)
            except TypeError:
                for side in texts:
                    _check_characters(side)
                raise

    def _tokenize(self, *texts: Sequence[str], max_length: int) -> TokenLists:
        # Lists, never single texts: given a single pair, fast tokenizers ignore an empty second text.
        settings = {"add_special_tokens": self.adds_special_tokens, "return_attention_mask": True}
        if self.truncation:
            settings |= {"truncation": True, "max_length": max_length}
        tokens = dict(self.encode(*texts, **settings))
        if not self.truncation:
            lengths = [len(row) for row in tokens["input_ids"]]
            count = max(lengths, default=0)
            if count > max_length:
                row = lengths.index(count)
                problem = f"Text {row} has {count} tokens, the limit is {max_length}, and truncation is off"
                raise InputError(f"{problem} ({' / '.join(side[row][:60] for side in texts)!r}).")
        if not self.adds_special_tokens:
            # A text without words is one padding token that nothing attends to, so that no input has length zero.
            for name, rows in tokens.items():
                padding = self.tokenizer.pad_token_id if name == "input_ids" else 0
                tokens[name] = [row or [padding] for row in rows]
        return tokens


def _check_characters(texts: str | Sequence[str]) -> None:
    for text in [texts] if isinstance(texts, str) else texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place = f"character {error.start}"
            raise InputError(f"The text {text[:60]!a} has half of a surrogate pair at {place}.") from None


def _prefixed(prefix: str, texts: Sequence[str]) -> list[str]:
    return [prefix + text for text in texts]
