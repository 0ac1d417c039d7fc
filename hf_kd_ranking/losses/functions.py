"""Losses as functions of score tensors: they do not know the model, the tokenizer or the data.

Arguments, result and errors of all are as `margin_mse`; losses on the labels only do not read the teacher's scores.
Where the lists of a batch differ in length, what stands at documents that are not listed changes nothing. A mean over
a row's documents or pairs is then the mean over its listed ones, so that every query has the same weight.
"""

import math

import torch
from torch import Tensor, nn

from ..errors import InputError

MAX_GRADE = 40  # 2^40 has room in float32


def margin_mse(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Margin-MSE: match the student's positive-negative margins to the teacher's, in squared teacher-score units.

    mean over rows and negatives of ((s_0 - s_j) - (t_0 - t_j))^2; with n = 2 this is equation 8 of arXiv 2010.02666.
    Margins are signed; adding a constant to all scores of a row changes nothing.

    Args:
        student_scores: (B, n) scores, n >= 2, one row per query; column 0 is the positive document.
        teacher_scores: (B, n) scores on the teacher's own scale; no gradient.
        mask: (B, n), True at listed documents; None if all are listed.

    Raises:
        InputError: if the shapes differ or there are fewer than two documents.
    """
    student_margins, teacher_margins = margins(student_scores, teacher_scores, mask)
    return _mean((student_margins - teacher_margins).square(), mask)


def ranknet(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """RankNet on the labels only: the paper's training without a teacher.

    mean over rows and negatives of -log sigmoid(s_0 - s_j), in nats (Burges et al. 2005).
    """
    student_margins, _ = margins(student_scores, teacher_scores, mask)
    return _mean(nn.functional.softplus(-student_margins), mask)


def all_margins_mse(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Margin-MSE over all pairs of a row's listed documents, not only those with the positive.

    mean over rows and pairs i < j of ((s_i - s_j) - (t_i - t_j))^2, in squared teacher-score units.
    """
    student_scores, teacher_scores = _lists(student_scores, teacher_scores, mask)
    n = student_scores.shape[1]
    first, second = torch.triu_indices(n, n, offset=1, device=student_scores.device)
    errors = student_scores - teacher_scores  # a pair's margin error is the difference of its two errors
    if mask is not None:
        mask = mask[:, first] & mask[:, second]
    return _mean((errors[:, first] - errors[:, second]).square(), mask)


def mse(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pointwise MSE (arXiv 2010.02666, equation 7): mean of (s - t)^2, in squared teacher-score units.

    The teacher's must be single scores and not margins.
    """
    student_scores, teacher_scores = _lists(student_scores, teacher_scores, mask)
    return _mean((student_scores - teacher_scores).square(), mask)


def weighted_ranknet(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """RankNet weighted by the teacher's margin (arXiv 2010.02666, equation 6).

    mean over rows and negatives of -(t_0 - t_j) log sigmoid(s_0 - s_j). The weight, and so the loss, is negative where
    the teacher prefers the negative.
    """
    student_margins, teacher_margins = margins(student_scores, teacher_scores, mask)
    return _mean(nn.functional.softplus(-student_margins) * teacher_margins, mask)


def kl_div(
    student_scores: Tensor, teacher_scores: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Kullback-Leibler divergence of the student's softmax over the listed documents from the teacher's, in nats.

    T^2 * mean over rows of sum_j p_j (log p_j - log q_j) with p = softmax(t / T), q = softmax(s / T); the factor keeps
    gradients on one scale (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). The paper's training code passes
    softmaxes where logarithms belong, and so has negative values.

    Args:
        temperature: T; above 1 the lower ranks count more.
    """
    student_scores, teacher_scores = _lists(student_scores, teacher_scores, mask)
    student = _log_softmax(student_scores / temperature, mask)
    teacher = _log_softmax(teacher_scores / temperature, mask)
    if mask is not None:  # equal logarithms add nothing to the divergence; -inf - -inf would be NaN
        student, teacher = student.masked_fill(~mask, 0), teacher.masked_fill(~mask, 0)
    return nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def info_nce(
    student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """InfoNCE on the labels only: -log of the positive's softmax over its list, mean over rows, in nats.

    Args:
        temperature: divides the scores. Cosines need about 0.05: at 1 a perfect ranking of them still has a loss.
    """
    student_scores, _ = _lists(student_scores, teacher_scores, mask)
    return -_log_softmax(student_scores / temperature, mask)[:, 0].mean()


def lambda_loss(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """LambdaLoss with NDCG-Loss2 weights (Wang et al. 2018, https://dl.acm.org/doi/10.1145/3269206.3271784).

    mean over rows of -sum over pairs with y_i > y_j of log2 sigmoid(s_i - s_j)^w, where i and j are ranked by the
    student and w = |1/D(|i-j|) - 1/D(|i-j|+1)| |G_i - G_j|, gains G = (2^y - 1) / ideal DCG, D(r) = log2(1 + r).
    The teacher's are grades y, of which negative ones count 0; scores of a model are not grades, because a gain is
    exponential in them. Documents that are not listed are ranked last and are in no pair.

    Raises:
        InputError: if a grade is above `MAX_GRADE`.
    """
    student_scores, grades = _lists(student_scores, teacher_scores, mask)
    keys = student_scores
    if mask is not None:
        keys, grades = keys.masked_fill(~mask, -torch.inf), grades.masked_fill(~mask, -torch.inf)
    if grades.max() > MAX_GRADE:
        raise InputError(
            f"lambda_loss takes grades up to {MAX_GRADE}, got {grades.max().item():g}; a gain is 2^grade."
        )
    order = keys.sort(descending=True, dim=1).indices
    scores, by_rank = student_scores.gather(1, order), grades.gather(1, order)  # (B, n)
    ranks = torch.arange(scores.shape[1], device=scores.device)
    discounts = torch.log2(ranks.to(scores.dtype) + 2)  # (n,)
    ideal = ((2 ** grades.clamp(min=0).sort(descending=True, dim=1).values - 1) / discounts).sum(1, keepdim=True)
    gains = (2 ** by_rank.clamp(min=0) - 1) / ideal.clamp(min=1e-10)  # (B, n)
    distance = (ranks[:, None] - ranks[None]).abs()  # (n, n)
    deltas = (1 / discounts[distance - 1] - 1 / discounts[distance]).abs().fill_diagonal_(0)
    weights = deltas * (gains[:, :, None] - gains[:, None, :]).abs()  # (B, n, n)
    log_sigmoid = nn.functional.logsigmoid(scores[:, :, None] - scores[:, None, :]) / math.log(2)
    is_pair = by_rank[:, :, None] > by_rank[:, None, :]
    if mask is not None:
        is_pair = is_pair & mask.gather(1, order)[:, None, :]  # a document that is not listed has no lower grade
    return -(weights * log_sigmoid * is_pair).sum((1, 2)).mean()


def order_ranknet(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """RankNet over all pairs that the teacher orders; of its scores only the order is read.

    mean over rows of the mean over pairs with t_i > t_j of -log sigmoid(s_i - s_j), in nats: Burges et al. 2005 on the
    permutations of a listwise teacher, as in RankGPT (Sun et al. 2023, https://arxiv.org/abs/2304.09542). A row whose
    scores are all tied adds 0.
    """
    student_scores, teacher_scores = _lists(student_scores, teacher_scores, mask)
    is_pair = teacher_scores[:, :, None] > teacher_scores[:, None, :]  # (B, n, n)
    if mask is not None:
        is_pair = is_pair & mask[:, :, None] & mask[:, None, :]
    losses = nn.functional.softplus(student_scores[:, None, :] - student_scores[:, :, None])
    return ((losses * is_pair).sum((1, 2)) / is_pair.sum((1, 2)).clamp(min=1)).mean()


def list_mle(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """ListMLE (Xia et al. 2008, https://dl.acm.org/doi/10.1145/1390156.1390306), which reads the teacher's order only.

    mean over rows of the negative log-likelihood, in nats, of the teacher's order in the Plackett-Luce model of the
    student's scores: sum over ranks i of log sum_{k >= i} exp(s_k) - s_i. Ties stay in the order of the list.
    """
    student_scores, teacher_scores = _lists(student_scores, teacher_scores, mask)
    if mask is not None:  # last in the order, and without a part in any sum; -inf would have NaN as its gradient
        student_scores = student_scores.masked_fill(~mask, torch.finfo(torch.float32).min / 2)
        teacher_scores = teacher_scores.masked_fill(~mask, -torch.inf)
    order = teacher_scores.sort(descending=True, dim=1, stable=True).indices
    scores = student_scores.gather(1, order)
    losses = scores.flip(1).logcumsumexp(1).flip(1) - scores  # (B, n)
    if mask is not None:
        losses = losses.masked_fill(~mask.gather(1, order), 0)
    return losses.sum(1).mean()


def adr_mse(
    student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """ADR-MSE, the error of approximate ranks (Schlatt et al. 2025, Rank-DistiLLM, https://arxiv.org/abs/2405.07920).

    mean over rows and documents of (r_i - p_i)^2 / log2(1 + r_i), where r_i is the rank from 1 in the teacher's order,
    the mean one for tied documents, and p_i = 1 + sum over other documents j of sigmoid((s_j - s_i) / temperature) is
    the student's rank, made differentiable. Of the teacher's scores only the order is read.

    Args:
        temperature: the smaller, the closer p_i is to a rank, and the smaller are the gradients of clear differences.
    """
    student_scores, teacher_scores = _lists(student_scores, teacher_scores, mask)
    n = student_scores.shape[1]
    is_other = ~torch.eye(n, dtype=torch.bool, device=student_scores.device).expand(len(student_scores), -1, -1)
    if mask is not None:
        is_other = is_other & mask[:, None, :]
    better = teacher_scores[:, None, :] > teacher_scores[:, :, None]  # (B, i, j): j is ranked before i
    tied = teacher_scores[:, None, :] == teacher_scores[:, :, None]
    ranks = 1 + ((better + tied / 2) * is_other).sum(2)  # (B, n)
    closeness = torch.sigmoid((student_scores[:, None, :] - student_scores[:, :, None]) / temperature)
    approximate = 1 + (closeness * is_other).sum(2)
    return _mean((ranks - approximate).square() / torch.log2(1 + ranks), mask)


def margins(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the margins of the positive over each negative, (B, n - 1) in float32, of student and teacher."""
    student_scores, teacher_scores = _lists(student_scores, teacher_scores, mask)
    return student_scores[:, :1] - student_scores[:, 1:], teacher_scores[:, :1] - teacher_scores[:, 1:]


def listed_margins(
    student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `margins` of listed documents in one dimension."""
    student, teacher = margins(student_scores, teacher_scores, mask)
    if mask is None:
        return student.flatten(), teacher.flatten()
    return student[mask[:, 1:]], teacher[mask[:, 1:]]


def spread(margins_: Tensor) -> float:
    """Return the root mean square of margins, their natural unit; 0 for no margins."""
    return torch.sqrt(margins_.square().mean()).item() if margins_.numel() else 0.0


def _lists(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check the shapes, since broadcasting (B, 1) against (B,) would give B x B pairs; return both in float32."""
    shapes = tuple(student_scores.shape), tuple(teacher_scores.shape)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][1] < 2:
        raise InputError(
            "A pairwise loss needs student and teacher scores of one shape (queries, documents) with at least two "
            f"documents, got {shapes[0]} and {shapes[1]}; check what the collator makes of the teacher rows."
        )
    if mask is not None and mask.shape != student_scores.shape:
        raise InputError(f"The mask must have the shape of the scores {shapes[0]}, got {tuple(mask.shape)}.")
    return student_scores.float(), teacher_scores.detach().float()


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over rows of a row's mean over listed documents; `values` may be of all or of the negatives."""
    if mask is None:
        return values.mean()
    mask = mask[:, -values.shape[1] :]
    return (values.masked_fill(~mask, 0).sum(1) / mask.sum(1)).mean()


def _log_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.log_softmax(-1)
