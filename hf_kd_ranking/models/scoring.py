"""The score functions of the rankers that encode queries and documents separately, and the layer of the others.

Computed in float32 (in float64 for float64 vectors), also under autocast: in bfloat16 scores near 100 are rounded to
steps of 0.5. Vectors of tokens are compared in blocks of documents, whose products are not kept.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Similarity of a padded document token, the published constant. Not 0: it would beat every negative similarity. Not
# -inf: a document with nothing attended would score NaN; with this it scores the constant per query token.
MASKED_SIMILARITY = -10_000.0
# Pairs of a query and a document token compared at once: 4 MiB of products, which stay in a CPU's cache; 64 MiB for
# devices that start each operation at a cost.
BLOCK_SIZE = {"cpu": 2**20, "cuda": 2**24}


class Float32Linear(nn.Linear):
    """A linear layer that computes and returns float32 (or float64) for weights of any dtype, also under autocast."""

    def forward(self, states: Tensor) -> Tensor:
        """Return the scores, (..., out_features)."""
        weight = _widen(self.weight)
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.to(weight.dtype), weight, bias)


def dot_product(query: Tensor, document: Tensor) -> Tensor:
    """Score documents by the dot product with their query's vector (BERT_DOT).

    Args:
        query: (B, D).
        document: (B, D), or (B, n, D) for n documents per query.

    Returns:
        (B,) or (B, n), unbounded.
    """
    query = _widen(query)  # multiplied and summed, which autocast leaves in float32
    if document.dim() == query.dim() + 1:
        query = query.unsqueeze(1)  # (B, 1, D)
    return (query * _widen(document)).sum(-1)


def max_sim(
    query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
) -> Tensor:
    """Score documents by the sum over query tokens of the largest dot product with a document token (ColBERT).

    Of equal largest products the first document token gets the gradient. There is no second derivative.

    Args:
        query: (B, Lq, D).
        document: (B, Ld, D), or (B, n, Ld, D) for n documents per query.
        query_mask: (B, Lq), nonzero at tokens; padding adds nothing. None takes all.
        document_mask: (B, Ld) or (B, n, Ld); padding has `MASKED_SIMILARITY`. None takes all.

    Returns:
        (B,) or (B, n), unbounded.
    """
    documents, mask = _with_document_axis(query, document, document_mask)
    similarity = _LargestProducts.apply(_widen(query), _widen(documents), mask)  # (B, n, Lq)
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
    return _multiply(_widen(query), _widen(document).T)


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
    largest = _LargestProducts.apply(*_as_one_query(_widen(query), _widen(document), document_mask))
    similarity = largest.view(len(document), *query.shape[:2])  # (N, B, Lq)
    if query_mask is not None:
        similarity = similarity * query_mask
    return similarity.sum(-1).T


def max_sim_without_padding(query: Tensor, vectors: Tensor, lengths: Tensor) -> Tensor:
    """Score documents whose token vectors lie one after the other with one query, as `max_sim` does from padded ones.

    It cannot be differentiated.

    Args:
        query: (Lq, D).
        vectors: (T, D), the tokens of all N documents.
        lengths: (N,), the tokens of each; a document without tokens has only padding.

    Returns:
        (N,).
    """
    similarity = _multiply(_widen(vectors), _widen(query).T)  # (T, Lq)
    largest = torch.segment_reduce(similarity, "max", lengths=lengths, axis=0, initial=MASKED_SIMILARITY)
    return largest.sum(-1)


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
        mu: (K,) centres of the kernels, constants: they have no gradient.
        sigma: (K,) their widths, constants.
        scale: (K,) factors on the counts.

    Returns:
        (B, K) or (B, n, K).
    """
    documents, mask = _with_document_axis(query, document, document_mask)
    texts = _unit_length(query), _unit_length(documents), mask
    counts = _KernelCounts.apply(*texts, _widen(mu), _widen(sigma))  # (K, B, n, Lq)
    pooled = _sum_of_logarithms(counts, query_mask.unsqueeze(1), scale)
    return pooled.squeeze(1) if document.dim() == query.dim() else pooled


def kernel_poolings(
    query: Tensor,
    document: Tensor,
    query_mask: Tensor,
    document_mask: Tensor,
    mu: Tensor,
    sigma: Tensor,
    scale: Tensor,
) -> Tensor:
    """Pool the kernels of every query with every document, see `kernel_pooling`.

    Args:
        query, document, query_mask, document_mask: as in `max_sims`.
        mu, sigma, scale: as in `kernel_pooling`.

    Returns:
        (B, N, K).
    """
    texts = _as_one_query(_unit_length(query), _unit_length(document), document_mask)
    counts = _KernelCounts.apply(*texts, _widen(mu), _widen(sigma))  # (K, 1, N, B * Lq)
    counts = counts.view(len(mu), len(document), *query.shape[:2])
    return _sum_of_logarithms(counts, query_mask, scale).transpose(0, 1)


def cosines(query: Tensor, document: Tensor) -> Tensor:
    """Return the cosines of all pairs of a query and a document token.

    Args:
        query, document: as in `max_sim`.

    Returns:
        (B, Lq, Ld) or (B, n, Lq, Ld).
    """
    documents, _ = _with_document_axis(query, document, None)
    products = _products(_unit_length(query), _unit_length(documents)).transpose(2, 3)  # (B, n, Lq, Ld)
    return products.squeeze(1) if document.dim() == query.dim() else products


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _unit_length(vectors: Tensor) -> Tensor:
    vectors = _widen(vectors)
    return vectors / (vectors.norm(dim=-1, keepdim=True) + 1e-13)  # TK's published constant; zero stays zero


def _sum_of_logarithms(counts: Tensor, query_mask: Tensor, scale: Tensor) -> Tensor:
    """Sum the logarithms of scaled counts, (K, ..., Lq), over the tokens of the query, (..., Lq): (..., K)."""
    scale = scale.to(counts.dtype).view(-1, *[1] * (counts.dim() - 1))
    logs = (counts * scale).clamp(min=1e-10).log()
    return (logs * query_mask.to(counts.dtype)).sum(-1).movedim(0, -1)


def _with_document_axis(query: Tensor, document: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if document.dim() == query.dim():
        document = document.unsqueeze(1)
        if mask is not None:
            mask = mask.unsqueeze(1)
    return document, mask


def _as_one_query(query: Tensor, document: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Join B queries to a single one with N documents: (1, B * Lq, D), (1, N, Ld, D) and (1, N, Ld)."""
    if mask is not None:
        mask = mask.unsqueeze(0)
    return query.flatten(0, 1).unsqueeze(0), document.unsqueeze(0), mask


def _products_by_block(query: Tensor, documents: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the place of each block of documents, and its tokens' dot products with the query's, (B, block, Ld, T)."""
    pairs = BLOCK_SIZE.get(query.device.type, BLOCK_SIZE["cuda"])
    size = max(1, pairs // max(1, query.shape[0] * query.shape[1] * documents.shape[2]))
    for start in range(0, documents.shape[1], size):
        block = slice(start, start + size)
        yield block, _products(query, documents[:, block])


def _products(query: Tensor, documents: Tensor) -> Tensor:
    """Return the dot products of all tokens: (B, T, D) with (B, n, Ld, D) gives (B, n, Ld, T)."""
    products = _multiply(documents.flatten(1, 2), query.transpose(1, 2))  # (B, n * Ld, T)
    return products.unflatten(1, documents.shape[1:3])


def _multiply(first: Tensor, second: Tensor) -> Tensor:
    """Return the matrix product in the dtype of both, also under autocast."""
    with torch.autocast(first.device.type, enabled=False):
        return first @ second


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "The scores of token vectors have no second derivative; compute their gradients without create_graph=True."
        )


class _LargestProducts(torch.autograd.Function):
    """The largest product of each query token with each document's tokens, (B, n, T).

    Kept for the backward pass are the vectors and the place of each largest product. Its gradient goes to one pair of
    tokens, so that the backward pass needs no matrix product. A masked token has a constant product.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, documents: Tensor, mask: Tensor | None) -> Tensor:
        """Compare queries, (B, T, D), with n documents each, (B, n, Ld, D) and (B, n, Ld)."""
        shape = (query.shape[0], documents.shape[1], query.shape[1])
        largest, places = query.new_empty(shape), None
        if any(ctx.needs_input_grad):  # without its place the maximum is found six times as fast
            places = query.new_empty(shape, dtype=torch.int32)
        for block, products in _products_by_block(query, documents):
            if mask is not None:
                products.masked_fill_(~mask[:, block].bool().unsqueeze(-1), MASKED_SIMILARITY)
            if places is None:
                largest[:, block] = products.amax(2)
            else:
                largest[:, block], places[:, block] = products.max(2)
        ctx.save_for_backward(query, documents, mask, places)
        return largest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Sum, for each token, the vectors that it was multiplied with, weighted by the gradient."""
        _refuse_second_derivative()
        query, documents, mask, places = ctx.saved_tensors
        places = places.long()
        if mask is not None:
            gradient = gradient * mask.bool().gather(2, places)
        queries = torch.arange(len(query), device=query.device).view(-1, 1, 1)
        document_numbers = queries * places.shape[1] + torch.arange(places.shape[1], device=query.device).view(-1, 1)
        # The rows of both tokens of each pair among all tokens, (B * n * T,).
        query_rows = (queries * query.shape[1] + torch.arange(query.shape[1], device=query.device)).expand_as(places)
        query_rows, document_rows = query_rows.flatten(), (document_numbers * documents.shape[2] + places).flatten()
        query_tokens, document_tokens, gradient = query.flatten(0, 1), documents.flatten(0, 2), gradient.flatten()
        of_queries = _weighted_sums(query_rows, len(query_tokens), document_rows, document_tokens, gradient)
        of_documents = _weighted_sums(document_rows, len(document_tokens), query_rows, query_tokens, gradient)
        return of_queries.view_as(query), of_documents.view_as(documents), None


def _weighted_sums(rows: Tensor, count: int, others: Tensor, vectors: Tensor, weights: Tensor) -> Tensor:
    """Return, for each of `count` rows, the weighted sum of the vectors that it is paired with, (count, D).

    Args:
        rows, others, weights: (P,), the row of each pair, the place of the other in `vectors`, and the weight.
        vectors: (V, D).
    """
    order = rows.argsort(stable=True)
    starts = torch.searchsorted(rows[order], torch.arange(count, device=rows.device))
    # One pass over the pairs, without a tensor of their vectors, (P, D).
    return nn.functional.embedding_bag(others[order], vectors, starts, mode="sum", per_sample_weights=weights[order])


class _KernelCounts(torch.autograd.Function):
    """The soft match counts of each query token with each document's tokens, (K, B, n, T).

    The backward pass computes the cosines again: kept, they would need the memory of all pairs of tokens.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, documents: Tensor, mask: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
        """Count for queries, (B, T, D), and n documents each, (B, n, Ld, D) and (B, n, Ld), of unit length."""
        ctx.save_for_backward(query, documents, mask, mu, sigma)
        counts = query.new_empty(len(mu), query.shape[0], documents.shape[1], query.shape[1])
        for block, cosines in _products_by_block(query, documents):
            is_token = mask[:, block].unsqueeze(2).to(query.dtype)  # (B, block, 1, Ld)
            for place, (centre, width) in enumerate(zip(mu, sigma, strict=True)):
                values = (cosines - centre).square_().div_(-2 * width**2).exp_()  # (B, block, Ld, T)
                counts[place, :, block] = _multiply(is_token, values).squeeze(2)
        return counts

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Sum the derivatives of the kernels to one of each cosine, and multiply it with the vectors."""
        _refuse_second_derivative()
        query, documents, mask, mu, sigma = ctx.saved_tensors
        of_query, of_documents = torch.zeros_like(query), torch.empty_like(documents)
        for block, cosines in _products_by_block(query, documents):
            slopes = torch.zeros_like(cosines)  # (B, block, Ld, T)
            for place, (centre, width) in enumerate(zip(mu, sigma, strict=True)):
                distance = cosines - centre
                values = distance.square().div_(-2 * width**2).exp_().mul_(distance)
                slopes.addcmul_(values, gradient[place, :, block].unsqueeze(2) / -(width**2))
            slopes *= mask[:, block].unsqueeze(-1)
            chosen, slopes = documents[:, block], slopes.flatten(1, 2)
            of_query += _multiply(slopes.transpose(1, 2), chosen.flatten(1, 2))
            of_documents[:, block] = _multiply(slopes, query).view_as(chosen)
        return of_query, of_documents, None, None, None
