"""Losses as functions of score tensors: they know no model, no tokenizer, no data.

All take student and teacher scores of one shape (B, n), n >= 2, one row a query; column 0 is the positive document.
"""

import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches

import torch
from torch import Tensor, nn

MAX_GRADE = 40  # 2^40 has room in float32
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


def all_margins_mse(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """Margin-MSE over all pairs of a row's documents, not only those with the positive.

    mean over rows and pairs i < j of ((s_i - s_j) - (t_i - t_j))^2, in squared teacher-score units.

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n) scores on the teacher's own scale; no gradient.
    """
    student_scores, teacher_scores = _lists(student_scores, teacher_scores)
    first, second = torch.triu_indices(*[student_scores.shape[1]] * 2, offset=1, device=student_scores.device)
    errors = student_scores - teacher_scores  # a pair's margin error is the difference of its two errors
    return (errors[:, first] - errors[:, second]).square().mean()


def mse(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """Pointwise MSE (arXiv 2010.02666, equation 7): mean of (s - t)^2, in squared teacher-score units.

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n) scores on the teacher's own scale, single scores and not margins; no gradient.
    """
    return nn.functional.mse_loss(*_lists(student_scores, teacher_scores))


def weighted_ranknet(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """RankNet weighted by the teacher's margin (arXiv 2010.02666, equation 6).

    mean over rows and negatives of -(t_0 - t_j) log sigmoid(s_0 - s_j). The weight, and so the loss, is negative where
    the teacher prefers the negative.

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n) scores; no gradient.
    """
    student_margins, teacher_margins = margins(student_scores, teacher_scores)
    return (nn.functional.softplus(-student_margins) * teacher_margins).mean()


def mse_ranknet(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """Pointwise MSE plus RankNet on the labels, equally weighted; see `mse` and `ranknet`."""
    return mse(student_scores, teacher_scores) + ranknet(student_scores, teacher_scores)


def kl_div(student_scores: Tensor, teacher_scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of the student's softmax over a list from the teacher's, in nats.

    T^2 * mean over rows of sum_j p_j (log p_j - log q_j) with p = softmax(t / T), q = softmax(s / T); the factor keeps
    gradients on one scale (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). The paper's training code gives
    softmaxes where logarithms belong, and so negative values.

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n) scores; no gradient.
        temperature: T; above 1 the lower ranks count more.
    """
    student_scores, teacher_scores = (scores / temperature for scores in _lists(student_scores, teacher_scores))
    divergence = nn.functional.kl_div(
        student_scores.log_softmax(-1), teacher_scores.log_softmax(-1), reduction="batchmean", log_target=True
    )
    return divergence * temperature**2


def listnet(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """ListNet (Cao et al. 2007): cross-entropy of the student's softmax under the teacher's, mean over rows, in nats.

    Its gradient is that of `kl_div`; its value is not 0 for equal scores.

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n) scores or grades; no gradient.
    """
    student_scores, teacher_scores = _lists(student_scores, teacher_scores)
    return nn.functional.cross_entropy(student_scores, teacher_scores.softmax(-1))


def info_nce(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """InfoNCE: -log of the positive's softmax over its list, mean over rows, in nats; teacher scores are not read.

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n), ignored.
    """
    student_scores, _ = _lists(student_scores, teacher_scores)
    return -student_scores.log_softmax(-1)[:, 0].mean()


def lambda_loss(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """LambdaLoss with NDCG-Loss2 weights (Wang et al. 2018, https://dl.acm.org/doi/10.1145/3269206.3271784).

    mean over rows of -sum over pairs with y_i > y_j of log2 sigmoid(s_i - s_j)^w, where i and j are ranked by the
    student and w = |1/D(|i-j|) - 1/D(|i-j|+1)| |G_i - G_j|, gains G = (2^y - 1) / ideal DCG, D(r) = log2(1 + r).

    Args:
        student_scores: (B, n) scores, unbounded.
        teacher_scores: (B, n) grades, of which negative ones count 0; no gradient. Scores of a model are not grades: a
            gain is exponential in them.

    Raises:
        ValueError: if a grade is above `MAX_GRADE`, or the shapes differ.
    """
    student_scores, grades = _lists(student_scores, teacher_scores)
    if grades.max() > MAX_GRADE:
        raise ValueError(
            f"lambda_loss takes grades up to {MAX_GRADE}, got {grades.max().item():g}; a gain is 2^grade."
        )
    scores, order = student_scores.sort(descending=True, dim=1)
    by_rank = grades.gather(1, order)  # (B, n)
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
    return -(weights * log_sigmoid * is_pair).sum((1, 2)).mean()


def margins(student_scores: Tensor, teacher_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Margins of the positive over each negative, (B, n - 1) in float32, of student and teacher.

    Raises:
        ValueError: if the shapes differ or there is no negative. Broadcasting (B, 1) against (B,) would give a loss
            over B x B pairs without an error.
    """
    student_scores, teacher_scores = _lists(student_scores, teacher_scores)
    return student_scores[:, :1] - student_scores[:, 1:], teacher_scores[:, :1] - teacher_scores[:, 1:]


def _lists(student_scores: Tensor, teacher_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, the teacher's without a gradient; broadcasting would hide a wrong shape."""
    if student_scores.shape != teacher_scores.shape or student_scores.dim() != 2 or student_scores.shape[1] < 2:
        raise ValueError(
            "A pairwise loss needs student and teacher scores of one shape (queries, documents) with at least two "
            f"documents, got {tuple(student_scores.shape)} and {tuple(teacher_scores.shape)}; check what the collator "
            "makes of the teacher rows."
        )
    return student_scores.float(), teacher_scores.detach().float()


def spread(margins_: Tensor) -> float:
    """Root mean square of margins, their natural unit; 0 for no margins."""
    return torch.sqrt(margins_.square().mean()).item() if margins_.numel() else 0.0


LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (
        *(margin_mse, all_margins_mse, mse, ranknet, weighted_ranknet, mse_ranknet),
        *(kl_div, listnet, info_nce, lambda_loss),
    )
}
# Losses on the labels alone, which need no teacher.
IGNORE_TEACHER = frozenset({"ranknet", "info_nce"})
# Losses that read single teacher scores: a file of margins has none.
READ_SCORES = frozenset({"mse", "mse_ranknet"})
# Losses over lists: two documents are a pair, for which there are better ones.
READ_LISTS = frozenset({"all_margins_mse", "kl_div", "listnet", "lambda_loss"})
# Losses that read grades, which may well lie between 0 and 1.
READ_GRADES = frozenset({"lambda_loss"})


# Before a loss's name: over every document of the batch, (B, N), and not only over the row's own.
IN_BATCH = "in_batch_"


def get_losses(text: str) -> dict[str, float]:
    """Read `name`, or several with their weights, `name:weight,name:weight`: name -> weight.

    A name is one of `LOSSES`, or one of them behind `in_batch_`.

    Raises:
        ValueError: for an unknown name, naming the nearest loss and all others; for a weight that is none.
    """
    losses = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition(":")
        if name.removeprefix(IN_BATCH) not in LOSSES:
            near = get_close_matches(name, [*LOSSES, *(IN_BATCH + known for known in LOSSES)], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ValueError(
                f"Unknown loss {name!r}{hint} Choose one of {', '.join(LOSSES)}, or one of them behind {IN_BATCH}."
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
        documents: listed per query.
        has_only_margins: True where the rows hold differences of scores.

    Raises:
        ValueError: with the reason.
    """
    for name in losses:
        if has_only_margins and name in READ_SCORES:
            raise ValueError(
                f"{name} reads the teacher's score of each document, and these rows hold only margins; train with "
                "margin_mse, or from a file that has both scores."
            )
        if documents < 3 and name in READ_LISTS:
            raise ValueError(
                f"{name} compares lists, and these rows hold {documents} documents a query; train with margin_mse, or "
                "from lists (query_id, doc_ids, teacher_scores)."
            )
