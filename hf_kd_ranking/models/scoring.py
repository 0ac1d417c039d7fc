"""The score functions of the rankers that encode queries and documents apart: pure functions of tensors."""

from torch import Tensor


def dot_product(query: Tensor, document: Tensor) -> Tensor:
    """Score documents by the dot product with their query's vector (BERT_DOT).

    Computed in float32 whatever the inputs, and by multiplying and summing, which autocast leaves in float32: under
    bfloat16 scores near 100 would be rounded to steps of 0.5.

    Args:
        query: (B, H).
        document: (B, H), or (B, n, H) for n documents a query.

    Returns:
        (B,) or (B, n), unbounded.
    """
    query = query.float()
    if document.dim() == query.dim() + 1:
        query = query.unsqueeze(1)  # (B, 1, H)
    return (query * document.float()).sum(-1)
