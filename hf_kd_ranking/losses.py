"""Losses as functions of score tensors: they know no model, no tokenizer, no data.

All take student and teacher scores of one shape (B, n), n >= 2, one row a query; column 0 is the positive document.
"""

from collections.abc import Callable
from difflib import get_close_matches

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def margin_mse(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """Margin-MSE: match the student's positive-negative margins to the teacher's.

    mean over rows and negatives of ((s_0 - s_j) - (t_0 - t_j))^2; with n = 2 this is equation 8 of arXiv 2010.02666.
    Margins are signed; adding a constant to all scores of a row changes nothing.

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n) scores on the teacher's own scale; no gradient.

    Returns:
        Scalar in squared teacher-score units.

    Raises:
        ValueError: if the shapes differ or there is no negative.
    """
    return nn.functional.mse_loss(*margins(student_scores, teacher_scores))


def ranknet(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """RankNet on the labels alone, the paper's training without a teacher.

    mean over rows and negatives of -log sigmoid(s_0 - s_j), in nats (Burges et al. 2005). Teacher scores are not read;
    they are taken so that all losses have one signature.

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n), ignored.

    Raises:
        ValueError: if the shapes differ or there is no negative.
    """
    student_margins, _ = margins(student_scores, teacher_scores)
    return nn.functional.softplus(-student_margins).mean()


def margins(student_scores: Tensor, teacher_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Margins of the positive over each negative, (B, n - 1) in float32, of student and teacher.

    Raises:
        ValueError: if the shapes differ or there is no negative. Broadcasting (B, 1) against (B,) would give a loss
            over B x B pairs without an error.
    """
    if student_scores.shape != teacher_scores.shape or student_scores.dim() != 2 or student_scores.shape[1] < 2:
        raise ValueError(
            "A pairwise loss needs student and teacher scores of one shape (queries, documents) with at least two "
            f"documents, got {tuple(student_scores.shape)} and {tuple(teacher_scores.shape)}; check what the collator "
            "makes of the teacher rows."
        )
    student_scores, teacher_scores = student_scores.float(), teacher_scores.detach().float()
    return student_scores[:, :1] - student_scores[:, 1:], teacher_scores[:, :1] - teacher_scores[:, 1:]


def spread(margins_: Tensor) -> float:
    """Root mean square of margins, their natural unit; 0 for no margins."""
    return torch.sqrt(margins_.square().mean()).item() if margins_.numel() else 0.0


LOSSES: dict[str, Loss] = {loss.__name__: loss for loss in (margin_mse, ranknet)}


def get_loss(name: str) -> Loss:
    """Find a loss by its name.

    Raises:
        ValueError: naming the nearest loss and all others.
    """
    if name not in LOSSES:
        near = get_close_matches(name, LOSSES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"Unknown loss {name!r}{hint} Choose one of {', '.join(LOSSES)}.")
    return LOSSES[name]
