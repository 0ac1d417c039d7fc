"""TKL: TK for long documents, whose layers read chunks and whose kernels are pooled in regions.

Source: Hofstätter et al. 2020, https://arxiv.org/abs/2005.04908. A document is read in chunks that see a few tokens of
their neighbours. The soft match counts of a region of tokens are saturated by a curve that depends on the query token
and on the region's length, and the score is the weighted sum of the best regions that do not overlap. The authors'
code differs in four ways:

* There, a document's last regions, and what counts as the neighbour of its last one, depend on the longest document of
  the batch. Here every `region_step` tokens begin a region, the last ones are shorter, and the neighbours stay within
  the document.
* There, the two features of the curve are normalised by a LayerNorm over the two, which turns nearly every pair into
  (-1, 1) or (1, -1): only their order is left. Here the curve reads them as they are.
* There, the root of the curve has no limit. Here it is at least 1: below it nothing is saturated, and at 0 the score
  would be infinite.
* There, the positions are trained. Here they are fixed sines, as in TK.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from .base import RankerModel, Side
from .errors import InputError
from .scoring import Float32Linear, cosines
from .tk import TK, TKConfig


@strict
class TKLConfig(TKConfig):
    """Configuration of TKL.

    Args:
        chunk_size: tokens of a document that the layers read at once.
        chunk_overlap: tokens on either side of a chunk that are read with it.
        region_size: tokens of a region.
        region_step: tokens between the beginnings of two regions.
        region_count: regions without a common token that are scored, the best ones.
        region_neighbors: regions before, and after, each of these that are scored with it.

    Example:
        >>> config = kd.TKLConfig(chunk_size=60, region_size=40, max_document_length=1_000)
        >>> config.document_positions  # of a chunk and five tokens on either side
        70
    """

    model_type = "TKL"
    summary = (
        "TKL ranker: TK for long documents, whose layers read chunks of a document and whose score is that of its "
        "best regions. It needs no pretrained encoder; token vectors are stored in advance."
    )

    max_document_length: int = 2_000
    max_position_embeddings: int = 2_000
    chunk_size: int = 40
    chunk_overlap: int = 5
    region_size: int = 30
    region_step: int = 2
    region_count: int = 3
    region_neighbors: int = 2

    def check(self) -> None:
        """See `RankerConfig`."""
        least = {"chunk_size": 1, "chunk_overlap": 0, "region_step": 1, "region_count": 1, "region_neighbors": 0}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise InputError(f"{name} must be at least {limit}, got {getattr(self, name)}.")
        if self.region_size < self.region_step:
            raise InputError(
                f"region_size must be at least region_step, else tokens are left out; got {self.region_size} and "
                f"{self.region_step}."
            )
        super().check()

    @property
    def document_positions(self) -> int:
        """See `TKConfig`; every chunk has the same positions."""
        return self.chunk_size + 2 * self.chunk_overlap


class TKL(TK):
    """TKL ranker.

    Example:
        >>> model = kd.TKL.from_encoder("distilbert/distilbert-base-uncased", max_document_length=1_000)
        >>> model.region_weights.shape  # three regions, each with two neighbors on either side
        torch.Size([3, 5])
    """

    config_class = TKLConfig

    def add_score_layers(self, config: TKLConfig) -> None:
        """See `TK`."""
        self.salience = Float32Linear(config.hidden_size, 1, bias=False)
        # Of a query token's salience and a region's length: factor a, root b and shift c of the curve a x^(1/b) - c.
        self.saturation = Float32Linear(2, 3)
        self.region_weights = nn.Parameter(torch.ones(config.region_count, 2 * config.region_neighbors + 1))

    def contextualize(self, embeddings: Tensor, mask: Tensor, side: Side, lengths: list[int] | None = None) -> Tensor:
        """See `TK`; a document's layers read its chunks."""
        if side == "query":
            return super().contextualize(embeddings, mask, side, lengths)
        size, overlap, length = self.config.chunk_size, self.config.chunk_overlap, embeddings.shape[1]
        count = (length + size - 1) // size
        after = count * size - length + overlap
        chunks = nn.functional.pad(embeddings, (0, 0, overlap, after)).unfold(1, size + 2 * overlap, size)
        chunks = chunks.transpose(2, 3).flatten(0, 1)  # (N * C, S + 2 O, H)
        chunk_mask = nn.functional.pad(mask, (overlap, after)).unfold(1, size + 2 * overlap, size).flatten(0, 1)
        own = slice(overlap, overlap + size)
        chunk_mask = chunk_mask & chunk_mask[:, own].any(1, keepdim=True)  # chunks of padding are hardly computed
        chunk_lengths = None if lengths is None else self._chunk_lengths(lengths, count)
        states = super().contextualize(chunks, chunk_mask, side, chunk_lengths)[:, own]  # (N * C, S, H)
        return states.reshape(len(embeddings), count * size, -1)[:, :length]

    def _chunk_lengths(self, lengths: list[int], count: int) -> list[int]:
        """Return the places of the last tokens of each document's chunks, from those of the documents."""
        size, overlap = self.config.chunk_size, self.config.chunk_overlap
        found = []
        for length in lengths:
            for start in range(0, count * size, size):
                has_own = length > start
                found.append(min(length - start + overlap, size + 2 * overlap) if has_own else 0)
        return found

    def score_vectors(
        self, query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
    ) -> Tensor:
        """Weigh the best regions: (B, Lq, H) with (B, Ld, H) or (B, n, Ld, H) gives (B,) or (B, n)."""
        if query_mask is None or document_mask is None:
            raise InputError("TKL scores need the masks of both sides; forward returns them with the vectors.")
        if document.shape[-2] == 0:  # stored documents without a token; a region begins at a token, or at padding
            document = nn.functional.pad(document, (0, 0, 0, 1))
            document_mask = nn.functional.pad(document_mask, (0, 1))
        scores, is_region = self._score_regions(query, document, query_mask, document_mask)
        best = self._choose_regions(scores, is_region)
        return (best * self.region_weights.to(best.dtype)).sum((1, 2)).view(document.shape[:-2])

    def score_all_pairs(
        self, query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
    ) -> Tensor:
        """Score every query with every document in blocks of documents, see `RankerModel`."""
        return RankerModel.score_all_pairs(self, query, document, query_mask, document_mask)

    def _score_regions(
        self, query: Tensor, document: Tensor, query_mask: Tensor, document_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the scores of all regions of N documents, (N, R), and whether they have a token, (N, R)."""
        similarity = cosines(query, document).flatten(0, -3)  # (N, Lq, Ld)
        n = len(similarity) // len(query)
        is_token = document_mask.flatten(0, -2).unsqueeze(1).to(similarity.dtype)  # (N, 1, Ld)
        query_mask = query_mask.repeat_interleave(n, 0).unsqueeze(2).to(similarity.dtype)  # (N, Lq, 1)
        lengths = self._sum_regions(is_token)  # (N, 1, R)
        salience = self.salience(query).repeat_interleave(n, 0)  # (N, Lq, 1)
        features = torch.stack(torch.broadcast_tensors(salience, lengths), -1)  # (N, Lq, R, 2)
        factor, root, shift = self.saturation(features).unbind(-1)  # (N, Lq, R) each
        exponent = 1 / root.clamp(min=1)
        kernels = [tensor.flatten().to(similarity.dtype) for tensor in (self.mu, self.sigma)]
        weights = self.kernel_bin_weights.weight.flatten().to(similarity.dtype)
        scores = torch.zeros_like(lengths).squeeze(1)  # (N, R)
        for centre, width, weight in zip(*kernels, weights, strict=True):
            values = ((similarity - centre).square() / (-2 * width**2)).exp() * is_token
            counts = self._sum_regions(values).clamp(min=1e-10)  # (N, Lq, R)
            saturated = (factor * counts**exponent - shift) * query_mask
            scores = scores + weight * saturated.sum(1)
        return scores, lengths.squeeze(1) > 0

    def _sum_regions(self, values: Tensor) -> Tensor:
        """Sum values, (N, C, L), over the tokens of each region: (N, C, R). A region begins at one of the L tokens."""
        size, step = self.config.region_size, self.config.region_step
        rows = values.flatten(0, 1).unsqueeze(1)  # (N * C, 1, L): pooling takes no rows, but not no channels
        sums = nn.functional.avg_pool1d(nn.functional.pad(rows, (0, size - 1)), size, step) * size
        return sums.view(*values.shape[:2], sums.shape[2])

    def _choose_regions(self, scores: Tensor, is_region: Tensor) -> Tensor:
        """Return the scores of the best regions and of their neighbours, (N, T, 2 K + 1), 0 where no region is left.

        The neighbour of a document's first or last region is that region.
        """
        around, none = self.config.region_neighbors, float("-inf")
        distance = (self.config.region_size + self.config.region_step - 1) // self.config.region_step
        places = torch.arange(scores.shape[1], device=scores.device)
        offsets = torch.arange(-around, around + 1, device=scores.device)
        last = (is_region * places).amax(1, keepdim=True)  # (N, 1)
        remaining = scores.detach().masked_fill(~is_region, none)
        chosen = []
        for _ in range(self.config.region_count):
            best = remaining.argmax(1, keepdim=True)  # (N, 1)
            is_left = remaining.gather(1, best) != none
            neighbors = torch.minimum((best + offsets).clamp(min=0), last)  # (N, 2 K + 1)
            is_counted = is_left & is_region.gather(1, neighbors)
            chosen.append(scores.gather(1, neighbors).masked_fill(~is_counted, 0))
            remaining = remaining.masked_fill((places - best).abs() < distance, none)
        return torch.stack(chosen, 1)

    def head_parameters(self) -> list[nn.Parameter]:
        """See `RankerModel`; everything after the token vectors."""
        layers = [self.salience, self.saturation, self.kernel_bin_weights]
        return [self.region_weights, *nn.ModuleList(layers).parameters()]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.saturation:  # the authors'; 100 x^(1/100) - 100 is close to the logarithm of x
            init.uniform_(module.weight, -0.014, 0.014)
            init.constant_(module.bias, 100.0)
