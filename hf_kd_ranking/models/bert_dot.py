"""BERT_DOT: one encoder for queries and documents; the score is the dot product of their pooled vectors.

Source: arXiv 2010.02666, equation 3.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from .base import Side
from .encoder import EncoderRanker, EncoderRankerConfig
from .scoring import dot_product


@strict
class BertDotConfig(EncoderRankerConfig):
    """Configuration of BERT_DOT.

    Args:
        pooling: "cls", as in the paper, or "mean" over attended tokens, for encoders trained with it.
        compression_dim: size of a linear compression of the pooled vector; None for no compression.
        normalize: True scales each vector to length 1, so that the score is the cosine, unlike in the paper.

    Example:
        >>> config = kd.BertDotConfig(pooling="mean", compression_dim=128)
        >>> config.vectors_per_text, config.similarity
        ('one', 'dot')
    """

    model_type = "BERT_Dot"
    summary = (
        "BERT_DOT ranker: one encoder makes one vector of a query and one of a document, and the score is "
        "their dot product. Document vectors are stored in advance and can be searched by an index."
    )
    vectors_per_text = "one"
    similarity = "dot"

    pooling: Literal["cls", "mean"] = "cls"
    compression_dim: int | None = None
    normalize: bool = False

    @property
    def reads_first_state(self) -> bool:
        """See `EncoderRankerConfig`."""
        return self.pooling == "cls"


class BertDot(EncoderRanker):
    """BERT_DOT ranker.

    Example:
        >>> model = kd.BertDot.from_encoder("distilbert/distilbert-base-uncased", pooling="mean")
        >>> tokenizer = AutoTokenizer.from_pretrained("distilbert/distilbert-base-uncased")
        >>> query, document = (tokenizer(text, return_tensors="pt") for text in ("what is bread", "Bread is baked."))
        >>> model(query=query, document=document).scores.shape
        torch.Size([1])
    """

    config_class = BertDotConfig

    def __init__(self, config: BertDotConfig) -> None:
        super().__init__(config)
        if config.compression_dim is not None:
            self.compressor = nn.Linear(config.encoder_config.hidden_size, config.compression_dim)
        self.post_init()

    def encode(self, inputs: Mapping[str, Tensor], side: Side) -> tuple[Tensor, None]:
        """Return one vector per text: (B, D), or (B, n, D) for (B, n, L) inputs."""
        if self.config.pooling == "cls":
            pooled = self.encode_first(inputs)  # (N, H)
        else:
            tokens = self.encode_tokens(inputs)  # (N, L, H)
            mask = inputs["attention_mask"].flatten(0, -2).unsqueeze(-1).to(tokens.dtype)  # (N, L, 1)
            # At least one, so that a text with nothing attended gets the zero vector and not NaN.
            total = (tokens * mask).sum(1, dtype=torch.float32)  # in bfloat16 long texts would lose their last tokens
            pooled = (total / mask.sum(1).clamp(min=1)).to(tokens.dtype)
        if self.config.compression_dim is not None:
            pooled = self.compressor(pooled)
        if self.config.normalize:
            pooled = nn.functional.normalize(pooled.float(), dim=-1).to(pooled.dtype)
        return pooled.view(*inputs["input_ids"].shape[:-1], -1), None

    def score_vectors(
        self, query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
    ) -> Tensor:
        """Return dot products: (B, D) with (B, D) or (B, n, D) gives (B,) or (B, n)."""
        return dot_product(query, document)
