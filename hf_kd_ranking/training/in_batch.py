"""Losses over every document of a batch: the other queries' documents are negatives too.

Dual supervision (Hofstätter et al. 2021, https://arxiv.org/abs/2104.06967, section 3.2): teacher rows supervise each
query's own documents, a live teacher that encodes the sides separately (ColBERT) scores each query with all others.
The documents are encoded once, in the one forward pass; with several processes those of all count, with gradients.
Batches whose gradients are accumulated do not see one another's documents.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer

from ..errors import InputError
from ..losses import IN_BATCH, get_loss
from ..models import RankerConfig, RankerModel, RankingOutput


def can_be_live(ranker_config: RankerConfig) -> bool:
    """Return whether a ranker can score each query of a batch with all its documents: it encodes them separately."""
    return ranker_config.is_storable


def check_in_batch(losses: Iterable[str], model: RankerModel, teacher: RankerModel | None) -> None:
    """Refuse losses over the batch that student or teacher do not support.

    Raises:
        InputError: if one cannot score a stored document for another query, or a teacher is missing or not read.
    """
    names = [name for name in losses if name.startswith(IN_BATCH)]
    reading = [name for name in names if get_loss(name).needs_teacher]
    if reading and teacher is None:
        raise InputError(f"{reading[0]} needs a live teacher: give in_batch_teacher, such as a trained ColBERT.")
    if teacher is not None and not reading:
        raise InputError(f"in_batch_teacher is read only by losses over the batch, and {[*losses]} has none.")
    if not names:
        return
    for role, ranker in (("The student", model), ("in_batch_teacher", teacher)):
        if ranker is not None and not can_be_live(ranker.config):
            raise InputError(
                f"{role}, a {ranker.config.model_type}, reads each document with its query; {names[0]} needs a ranker "
                "that encodes them separately (can_be_live): BERT_Dot, ColBERT, TK, TKL, or a PreTTR with a "
                "fixed document_position_offset."
            )


def check_gradient_cache(size: int | None, losses: Collection[str], config: RankerConfig) -> None:
    """Refuse a gradient cache where smaller batches, whose gradients are accumulated, do the same without it.

    Args:
        size: rows that run at once, None for no cache.
        losses: names of the losses, none if the user's own function computes the loss.

    Raises:
        InputError: with the reason.
    """
    if size is None:
        return
    reason = None
    if not can_be_live(config):
        reason = f"a {config.model_type} reads each document with its query"
    elif losses and not any(name.startswith(IN_BATCH) for name in losses):
        reason = f"{' and '.join(losses)} compare only the documents of one row"
    if reason is not None:
        raise InputError(
            f"gradient_cache is for losses over all documents of a batch, and {reason}: give a smaller "
            "per_device_train_batch_size and gradient_accumulation_steps, which have the same gradients."
        )


def in_batch_losses(trainer: Trainer, outputs: RankingOutput, targets: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return loss name -> its weighted value for all documents of a batch, from the student's outputs."""
    losses = {name: weight for name, weight in trainer.losses.items() if name.startswith(IN_BATCH)}
    if not losses:
        return {}
    accelerator, teacher = trainer.accelerator, trainer.in_batch_teacher
    scores = _score_all(accelerator.unwrap_model(trainer.model), outputs, accelerator)  # (B, N)
    is_known = _known_positives(targets["rows"], accelerator)
    is_known[:, 0] = False  # the row's own positive stays
    # A teacher scores every document; labels only would turn another positive into a negative.
    labelled = scores.masked_fill(is_known, -torch.inf)
    teacher_scores = torch.zeros_like(scores)
    if teacher is not None:
        with torch.no_grad():
            with accelerator.autocast():
                teacher_outputs = teacher(**targets["teacher_inputs"])
            teacher_scores = _score_all(teacher, teacher_outputs, accelerator)
    mask = _listed(targets, accelerator)
    values = {}
    for name, weight in losses.items():
        loss = get_loss(name)
        student_scores = scores if loss.needs_teacher else labelled
        values[name] = weight * loss.function(student_scores, teacher_scores * trainer.teacher_scale, mask=mask)
    return values


def _score_all(model: RankerModel, output: RankingOutput, accelerator: Accelerator) -> Tensor:
    """Score B queries with all N = B * n * processes documents, (B, N), a query's own documents first."""
    gathered = gather_rows(output.document_vectors.float(), accelerator)
    documents = gathered.flatten(0, 1)  # (N, ...)
    mask = output.document_mask
    if mask is not None:
        mask = gather_rows(mask, accelerator).flatten(0, 1).bool()
    with accelerator.autocast():  # for the layers of those that score by layers
        scores = model.score_all_pairs(output.query_vectors, documents, output.query_mask, mask)
    return _own_first(scores, gathered.shape[1], accelerator)


def _listed(targets: Mapping[str, Any], accelerator: Accelerator) -> Tensor | None:
    """Return where a document of the batch is in its row's list and not filled in, (B, N) as `_score_all`.

    None means everywhere. Several processes always exchange it, since shorter lists may be in the batch of one only.
    """
    listed = targets.get("is_listed")
    if listed is None and accelerator.num_processes == 1:
        return None
    rows = targets["rows"]["document"]
    if listed is None:
        listed = torch.ones_like(rows, dtype=torch.bool)
    gathered = gather_rows(listed, accelerator)  # (M, n)
    return _own_first(gathered.flatten().expand(len(rows), -1), gathered.shape[1], accelerator)


def _known_positives(rows: dict[str, Tensor], accelerator: Accelerator) -> Tensor:
    """Return where a document of the batch is a positive of the query in one of its rows, (B, N) as `_score_all`.

    Every passage of a positive document is one.
    """
    queries = gather_rows(rows["query"], accelerator)
    documents = gather_rows(rows.get("whole", rows["document"]), accelerator)
    is_same_query = rows["query"].unsqueeze(1) == queries  # (B, M)
    is_positive = documents[:, :1] == documents.flatten()  # (M, N)
    known = (is_same_query.float() @ is_positive.float()) > 0
    return _own_first(known, documents.shape[1], accelerator)


def gather_rows(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """Gather the rows of all processes, (B, n, ...) to (B * processes, n, ...), with gradients.

    Where the longest list or document of the processes differ, documents and tokens are filled up with zeros.
    """
    if accelerator.num_processes == 1:
        return tensor
    for dim in range(1, min(tensor.dim(), 3)):  # padding turns bool into integers
        tensor = accelerator.pad_across_processes(tensor, dim=dim).to(tensor.dtype)
    return _Gather.apply(tensor, accelerator)


class _Gather(torch.autograd.Function):
    """Gather rows; a row's gradient is the sum of its gradients on all processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, accelerator: Accelerator) -> Tensor:
        ctx.accelerator = accelerator
        return accelerator.gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        parts = ctx.accelerator.reduce(gradient, "sum").chunk(ctx.accelerator.num_processes)
        return parts[ctx.accelerator.process_index], None


def _own_first(columns: Tensor, n: int, accelerator: Accelerator) -> Tensor:
    rows, width = columns.shape
    first = (torch.arange(rows, device=columns.device) + rows * accelerator.process_index) * n
    order = (first.unsqueeze(1) + torch.arange(width, device=columns.device)) % width
    return columns.gather(1, order)
