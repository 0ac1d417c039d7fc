"""BERT_DOT: one encoder for queries and documents; the score is the dot product of their pooled vectors.

Source: arXiv 2010.02666, equation 3. One vector a document is stored ahead of the query, and a nearest-neighbour index
can search it.
"""

from collections.abc import Mapping
from typing import Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from .base import RankerConfig, RankerModel, RankingOutput, check_same_queries
from .scoring import dot_product


@strict
class BertDotConfig(RankerConfig):
    """Configuration of BERT_DOT.

    Args:
        pooling: "cls", the paper's, or "mean" over attended tokens, for encoders trained so.
        compression_dim: size of a linear compression of the pooled vector; None for none.
    """

    model_type = "BERT_Dot"

    pooling: Literal["cls", "mean"] = "cls"
    compression_dim: int | None = None


class BertDot(RankerModel):
    """BERT_DOT ranker."""

    config_class = BertDotConfig

    def __init__(self, config: BertDotConfig) -> None:
        super().__init__(config)
        if config.compression_dim is not None:
            self.compressor = nn.Linear(config.encoder_config.hidden_size, config.compression_dim)
        self.post_init()

    def forward(
        self, query: Mapping[str, Tensor] | None = None, document: Mapping[str, Tensor] | None = None
    ) -> RankingOutput:
        """Score documents for their queries, or encode one side.

        Args:
            query: tokenizer output, tensors (B, Lq).
            document: tokenizer output, tensors (B, Ld) or (B, n, Ld).

        Returns:
            `query_vectors` (B, H), `document_vectors` (B, H) or (B, n, H); with both sides `scores` (B,) or (B, n).
        """
        if query is not None and document is not None:
            check_same_queries(query, document)
        query_vectors = None if query is None else self._vectors(query)
        document_vectors = None if document is None else self._vectors(document)
        scores = None
        if query is not None and document is not None:
            scores = self.score_vectors(query_vectors, document_vectors)
        return RankingOutput(scores=scores, query_vectors=query_vectors, document_vectors=document_vectors)

    def score_vectors(self, query_vectors: Tensor, document_vectors: Tensor) -> Tensor:
        """Score stored vectors as `forward` does: (B, H) with (B, H) or (B, n, H) gives (B,) or (B, n)."""
        return dot_product(query_vectors, document_vectors)

    def _vectors(self, inputs: Mapping[str, Tensor]) -> Tensor:
        tokens = self.encode_tokens(inputs)  # (N, L, H)
        if self.config.pooling == "cls":
            pooled = tokens[:, 0]
        else:
            mask = inputs["attention_mask"].flatten(0, -2).unsqueeze(-1).to(tokens.dtype)  # (N, L, 1)
            # At least one, so that a text with nothing attended gets the zero vector and not NaN.
            pooled = (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)
        if self.config.compression_dim is not None:
            pooled = self.compressor(pooled)
        return pooled.view(*inputs["input_ids"].shape[:-1], -1)


AutoConfig.register(BertDotConfig.model_type, BertDotConfig)
AutoModel.register(BertDotConfig, BertDot)
