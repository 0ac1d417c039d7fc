"""Texts to a ranker's inputs: lengths, prefixes and query augmentation on top of any tokenizer."""

import logging
import threading
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .base import RankerConfig
from .errors import InputError

logger = logging.getLogger(__name__)

MUCH = 0.1  # share of texts of which a warning says that they are cut
# One entry per text and not yet padded: input name -> token lists, {"input_ids": [[101, ...], ...], ...}.
TokenLists = dict[str, list[list[int]]]
# Held during a call: fast tokenizers keep a call's lengths in an object that all threads, and several rankers, share.
TOKENIZER_LOCK = threading.Lock()


@cache
def _warn_once(message: str) -> None:
    """Warn, once for all steps of a job that cut the same texts."""
    logger.warning(message)


class Cuts(Counter[str]):
    """Counts of the documents that were tokenised, each time: `texts`, `cut_texts`, `tokens` and `cut_tokens`.

    Tokens are those of all documents before they were cut, with special tokens, and of pairs with those of the query.
    """

    NAMES = ("texts", "cut_texts", "tokens", "cut_tokens")

    def since(self, before: "Cuts") -> list[int]:
        """Return what was counted after earlier counts, in the order of `NAMES`."""
        return [self[name] - before[name] for name in self.NAMES]

    @classmethod
    def total(cls, counts: Iterable[Sequence[int]]) -> "Cuts":
        """Return the sum of counts in the order of `NAMES`."""
        total = cls()
        for of_part in counts:
            total.update(dict(zip(cls.NAMES, map(int, of_part), strict=True)))
        return total

    def shares(self, longest: int) -> dict[str, float]:
        """Return `cut_texts` and `cut_tokens` as shares of all, and warn where more than a tenth of the texts is cut.

        Args:
            longest: the limit in tokens, for the message.

        Returns:
            An empty dictionary if nothing was counted, as with a slow tokenizer.
        """
        if not self["texts"]:
            return {}
        texts, tokens = self["cut_texts"] / self["texts"], self["cut_tokens"] / self["tokens"]
        if texts > MUCH:
            _warn_once(
                f"{texts:.0%} of the documents are longer than {longest} tokens and are cut: {tokens:.0%} of the "
                "tokens are not read. A larger max_document_length reads more; `passages` splits documents."
            )
        return {"cut_texts": round(texts, 4), "cut_tokens": round(tokens, 4)}


@dataclass(frozen=True)
class RankingProcessor:
    """Turns texts into the inputs of a ranker: a tokenizer with fields of its `RankerConfig`.

    Args:
        tokenizer: the tokenizer of the ranker's encoder.
        truncation: True cuts texts beyond the lengths, of a pair the longer one first; False makes them an error.
        padding_side: "right" for all rankers, whatever the tokenizer says: on the left, padding would take the place
            of the first token and move the positions of the others.
        cuts: counts what is cut of documents.
    """

    tokenizer: PreTrainedTokenizerBase
    max_query_length: int
    max_document_length: int
    query_prefix: str = ""
    document_prefix: str = ""
    joins_texts: bool = False
    adds_special_tokens: bool = True
    reads_separators: bool = False
    query_augmentation: int = 0
    truncation: bool = True
    padding_side: Literal["left", "right"] = "right"
    cuts: Cuts = field(default_factory=Cuts, repr=False, compare=False)

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
        own = ("tokenizer", "truncation", "padding_side", "cuts")
        names = [field.name for field in fields(cls) if field.name not in own]
        return cls(tokenizer, truncation=truncation, **{name: getattr(config, name) for name in names})

    def __call__(self, queries: Sequence[str], documents: Sequence[str]) -> dict[str, Any]:
        """Make the inputs for B queries and B * n documents, those of the first query first.

        They are `query` (B, Lq) and `document` (B, n, Ld); for a ranker that joins texts (B, n, L).
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
        texts = _prefixed(self.document_prefix, texts)
        return self._tokenize(texts, max_length=self.max_document_length, document=0)

    def pairs(self, queries: Sequence[str], documents: Sequence[str]) -> TokenLists:
        """Tokenise each query with its document as one sequence."""
        texts = (_prefixed(self.query_prefix, queries), _prefixed(self.document_prefix, documents))
        return self._tokenize(*texts, max_length=self.max_query_length + self.max_document_length, document=1)

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

    def _tokenize(self, *texts: Sequence[str], max_length: int, document: int | None = None) -> TokenLists:
        """Tokenise one or two sides, and count what is cut of the side that is the document, if one is."""
        # Lists, never single texts: given a single pair, fast tokenizers ignore an empty second text.
        settings = {"add_special_tokens": self.adds_special_tokens, "return_attention_mask": True}
        if self.truncation:
            settings |= {"truncation": True, "max_length": max_length}
        if self.reads_separators:
            settings["split_special_tokens"] = True  # "[SEP]" in a text is read as its characters
        encoded = self.encode(*texts, **settings)
        tokens = dict(encoded)
        if document is not None and encoded.encodings is not None:
            counts = _count_cuts(encoded.encodings, document)
            with TOKENIZER_LOCK:
                self.cuts.update(counts)
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


def _count_cuts(encodings: Sequence[Any], document: int) -> Cuts:
    """Count what is cut of the document's side, from the encodings of a fast tokenizer."""
    counts = Cuts(texts=len(encodings), tokens=sum(map(len, encodings)))
    for encoding in encodings:
        pieces = encoding.overflowing
        if not pieces:
            continue
        # Where both sides of a pair are cut, each piece of one is listed with each of the other, the kept ones too.
        lengths: dict[tuple[int, int], int] = {}  # place of a piece of the document in it -> tokens
        for piece in [*pieces, encoding]:
            sides = piece.sequence_ids
            if document in sides:
                lengths[piece.offsets[sides.index(document)]] = sides.count(document)
        cut = sum(lengths.values()) - encoding.sequence_ids.count(document)
        counts.update(cut_texts=int(cut > 0), cut_tokens=cut, tokens=cut)
    return counts


def _check_characters(texts: str | Sequence[str]) -> None:
    for text in [texts] if isinstance(texts, str) else texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place = f"character {error.start}"
            raise InputError(f"The text {text[:60]!a} has half of a surrogate pair at {place}.") from None


def _prefixed(prefix: str, texts: Sequence[str]) -> list[str]:
    return [prefix + text for text in texts]
