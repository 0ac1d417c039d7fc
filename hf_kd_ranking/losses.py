"""Losses as functions of score tensors: they do not know the model, the tokenizer or the data.

All take student and teacher scores of one shape (B, n), n >= 2, one row per query; column 0 is the positive document.
Where the lists of a batch differ in length, `mask` (B, n) is True at listed documents; what stands in the other places
changes nothing. A mean over a row's documents or pairs is then the mean over its listed ones, so that every query has
the same weight.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor, nn

MAX_GRADE = 40  # 2^40 has room in float32
# Before a loss's name: over every document of the batch, (B, N), and not only over the row's own.
IN_BATCH = "in_batch_"


def margin_mse(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Margin-MSE: match the student's positive-negative margins to the teacher's.

    mean over rows and negatives of ((s_0 - s_j) - (t_0 - t_j))^2; with n = 2 this is equation 8 of arXiv 2010.02666.
    Margins are signed; adding a constant to all scores of a row changes nothing.

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n) scores on the teacher's own scale; no gradient.
        mask: (B, n), True at listed documents; other negatives are left out. None if all are listed.

    Returns:
        Scalar in squared teacher-score units.

    Raises:
        ValueError: if the shapes differ or there are fewer than two documents.
    """
    student_margins, teacher_margins = margins(student_scores, teacher_scores)
    return _mean((student_margins - teacher_margins).square(), _of_negatives(mask, student_scores))


def ranknet(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """RankNet on the labels only: the paper's training without a teacher.

    mean over rows and negatives of -log sigmoid(s_0 - s_j), in nats (Burges et al. 2005). Teacher scores are not read;
    they are taken so that all losses have one signature.

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n), ignored.
        mask: (B, n), True at listed documents; other negatives are left out. None if all are listed.

    Raises:
        ValueError: if the shapes differ or there are fewer than two documents.
    """
    student_margins, _ = margins(student_scores, teacher_scores)
    return _mean(nn.functional.softplus(-student_margins), _of_negatives(mask, student_scores))


def all_margins_mse(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Margin-MSE over all pairs of a row's documents, not only those with the positive.

    mean over rows and pairs i < j of ((s_i - s_j) - (t_i - t_j))^2, in squared teacher-score units.

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n) scores on the teacher's own scale; no gradient.
        mask: (B, n), True at listed documents; only pairs of two listed documents count. None if all are listed.
    """
    student_scores, teacher_scores = _lists(student_scores, teacher_scores)
    n = student_scores.shape[1]
    first, second = torch.triu_indices(n, n, offset=1, device=student_scores.device)
    errors = student_scores - teacher_scores  # a pair's margin error is the difference of its two errors
    mask = _checked(mask, student_scores)
    are_listed = None if mask is None else mask[:, first] & mask[:, second]
    return _mean((errors[:, first] - errors[:, second]).square(), are_listed)


def mse(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pointwise MSE (arXiv 2010.02666, equation 7): mean of (s - t)^2, in squared teacher-score units.

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n) scores on the teacher's own scale, single scores and not margins; no gradient.
        mask: (B, n), True at listed documents; only these count. None if all are listed.
    """
    student_scores, teacher_scores = _lists(student_scores, teacher_scores)
    return _mean((student_scores - teacher_scores).square(), _checked(mask, student_scores))


def weighted_ranknet(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """RankNet weighted by the teacher's margin (arXiv 2010.02666, equation 6).

    mean over rows and negatives of -(t_0 - t_j) log sigmoid(s_0 - s_j). The weight, and so the loss, is negative where
    the teacher prefers the negative.

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n) scores; no gradient.
        mask: (B, n), True at listed documents; other negatives are left out. None if all are listed.
    """
    student_margins, teacher_margins = margins(student_scores, teacher_scores)
    losses = nn.functional.softplus(-student_margins) * teacher_margins
    return _mean(losses, _of_negatives(mask, student_scores))


def kl_div(
    student_scores: Tensor, teacher_scores: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Kullback-Leibler divergence of the student's softmax over a list from the teacher's, in nats.

    T^2 * mean over rows of sum_j p_j (log p_j - log q_j) with p = softmax(t / T), q = softmax(s / T); the factor keeps
    gradients on one scale (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). The paper's training code passes
    softmaxes where logarithms belong, and so has negative values.

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n) scores; no gradient.
        temperature: T; above 1 the lower ranks count more.
        mask: (B, n), True at listed documents; both softmaxes are over these. None if all are listed.
    """
    student_scores, teacher_scores = _lists(student_scores, teacher_scores)
    student = _log_softmax(student_scores / temperature, mask)
    teacher = _log_softmax(teacher_scores / temperature, mask)
    if mask is not None:  # equal logarithms add nothing to the divergence; -inf - -inf would be NaN
        student, teacher = student.masked_fill(~mask, 0), teacher.masked_fill(~mask, 0)
    return nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def info_nce(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """InfoNCE: -log of the positive's softmax over its list, mean over rows, in nats; teacher scores are not read.

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n), ignored.
        mask: (B, n), True at listed documents; the softmax is over these. None if all are listed.
    """
    student_scores, _ = _lists(student_scores, teacher_scores)
    return -_log_softmax(student_scores, mask)[:, 0].mean()


def lambda_loss(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """LambdaLoss with NDCG-Loss2 weights (Wang et al. 2018, https://dl.acm.org/doi/10.1145/3269206.3271784).

    mean over rows of -sum over pairs with y_i > y_j of log2 sigmoid(s_i - s_j)^w, where i and j are ranked by the
    student and w = |1/D(|i-j|) - 1/D(|i-j|+1)| |G_i - G_j|, gains G = (2^y - 1) / ideal DCG, D(r) = log2(1 + r).

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n) grades, of which negative ones count 0; no gradient. Scores of a model are not grades: a
            gain is exponential in them.
        mask: (B, n), True at listed documents; the others are ranked last and are in no pair. None if all are listed.

    Raises:
        ValueError: if a grade is above `MAX_GRADE`, or the shapes differ.
    """
    student_scores, grades = _lists(student_scores, teacher_scores)
    mask = _checked(mask, student_scores)
    if mask is not None:
        grades = grades.masked_fill(~mask, -torch.inf)
    if grades.max() > MAX_GRADE:
        raise ValueError(
            f"lambda_loss takes grades up to {MAX_GRADE}, got {grades.max().item():g}; a gain is 2^grade."
        )
    keys = student_scores if mask is None else student_scores.masked_fill(~mask, -torch.inf)
    order = keys.sort(descending=True, dim=1).indices
    scores, by_rank = student_scores.gather(1, order), grades.gather(1, order)  # (B, n)
    discounts = torch.log2(torch.arange(2, scores.shape[1] + 2, device=scores.device, dtype=scores.dtype))  # (n,)
    ideal = ((2 ** grades.clamp(min=0).sort(descending=True, dim=1).values - 1) / discounts).sum(1, keepdim=True)
    gains = (2 ** by_rank.clamp(min=0) - 1) / ideal.clamp(min=1e-10)  # (B, n)
    ranks = torch.arange(scores.shape[1], device=scores.device)
    distance = (ranks[:, None] - ranks[None]).abs()  # (n, n)
    deltas = 1 / discounts[distance - 1] - 1 / discounts[distance]
    deltas = deltas.abs().fill_diagonal_(0)
    weights = deltas * (gains[:, :, None] - gains[:, None, :]).abs()  # (B, n, n)
    log_sigmoid = nn.functional.logsigmoid(scores[:, :, None] - scores[:, None, :]) / math.log(2)
    is_pair = by_rank[:, :, None] > by_rank[:, None, :]
    if mask is not None:
        is_listed = mask.gather(1, order)
        is_pair = is_pair & is_listed[:, :, None] & is_listed[:, None, :]
    return -(weights * log_sigmoid * is_pair).sum((1, 2)).mean()


@dataclass(frozen=True)
class Loss:
    """A loss, and what it reads.

    Args:
        function: (student_scores, teacher_scores, mask=None) -> scalar.
        needs_teacher: False for losses on the labels only.
        needs_single_scores: True if it reads the teacher's score of each document, which a file of margins lacks.
        needs_lists: True if it is meant for three documents or more; a pair has better losses.
        needs_grades: True if it reads grades, which may all lie between 0 and 1.
    """

    function: Callable[..., Tensor]
    needs_teacher: bool = True
    needs_single_scores: bool = False
    needs_lists: bool = False
    needs_grades: bool = False


LOSSES = {
    "margin_mse": Loss(margin_mse),
    "all_margins_mse": Loss(all_margins_mse, needs_lists=True),
    "mse": Loss(mse, needs_single_scores=True),
    "ranknet": Loss(ranknet, needs_teacher=False),
    "weighted_ranknet": Loss(weighted_ranknet),
    "kl_div": Loss(kl_div, needs_lists=True),
    "info_nce": Loss(info_nce, needs_teacher=False),
    "lambda_loss": Loss(lambda_loss, needs_lists=True, needs_grades=True),
}


def get_losses(text: str) -> dict[str, float]:
    """Read `name`, or several with their weights, `name:weight,name:weight`: name -> weight.

    A name is one of `LOSSES`, or `in_batch_` followed by one of them.

    Raises:
        ValueError: for an unknown name, naming the nearest loss and all others; for a weight that is not positive.
    """
    losses = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition(":")
        if name.removeprefix(IN_BATCH) not in LOSSES:
            known = list(LOSSES)
            near = get_close_matches(name, known + [IN_BATCH + loss for loss in known], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ValueError(
                f"Unknown loss {name!r}{hint} Choose one of {', '.join(known)}, or {IN_BATCH} followed by one of them."
            )
        try:
            losses[name] = float(weight or 1)
        except ValueError:
            losses[name] = math.nan
        if not losses[name] > 0 or math.isinf(losses[name]):
            raise ValueError(f"The weight of {name} must be a positive number, got {weight!r}.")
    return losses


def check_data(losses: Iterable[str], documents: int, has_only_margins: bool) -> None:
    """Refuse losses that need what teacher rows lack.

    Args:
        losses: names; those over the batch read no teacher row.
        documents: length of the longest list.
        has_only_margins: True if the rows hold differences of scores.

    Raises:
        ValueError: with the reason.
    """
    for name in losses:
        if name.startswith(IN_BATCH):
            continue
        if has_only_margins and LOSSES[name].needs_single_scores:
            raise ValueError(
                f"{name} reads the teacher's score of each document, and these rows hold only margins; train with "
                "margin_mse, or from a file that has both scores."
            )
        if documents < 3 and LOSSES[name].needs_lists:
            raise ValueError(
                f"{name} compares lists, and these rows hold {documents} documents per query; train with margin_mse, "
                "or from lists (query_id, doc_ids, teacher_scores)."
            )


def margins(student_scores: Tensor, teacher_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the margins of the positive over each negative, (B, n - 1) in float32, of student and teacher.

    Raises:
        ValueError: if the shapes differ or there are fewer than two documents. Broadcasting (B, 1) against (B,) would
            give a loss over B x B pairs without an error.
    """
    student_scores, teacher_scores = _lists(student_scores, teacher_scores)
    return student_scores[:, :1] - student_scores[:, 1:], teacher_scores[:, :1] - teacher_scores[:, 1:]


def listed_margins(
    student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `margins` of listed documents in one dimension, of student and teacher; no mask lists all."""
    student, teacher = margins(student_scores, teacher_scores)
    if mask is None:
        return student.flatten(), teacher.flatten()
    return student[mask[:, 1:]], teacher[mask[:, 1:]]


def spread(margins_: Tensor) -> float:
    """Return the root mean square of margins, their natural unit; 0 for no margins."""
    return torch.sqrt(margins_.square().mean()).item() if margins_.numel() else 0.0


def _lists(student_scores: Tensor, teacher_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float32, the teacher's without a gradient; broadcasting would hide a wrong shape."""
    if student_scores.shape != teacher_scores.shape or student_scores.dim() != 2 or student_scores.shape[1] < 2:
        raise ValueError(
            "A pairwise loss needs student and teacher scores of one shape (queries, documents) with at least two "
            f"documents, got {tuple(student_scores.shape)} and {tuple(teacher_scores.shape)}; check what the collator "
            "makes of the teacher rows."
        )
    return student_scores.float(), teacher_scores.detach().float()


def _checked(mask: Tensor | None, scores: Tensor) -> Tensor | None:
    if mask is not None and mask.shape != scores.shape:
        raise ValueError(f"The mask must have the shape of the scores {tuple(scores.shape)}, got {tuple(mask.shape)}.")
    return mask


def _of_negatives(mask: Tensor | None, scores: Tensor) -> Tensor | None:
    mask = _checked(mask, scores)
    return None if mask is None else mask[:, 1:]


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over rows of the mean over a row's values at True."""
    if mask is None:
        return values.mean()
    return (values.masked_fill(~mask, 0).sum(1) / mask.sum(1)).mean()


def _log_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    mask = _checked(mask, scores)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.log_softmax(-1)
