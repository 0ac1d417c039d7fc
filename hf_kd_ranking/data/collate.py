"""Texts to model inputs, and rows of ids and scores to batches; runs inside the dataloader workers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .texts import TextStore

# One entry per text and not yet padded: input name -> token lists, {"input_ids": [[101, ...], ...], ...}.
TokenLists = dict[str, list[list[int]]]


@dataclass(frozen=True)
class RankingTokenizer:
    """A tokenizer together with a ranker's lengths and prefixes: what turns texts into that ranker's inputs.

    Args:
        tokenizer: of the ranker's encoder.
        max_query_length: tokens of a query, special tokens included; the rest is cut.
        max_document_length: the same for documents. A pair is cut to the sum of both, longest text first.
        query_prefix: text put before each query.
        document_prefix: text put before each document.
        joins_texts: True for a ranker that reads query and document as one sequence.
    """

    tokenizer: PreTrainedTokenizerBase
    max_query_length: int
    max_document_length: int
    query_prefix: str = ""
    document_prefix: str = ""
    joins_texts: bool = False

    @classmethod
    def from_config(cls, tokenizer: PreTrainedTokenizerBase, config: Any) -> "RankingTokenizer":
        """Take lengths and prefixes from a ranker's config.

        Raises:
            ValueError: if the tokenizer has ids that the encoder has no embedding for.
        """
        vocab_size = config.get_text_config().vocab_size
        if len(tokenizer) > vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens, the encoder embeddings for {vocab_size}; they do "
                "not belong together, or call model.resize_token_embeddings(len(tokenizer))."
            )
        names = ("max_query_length", "max_document_length", "query_prefix", "document_prefix", "joins_texts")
        return cls(tokenizer, **{name: getattr(config, name) for name in names})

    def queries(self, texts: Sequence[str]) -> TokenLists:
        """Tokenise queries."""
        return self._encode(self._prefixed(self.query_prefix, texts), max_length=self.max_query_length)

    def documents(self, texts: Sequence[str]) -> TokenLists:
        """Tokenise documents."""
        return self._encode(self._prefixed(self.document_prefix, texts), max_length=self.max_document_length)

    def pairs(self, queries: Sequence[str], documents: Sequence[str]) -> TokenLists:
        """Tokenise each query with its document as one sequence."""
        return self._encode(
            self._prefixed(self.query_prefix, queries),
            self._prefixed(self.document_prefix, documents),
            max_length=self.max_query_length + self.max_document_length,
        )

    def pad(self, tokens: TokenLists, shape: tuple[int, ...] = (-1,)) -> dict[str, Tensor]:
        """Pad token lists to their longest; tensors of `shape` + (L,)."""
        padded = self.tokenizer.pad(tokens, padding=True, return_attention_mask=True, return_tensors="pt")
        return {name: tensor.view(*shape, tensor.shape[-1]) for name, tensor in padded.items()}

    def _encode(self, *texts: Sequence[str], max_length: int) -> TokenLists:
        # Lists, never single texts: given a single pair, fast tokenizers take an empty second text for none.
        return dict(self.tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=True))

    @staticmethod
    def _prefixed(prefix: str, texts: Sequence[str]) -> list[str]:
        return [prefix + text for text in texts]


@dataclass(frozen=True)
class RankingCollator:
    """Rows of ids and teacher scores to a batch.

    In:  [{"query_id": 7, "pos_id": 1, "neg_id": 2, "pos_score": 9.0, "neg_score": 4.0}], or lists
         [{"query_id": 7, "doc_ids": [1, 2], "teacher_scores": [9.0, 4.0]}]
    Out: {"query": {"input_ids": (B, Lq), ...}, "document": {"input_ids": (B, n, Ld), ...},
          "teacher_scores": [[9.0, 4.0]]}, column 0 the positive; for a ranker that joins texts the pair's
         {"input_ids": (B, n, L), ...} stand in place of query and document. Rows without scores give no
         `teacher_scores`.

    Args:
        tokenizer: makes the inputs.
        queries: query_id -> text.
        documents: doc_id -> text.
    """

    tokenizer: RankingTokenizer
    queries: TextStore
    documents: TextStore

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows.

        Raises:
            KeyError: if a store lacks an id.
            ValueError: if the lists of the rows differ in length.
        """
        doc_ids = [row["doc_ids"] if "doc_ids" in row else [row["pos_id"], row["neg_id"]] for row in rows]
        n = len(doc_ids[0])
        if any(len(ids) != n for ids in doc_ids):
            lengths = sorted({len(ids) for ids in doc_ids})
            raise ValueError(
                f"The documents per query differ within a batch ({lengths}); cut all lists to one length."
            )
        queries = self.queries[[row["query_id"] for row in rows]]
        documents = self.documents[[doc_id for ids in doc_ids for doc_id in ids]]
        shape = (len(rows), n)
        if self.tokenizer.joins_texts:
            repeated = [query for query in queries for _ in range(n)]
            batch = self.tokenizer.pad(self.tokenizer.pairs(repeated, documents), shape)
        else:
            query = self.tokenizer.pad(self.tokenizer.queries(queries))
            batch = {"query": query, "document": self.tokenizer.pad(self.tokenizer.documents(documents), shape)}
        if "teacher_scores" in rows[0] or "pos_score" in rows[0]:
            batch["teacher_scores"] = torch.tensor([teacher_scores_of(row) for row in rows], dtype=torch.float32)
        return batch


def teacher_scores_of(row: Mapping[str, Any]) -> list[float]:
    """The teacher's scores of a row's documents, positive first."""
    return row["teacher_scores"] if "teacher_scores" in row else [row["pos_score"], row["neg_score"]]
