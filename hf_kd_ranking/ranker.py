"""Texts in, scores out: a model with its tokenizer and lengths."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .data.collate import RankingTokenizer
from .inference import encode_texts, score_pairs
from .models import RankerModel, load_ranker


class Ranker:
    """A ranker ready to use; lengths and prefixes come from the checkpoint.

    Args:
        model: any of the architectures.
        tokenizer: of its encoder.
        batch_size: texts (or pairs) a forward.
        is_distributed: True shares long work among the processes of an `accelerate` job; all must make the same calls.
    """

    def __init__(
        self,
        model: RankerModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        is_distributed: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.is_distributed = is_distributed
        self._inputs = RankingTokenizer.from_config(tokenizer, model.config)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        architecture: str | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        **config_overrides: Any,
    ) -> "Ranker":
        """Load a checkpoint, see `load_ranker`.

        Args:
            device: None takes a GPU where there is one.
        """
        model = load_ranker(str(name_or_path), architecture, **config_overrides)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(model.to(device), AutoTokenizer.from_pretrained(str(name_or_path)), batch_size)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write weights, config and tokenizer."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def score(self, queries: str | Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """Scores of pairs, (N,) float32, higher is better; a single query is scored with every document.

        Raises:
            ValueError: if the numbers of queries and documents differ.
        """
        queries = [queries] * len(documents) if isinstance(queries, str) else queries
        return score_pairs(
            self.model, self._inputs, queries, documents, self.batch_size, is_distributed=self.is_distributed
        )

    def rerank(self, query: str, documents: Sequence[str], top_k: int | None = None) -> list[tuple[int, float]]:
        """Indices into `documents` with their scores, best first; ties keep the order given."""
        scores = self.score(query, documents)
        return [(int(i), float(scores[i])) for i in np.argsort(-scores, kind="stable")[:top_k]]

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of queries, (N, H) float32."""
        return self._encode("query", texts)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of documents, (N, H) float32."""
        return self._encode("document", texts)

    def _encode(self, side: str, texts: Sequence[str]) -> np.ndarray:
        return encode_texts(self.model, self._inputs, side, texts, self.batch_size, is_distributed=self.is_distributed)
