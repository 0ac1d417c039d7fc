"""Penalties on the weights of sparse vectors, which keep an inverted index small and its search fast.

Paria et al. 2020, https://arxiv.org/abs/2004.05665, with the quadratic warm-up of SPLADE v2,
https://arxiv.org/abs/2109.10086.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer

from ..errors import InputError
from ..losses import REGULARIZERS, parts_of, read_settings
from ..models import RankerConfig, RankingOutput
from .in_batch import gather_rows


@dataclass(frozen=True)
class Regularizer:
    """A penalty on the weights of sparse vectors, which is added to the loss.

    Args:
        name: one of `REGULARIZERS`.
        query, document: weights of the penalty on either side.
        warmup: share of all steps, up to 1, over which the weights rise as the square of the steps.
    """

    name: str
    query: float = 0.0
    document: float = 0.0
    warmup: float = 0.0

    def warmup_factor(self, progress: float) -> float:
        """Return the factor on the weights after a share of all steps, 0 to 1."""
        return 1.0 if progress >= self.warmup else (progress / self.warmup) ** 2


def get_regularizers(text: str) -> dict[str, Regularizer]:
    """Read the penalties within a text of losses, such as `margin_mse,flops(query=0.3,document=0.1,warmup=0.3)`.

    Raises:
        InputError: for a penalty given twice, without a weight of a side, or with another weight or setting.
    """
    regularizers = {}
    for part in parts_of(text):
        name, _, rest = part.partition("(")
        if name not in REGULARIZERS:
            continue
        if name in regularizers:
            raise InputError(f"The penalty {name} is given twice in {text!r}; give it once.")
        if not rest.endswith(")"):
            raise InputError(f"The weights of {name} are its settings, {name}(query=0.3,document=0.1), got {part!r}.")
        settings = read_settings(name, rest, ("query", "document", "warmup"))
        if not {"query", "document"} & settings.keys() or settings.get("warmup", 0) > 1:
            raise InputError(f"{name} needs a weight, query= or document=, and a warmup of at most 1, got {part!r}.")
        regularizers[name] = Regularizer(name, **settings)
    return regularizers


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

    @torch.no_grad()
    def add(self, outputs: RankingOutput, mask: Tensor | None) -> None:
        """Count the vectors of a batch."""
        for side, vectors, listed in _sides(outputs, mask):
            counts = torch.cat([(vectors != 0).float().mul(listed).sum(0), listed.sum(0)])
            self._counts[side] = self._counts.get(side, 0) + counts

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the statistics since the last call, over all processes."""
        if not self._counts:
            return {}
        shares = {}
        for side, counts in self._counts.items():
            counts = accelerator.reduce(counts, "sum")
            shares[side] = counts[:-1] / counts[-1]
        self._counts = {}
        statistics = {f"active_{side}": share.sum().item() for side, share in shares.items()}
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
