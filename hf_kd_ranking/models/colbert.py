"""ColBERT: one vector per token; the score sums, over query tokens, the largest dot product with a document token.

Source: Khattab and Zaharia 2020, https://arxiv.org/abs/2004.12832; arXiv 2010.02666, equation 4. Unlike the original
the paper's model does not normalise vectors.
"""

from collections.abc import Mapping

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from .base import Side
from .encoder import EncoderRanker, EncoderRankerConfig
from .scoring import max_sim


@strict
class ColBERTConfig(EncoderRankerConfig):
    """Configuration of ColBERT.

    Args:
        compression_dim: size of a token's vector after the linear compression.
        query_augmentation: [MASK] tokens added after a query's [SEP]; they are scored like any other token.
        normalize: True scales each vector to length 1, so that tokens are compared by cosine, unlike in the paper.

    Example:
        >>> config = kd.ColBERTConfig(compression_dim=128, query_augmentation=0)
        >>> config.vectors_per_text, config.similarity
        ('per_token', 'max_sim')
    """

    model_type = "ColBERT"
    summary = (
        "ColBERT ranker: one encoder makes a vector of every token, and the score sums, over the query's "
        "tokens, the largest dot product with a document's token. Token vectors are stored in advance."
    )
    vectors_per_text = "per_token"
    similarity = "max_sim"

    compression_dim: int = 768
    query_augmentation: int = 8
    normalize: bool = False


class ColBERT(EncoderRanker):
    """ColBERT ranker.

    Example:
        >>> ranker = kd.Ranker.from_pretrained("colbert")
        >>> ranker.encode_documents(["Bread is baked."])[0].shape  # one vector per token, [CLS] and [SEP] included
        (6, 128)
    """

    config_class = ColBERTConfig

    def __init__(self, config: ColBERTConfig) -> None:
        super().__init__(config)
        self.compressor = nn.Linear(config.encoder_config.hidden_size, config.compression_dim)
        self.post_init()

    def encode(self, inputs: Mapping[str, Tensor], side: Side) -> tuple[Tensor, Tensor]:
        """Return one vector per token, (B, L, D) or (B, n, L, D), and the mask of the tokens, (B, L) or (B, n, L)."""
        vectors = self.compressor(self.encode_tokens(inputs))  # (N, L, D)
        if self.config.normalize:
            vectors = nn.functional.normalize(vectors.float(), dim=-1).to(vectors.dtype)
        return vectors.view(*inputs["input_ids"].shape, -1), inputs["attention_mask"].bool()

    def score_vectors(
        self, query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
    ) -> Tensor:
        """Return MaxSim scores: (B, Lq, D) with (B, Ld, D) or (B, n, Ld, D) gives (B,) or (B, n)."""
        return max_sim(query, document, query_mask, document_mask)
