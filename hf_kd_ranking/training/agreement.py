"""Loss and pairwise agreement of a student with its teacher on held-out teacher rows."""

import datasets
import torch
from torch import nn
from transformers import Trainer

from ..data.collate import split_batch
from ..losses import listed_margins


@torch.no_grad()
def compare_with_teacher(trainer: Trainer, rows: datasets.Dataset) -> dict[str, float]:
    """Return `pairwise_agreement`, the share of pairs that both order alike, and `loss`, on every process.

    The student is the model of a `RankingTrainer`, which has a loss once its `teacher_scale` is known.
    """
    model, accelerator = trainer.model.eval(), trainer.accelerator
    gathered = []
    for batch in trainer.get_eval_dataloader(rows):
        features, targets = split_batch(trainer._prepare_inputs(batch))
        teacher = targets["teacher_scores"]
        is_listed = targets.get("is_listed", torch.ones_like(teacher))
        scores = torch.stack([model(**features).scores.float(), teacher, is_listed.float()], dim=-1)  # (B, n, 3)
        scores = accelerator.pad_across_processes(scores, dim=1)
        # Gathered before the mean: batches differ in size, and the last is filled up with repeated rows.
        gathered.append(accelerator.gather_for_metrics(scores))
    n = max(scores.shape[1] for scores in gathered)
    padded = [nn.functional.pad(scores, (0, 0, 0, n - scores.shape[1])) for scores in gathered]
    student, teacher, is_listed = torch.cat(padded).unbind(-1)  # (N, n)
    mask = None if is_listed.all() else is_listed.bool()
    student_margins, teacher_margins = listed_margins(student, teacher, mask)
    is_agreed = (student_margins > 0) == (teacher_margins > 0)
    metrics = {"pairwise_agreement": is_agreed.float().mean().item()}
    if trainer.teacher_scale is not None:
        losses = trainer.row_losses(student, teacher * trainer.teacher_scale, mask)
        if losses:
            metrics["loss"] = sum(losses.values()).item()
    return metrics
