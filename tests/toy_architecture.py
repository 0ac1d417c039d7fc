"""The smallest architecture: the mean of a text's word embeddings, compared by the dot product.

All that a new architecture needs: a config and a model in one file, and `register_ranker`, which the fixture
`toy_architecture` of conftest.py calls for one test.
"""

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoModel

from hf_kd_ranking.models import RankerConfig, RankerModel
from hf_kd_ranking.models.scoring import dot_product


@strict
class ToyConfig(RankerConfig):
    """Configuration of the toy ranker."""

    model_type = "Toy"
    summary = "Toy ranker: a text's vector is the mean of its word embeddings. Document vectors are stored in advance."
    vectors_per_text = "one"
    similarity = "dot"

    vocab_size: int = 100
    hidden_size: int = 16


class Toy(RankerModel):
    """Toy ranker."""

    config_class = ToyConfig
    _input_embed_layer = "embeddings"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    @classmethod
    def from_encoder(cls, name_or_path: str, dtype: torch.dtype | None = None, **config: Any) -> "Toy":
        """Build a fresh ranker on the word embeddings of an encoder."""
        vectors = AutoModel.from_pretrained(name_or_path).get_input_embeddings().weight
        model = cls(cls.config_class(vocab_size=vectors.shape[0], hidden_size=vectors.shape[1], **config))
        with torch.no_grad():
            model.embeddings.weight.copy_(vectors)
        return model.to(dtype or torch.float32).eval()

    def encode(self, inputs: Mapping[str, Tensor], side: str) -> tuple[Tensor, None]:
        """Return one vector per text: (B, H), or (B, n, H) for (B, n, L) inputs."""
        mask = inputs["attention_mask"].unsqueeze(-1)  # (..., L, 1)
        total = (self.embeddings(inputs["input_ids"]) * mask).sum(-2)
        return total / mask.sum(-2).clamp(min=1), None

    def score_vectors(
        self, query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
    ) -> Tensor:
        """Return dot products: (B, H) with (B, H) or (B, n, H) gives (B,) or (B, n)."""
        return dot_product(query, document)
