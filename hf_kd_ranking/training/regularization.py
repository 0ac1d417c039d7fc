"""Penalties on the weights of sparse vectors, which keep an inverted index small and its search fast.

Paria et al. 2020, https://arxiv.org/abs/2004.05665, with the quadratic warm-up of SPLADE v2,
https://arxiv.org/abs/2109.10086.
"""

import logging
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer

from ..errors import InputError
from ..losses import Regularizer
from ..models import RankerConfig, RankingOutput
from .in_batch import gather_rows

logger = logging.getLogger(__name__)


def flops(means: Tensor) -> Tensor:
    """Return the sum of the squared mean weights, (V,): words that many texts have cost more."""
    return means.square().sum()


def l1(means: Tensor) -> Tensor:
    """Return the sum of the mean weights, (V,): every weight costs the same."""
    return means.sum()


PENALTIES = {"flops": flops, "l1": l1}


def check_regularization(regularizers: Mapping[str, Regularizer], config: RankerConfig) -> None:
    """Refuse, by an InputError, penalties for a ranker that has no sparse vectors."""
    for name in regularizers:
        if config.vectors_per_text != "sparse":
            raise InputError(
                f"{name} is a penalty on sparse vectors, which a {config.model_type} does not have; train a splade, "
                "or leave it out of the loss."
            )


def regularization_losses(trainer: Trainer, outputs: RankingOutput, mask: Tensor | None) -> dict[str, Tensor]:
    """Return regularizer name -> its weighted value for the vectors of a batch, those of all processes.

    A penalty is a function of the mean weight of each word over the batch's queries, or over its listed documents.
    """
    losses = {}
    state = trainer.state
    progress = state.global_step / max(state.max_steps, 1)
    for name, regularizer in trainer.regularizers.items():
        total = outputs.scores.new_zeros(())
        for side, vectors, listed in _sides(outputs, mask):
            weight = getattr(regularizer, side) * regularizer.warmup_factor(progress)
            if weight > 0:
                means = _means(vectors.float().abs(), listed, trainer.accelerator)
                total = total + weight * PENALTIES[regularizer.name](means)
        losses[name] = total
    return losses


class SparsityStatistics:
    """Count words with a weight over the steps between two log lines, as they are before pruning.

    Logged: `active_query` and `active_document`, the mean number of words with a weight per text; and `operations`,
    the expected number of multiplications for a query and a document, sum over words of P(query has it) *
    P(document has it), which times the size of a collection is the work of a search.
    """

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}  # side -> texts with each word (V,), and texts
        self._has_warned = False

    @torch.no_grad()
    def add(self, outputs: RankingOutput, mask: Tensor | None) -> None:
        """Count the vectors of a batch."""
        for side, vectors, listed in _sides(outputs, mask):
            counts = torch.cat([(vectors != 0).float().mul(listed).sum(0), listed.sum(0)])
            self._counts[side] = self._counts.get(side, 0) + counts

    def pop(self, accelerator: Accelerator, loss: str) -> dict[str, float]:
        """Return the statistics since the last call, over all processes; warn once if a side has no weights left."""
        if not self._counts:
            return {}
        shares = {}
        for side, counts in self._counts.items():
            counts = accelerator.reduce(counts, "sum")
            shares[side] = counts[:-1] / counts[-1]
        self._counts = {}
        statistics = {f"active_{side}": share.sum().item() for side, share in shares.items()}
        empty = [side for side in shares if statistics[f"active_{side}"] == 0]
        if empty and not self._has_warned and accelerator.is_main_process:
            self._has_warned = True
            logger.warning(
                "No %s has a word with a weight: all scores are 0, and nothing is learned. The penalty in the "
                "loss %r is too strong: divide its weights by 10, or warm up for longer, and train again; if there is "
                "none, lower the learning rates.",
                " and no ".join(empty),
                loss,
            )
        return statistics | {"operations": (shares["query"] * shares["document"]).sum().item()}


def _sides(outputs: RankingOutput, mask: Tensor | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each side's name, its vectors, (M, V), and 1 where one counts, (M, 1): documents that are listed."""
    queries, documents = outputs.query_vectors, outputs.document_vectors.flatten(0, -2)
    yield "query", queries, queries.new_ones(len(queries), 1)
    listed = documents.new_ones(len(documents)) if mask is None else mask.flatten().to(documents.dtype)
    yield "document", documents, listed.unsqueeze(1)


def _means(weights: Tensor, listed: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the mean weight of each word over the listed texts of all processes, (V,), with gradients."""
    sums = gather_rows((weights * listed).sum(0, keepdim=True), accelerator).sum(0)
    return sums / gather_rows(listed.sum(0, keepdim=True), accelerator).sum()
