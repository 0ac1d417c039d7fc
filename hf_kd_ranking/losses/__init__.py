"""Losses: functions of scores, and the names by which they are chosen.

Example:
    >>> student, teacher = torch.tensor([[3.0, 1.0]]), torch.tensor([[9.0, 4.0]])  # margins 2 and 5
    >>> kd.losses.margin_mse(student, teacher)
    tensor(9.)
"""

from .functions import (
    adr_mse,
    all_margins_mse,
    info_nce,
    kl_div,
    lambda_loss,
    list_mle,
    listed_margins,
    margin_mse,
    margins,
    mse,
    order_ranknet,
    ranknet,
    spread,
    weighted_ranknet,
)
from .names import (
    IN_BATCH,
    LOSSES,
    REGULARIZERS,
    Loss,
    Regularizer,
    check_data,
    get_loss,
    get_losses,
    get_regularizers,
)

__all__ = [
    "IN_BATCH",
    "LOSSES",
    "Loss",
    "REGULARIZERS",
    "Regularizer",
    "adr_mse",
    "all_margins_mse",
    "check_data",
    "get_loss",
    "get_losses",
    "get_regularizers",
    "info_nce",
    "kl_div",
    "lambda_loss",
    "list_mle",
    "listed_margins",
    "margin_mse",
    "margins",
    "mse",
    "order_ranknet",
    "ranknet",
    "spread",
    "weighted_ranknet",
]
