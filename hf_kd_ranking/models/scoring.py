"""The score functions of the rankers that encode queries and documents separately, and the layer of the others.

Computed in float32 for inputs of any dtype, also under autocast: in bfloat16 scores near 100 are rounded to steps of
0.5.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Similarity of a padded document token, the published constant. Not 0: it would beat every negative similarity. Not
# -inf: a document with nothing attended would score NaN; with this it scores the constant per query token.
MASKED_SIMILARITY = -10_000.0
# Pairs of a query and a document token compared at once, so that memory beside the vectors stays near 128 MiB.
CHUNK_SIZE = 2**24


class Float32Linear(nn.Linear):
    """A linear layer that computes and returns float32 (or float64) for weights of any dtype, also under autocast."""

    def forward(self, states: Tensor) -> Tensor:
        """Return the scores, (..., out_features)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.to(dtype), self.weight.to(dtype), bias)


def dot_product(query: Tensor, document: Tensor) -> Tensor:
    """Score documents by the dot product with their query's vector (BERT_DOT).

    Args:
        query: (B, D).
        document: (B, D), or (B, n, D) for n documents per query.

    Returns:
        (B,) or (B, n), unbounded.
    """
    query = query.float()  # multiplied and summed, which autocast leaves in float32
    if document.dim() == query.dim() + 1:
        query = query.unsqueeze(1)  # (B, 1, D)
    return (query * document.float()).sum(-1)


def max_sim(
    query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
) -> Tensor:
    """Score documents by the sum over query tokens of the largest dot product with a document token (ColBERT).

    Args:
        query: (B, Lq, D).
        document: (B, Ld, D), or (B, n, Ld, D) for n documents per query.
        query_mask: (B, Lq), nonzero at tokens; padding adds nothing. None takes all.
        document_mask: (B, Ld) or (B, n, Ld); padding has `MASKED_SIMILARITY`. None takes all.

    Returns:
        (B,) or (B, n), unbounded.
    """
    documents, mask = _with_document_axis(query, document, document_mask)
    similarity = _largest_in_chunks(query, documents, mask)  # (B, n, Lq)
    if query_mask is not None:
        similarity = similarity * query_mask.unsqueeze(1)
    scores = similarity.sum(-1)  # (B, n)
    return scores.squeeze(1) if document.dim() == query.dim() else scores


def dot_products(
    query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
) -> Tensor:
    """Score every query with every document by `dot_product`, in one matrix product.

    Args:
        query: (B, D).
        document: (N, D).
        query_mask, document_mask: ignored; for one signature with `max_sims`.

    Returns:
        (B, N).
    """
    with torch.autocast(query.device.type, enabled=False):
        return query.float() @ document.float().T


def max_sims(
    query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
) -> Tensor:
    """Score every query with every document by `max_sim`: all query tokens are those of one long query.

    Args:
        query: (B, Lq, D).
        document: (N, Ld, D).
        query_mask, document_mask: (B, Lq) and (N, Ld), as in `max_sim`.

    Returns:
        (B, N).
    """
    mask = None if document_mask is None else document_mask.unsqueeze(0)
    largest = _largest_in_chunks(query.flatten(0, 1).unsqueeze(0), document.unsqueeze(0), mask)  # (1, N, B * Lq)
    similarity = largest.view(len(document), *query.shape[:2])  # (N, B, Lq)
    if query_mask is not None:
        similarity = similarity * query_mask
    return similarity.sum(-1).T


# The similarities that need no layers of a model, see `RankerConfig` -> their scores of all pairs.
ALL_PAIRS = {"dot": dot_products, "max_sim": max_sims}


def kernel_pooling(
    query: Tensor,
    document: Tensor,
    query_mask: Tensor,
    document_mask: Tensor,
    mu: Tensor,
    sigma: Tensor,
    scale: Tensor,
) -> Tensor:
    """Return soft match counts of query and document tokens, one per Gaussian kernel (KNRM, TK).

    Xiong et al. 2017, https://arxiv.org/abs/1706.06613: the cosine of each pair of tokens falls into kernels around
    `mu`; a query token's count per kernel is scaled and its logarithm taken, and these are summed over the query.

    Args:
        query, document, query_mask, document_mask: as in `max_sim`.
        mu: (K,) centres of the kernels.
        sigma: (K,) their widths.
        scale: (K,) factors on the counts.

    Returns:
        (B, K) or (B, n, K).
    """
    documents, mask = _with_document_axis(query, document, document_mask)
    cosine = _products(_unit_length(query), _unit_length(documents))  # (B, n, Ld, Lq)
    is_pair = mask.unsqueeze(-1).float() * query_mask[:, None, None].float()  # (B, n, Ld, Lq)
    cosine = cosine * is_pair
    counts = []
    for centre, width in zip(mu.float(), sigma.float(), strict=True):  # all at once would need K times the memory
        counts.append((torch.exp(-((cosine - centre) ** 2) / (2 * width**2)) * is_pair).sum(2))  # (B, n, Lq)
    logs = (torch.stack(counts, -1) * scale.float()).clamp(min=1e-10).log()  # (B, n, Lq, K)
    pooled = (logs * query_mask[:, None, :, None].float()).sum(2)  # (B, n, K)
    return pooled.squeeze(1) if document.dim() == query.dim() else pooled


def _with_document_axis(query: Tensor, document: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if document.dim() == query.dim():
        document = document.unsqueeze(1)
        if mask is not None:
            mask = mask.unsqueeze(1)
    return document, mask


def _products(query: Tensor, documents: Tensor) -> Tensor:
    """Return the dot products of all tokens: (B, Lq, D) with (B, n, Ld, D) gives (B, n, Ld, Lq)."""
    with torch.autocast(query.device.type, enabled=False):
        products = documents.float().flatten(1, 2) @ query.float().transpose(1, 2)  # (B, n * Ld, Lq)
    return products.unflatten(1, documents.shape[1:3])


def _largest_in_chunks(query: Tensor, documents: Tensor, mask: Tensor | None) -> Tensor:
    """Return the largest product of each query token with each document's tokens, (B, n, Lq), in chunks of documents.

    Of several chunks none keeps its products for the backward pass, which computes them again.
    """
    size = max(1, CHUNK_SIZE // (query.shape[0] * query.shape[1] * documents.shape[2]))
    is_kept = documents.shape[1] <= size or not torch.is_grad_enabled()
    largest = []
    for start in range(0, documents.shape[1], size):
        chosen = slice(start, start + size)
        chunk = (query, documents[:, chosen], None if mask is None else mask[:, chosen])
        if is_kept:
            largest.append(_largest_products(*chunk))
        else:
            largest.append(checkpoint(_largest_products, *chunk, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(largest, 1)


def _largest_products(query: Tensor, documents: Tensor, mask: Tensor | None) -> Tensor:
    products = _products(query, documents)
    if mask is not None:
        products = products.masked_fill(~mask.bool().unsqueeze(-1), MASKED_SIMILARITY)
    return products.amax(2)  # (B, n, Lq)


def _unit_length(vectors: Tensor) -> Tensor:
    vectors = vectors.float()
    return vectors / (vectors.norm(dim=-1, keepdim=True) + 1e-13)  # TK's published constant; zero stays zero
