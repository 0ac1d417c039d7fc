"""Losses over every document of a batch: the other queries' documents are negatives too.

Dual supervision (Hofstätter et al. 2021, https://arxiv.org/abs/2104.06967, section 3.2): teacher rows supervise each
query's own documents, a live teacher that encodes the sides separately (ColBERT) scores each query with all others.
The documents are encoded once, in the one forward pass; with several processes those of all count, with gradients.
Batches whose gradients are accumulated do not see one another's documents.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer

from ..losses import IN_BATCH, LOSSES
from ..models import RankerModel, RankingOutput


def check_in_batch(losses: Iterable[str], model: RankerModel, teacher: RankerModel | None) -> None:
    """Refuse losses over the batch that student or teacher do not support.

    Raises:
        ValueError: if one cannot score a stored document for another query, or a teacher is missing or not read.
    """
    names = [name for name in losses if name.startswith(IN_BATCH)]
    reading = [name for name in names if LOSSES[name.removeprefix(IN_BATCH)].needs_teacher]
    if reading and teacher is None:
        raise ValueError(f"{reading[0]} needs a live teacher: give in_batch_teacher, such as a trained ColBERT.")
    if teacher is not None and not reading:
        raise ValueError(f"in_batch_teacher is read only by losses over the batch, and {[*losses]} has none.")
    if not names:
        return
    for role, ranker in (("The student", model), ("in_batch_teacher", teacher)):
        if ranker is not None and not ranker.config.is_storable:
            raise ValueError(
                f"{role}, a {ranker.config.model_type}, reads each document with its query; {names[0]} needs a "
                "BERT_Dot, ColBERT or TK, or a PreTTR with a fixed document_position_offset."
            )


def in_batch_losses(trainer: Trainer, outputs: RankingOutput, targets: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return loss name -> its weighted value for all documents of a batch, from the student's outputs.

    Raises:
        ValueError: if the lists of the batch differ in length.
    """
    losses = {name: weight for name, weight in trainer.losses.items() if name.startswith(IN_BATCH)}
    if not losses:
        return {}
    if "is_listed" in targets:
        raise ValueError(f"{next(iter(losses))} needs lists of one length; cut them, or leave the loss out.")
    accelerator, teacher = trainer.accelerator, trainer.in_batch_teacher
    scores = _score_all(accelerator.unwrap_model(trainer.model), outputs, accelerator)  # (B, N)
    is_known = _known_positives(targets["rows"], accelerator)
    is_known[:, 0] = False  # the row's own positive stays
    # A teacher scores every document; labels only would turn another positive into a negative.
    labelled = scores.masked_fill(is_known, -torch.inf)
    teacher_scores = torch.zeros_like(scores)
    if teacher is not None:
        with torch.no_grad():
            teacher_scores = _score_all(teacher, teacher(**targets["teacher_inputs"]), accelerator)
    values = {}
    for name, weight in losses.items():
        loss = LOSSES[name.removeprefix(IN_BATCH)]
        student_scores = scores if loss.needs_teacher else labelled
        values[name] = weight * loss.function(student_scores, teacher_scores * trainer.teacher_scale)
    return values


def _score_all(model: RankerModel, output: RankingOutput, accelerator: Accelerator) -> Tensor:
    """Score B queries with all N = B * n * processes documents, (B, N), a query's own documents first."""
    queries, mask = output.query_vectors, output.document_mask
    # In float32 before it is repeated: a view costs nothing, a cast of one would copy it B times.
    documents = _gather_rows(output.document_vectors.float(), accelerator).flatten(0, 1)  # (N, ...)
    documents = documents.expand(len(queries), *documents.shape)
    if mask is not None:
        mask = _gather_rows(mask, accelerator).flatten(0, 1).bool()
        mask = mask.expand(len(queries), *mask.shape)
    scores = model.score_vectors(queries, documents, output.query_mask, mask)
    return _own_first(scores, output.document_vectors.shape[1], accelerator)


def _known_positives(rows: dict[str, Tensor], accelerator: Accelerator) -> Tensor:
    """Return where a document of the batch is a positive of the query in one of its rows, (B, N) as `_score_all`."""
    queries, documents = _gather_rows(rows["query"], accelerator), _gather_rows(rows["document"], accelerator)
    is_same_query = rows["query"].unsqueeze(1) == queries  # (B, M)
    is_positive = documents[:, :1] == documents.flatten()  # (M, N)
    known = (is_same_query.float() @ is_positive.float()) > 0
    return _own_first(known, documents.shape[1], accelerator)


def _gather_rows(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """Gather the rows of all processes, (B, n, ...) to (B * processes, n, ...), with gradients; tokens are padded."""
    if accelerator.num_processes == 1:
        return tensor
    if tensor.dim() > 2:  # padding turns bool into integers
        tensor = accelerator.pad_across_processes(tensor, dim=2).to(tensor.dtype)
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
