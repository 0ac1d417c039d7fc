"""The names of losses and penalties, what each reads, and the texts that combine them with weights."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial

from torch import Tensor

from ..errors import InputError
from . import functions

# Before a loss's name: over every document of the batch, (B, N), and not only over the row's own.
IN_BATCH = "in_batch_"


@dataclass(frozen=True)
class Loss:
    """A loss, and what it reads.

    Args:
        function: see the module.
        needs_teacher: False for losses on the labels only.
        needs_single_scores: True if it reads the teacher's score of each document, which a file of margins lacks.
        needs_lists: True if it is meant for three documents or more; a pair has better losses.
        needs_grades: True if it reads grades, which may all lie between 0 and 1.
        needs_order: True if it reads the order of the teacher's scores only, which may have any scale.
        settings: names of the function's own parameters, positive numbers.
    """

    function: Callable[..., Tensor]
    needs_teacher: bool = True  # False for losses on the labels only
    needs_single_scores: bool = False  # the teacher's score of each document, which a file of margins lacks
    needs_lists: bool = False  # it is meant for three documents or more; a pair has better losses
    needs_grades: bool = False  # which may all lie between 0 and 1
    needs_order: bool = False  # only the order of the teacher's scores, which may have any scale
    settings: tuple[str, ...] = ()  # names of the function's own parameters, positive numbers


LOSSES = {
    "margin_mse": Loss(functions.margin_mse),
    "all_margins_mse": Loss(functions.all_margins_mse, needs_lists=True),
    "mse": Loss(functions.mse, needs_single_scores=True),
    "ranknet": Loss(functions.ranknet, needs_teacher=False),
    "weighted_ranknet": Loss(functions.weighted_ranknet),
    "kl_div": Loss(functions.kl_div, needs_lists=True, settings=("temperature",)),
    "info_nce": Loss(functions.info_nce, needs_teacher=False, settings=("temperature",)),
    "lambda_loss": Loss(functions.lambda_loss, needs_lists=True, needs_grades=True),
    "order_ranknet": Loss(functions.order_ranknet, needs_order=True),
    "list_mle": Loss(functions.list_mle, needs_lists=True, needs_order=True),
    "adr_mse": Loss(functions.adr_mse, needs_lists=True, needs_order=True, settings=("temperature",)),
}


@dataclass(frozen=True)
class Regularizer:
    """A penalty on the weights of sparse vectors, which is added to the loss; see `training.regularization`.

    Args:
        name: one of `REGULARIZERS`.
        query, document: weights of the penalty on either side.
        warmup: share of all steps, up to 1, over which the weights rise as the square of the steps.
    """

    name: str  # one of `REGULARIZERS`
    query: float = 0.0  # weight of the penalty on queries
    document: float = 0.0
    warmup: float = 0.0  # share of all steps, up to 1, over which the weights rise as the square of the steps

    def warmup_factor(self, progress: float) -> float:
        """Return the factor on the weights after a share of all steps, 0 to 1."""
        return 1.0 if progress >= self.warmup else (progress / self.warmup) ** 2


REGULARIZERS = ("flops", "l1")


def get_regularizers(text: str) -> dict[str, Regularizer]:
    """Read the penalties within a text of losses, such as `margin_mse,flops(query=0.3,document=0.1,warmup=0.3)`.

    Raises:
        InputError: for a penalty given twice, without a weight of a side, or with another weight or setting.
    """
    regularizers = {}
    for part in _parts(text):
        name, _, rest = part.partition("(")
        if name not in REGULARIZERS:
            continue
        if name in regularizers:
            raise InputError(f"The penalty {name} is given twice in {text!r}; give it once.")
        if not rest.endswith(")"):
            raise InputError(f"The weights of {name} are its settings, {name}(query=0.3,document=0.1), got {part!r}.")
        settings = _read_settings(name, rest, ("query", "document", "warmup"))
        if not {"query", "document"} & settings.keys() or settings.get("warmup", 0) > 1:
            raise InputError(f"{name} needs a weight, query= or document=, and a warmup of at most 1, got {part!r}.")
        regularizers[name] = Regularizer(name, **settings)
    return regularizers


def _parts(text: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^(]*\))", text)]  # not at the commas within parentheses


def get_losses(text: str) -> dict[str, float]:
    """Read `name`, or several with their weights, `name:weight,name:weight`: name -> weight.

    A name is one of `LOSSES`, or `in_batch_` followed by one of them; settings may follow in parentheses, as in
    `kl_div(temperature=2):1,in_batch_info_nce(temperature=0.05):0.2`. They are part of the name, see `get_loss`.
    Penalties are left out, see `get_regularizers`.

    Raises:
        InputError: for an unknown name, naming the nearest loss and all others; for a loss given twice, a setting
            that it does not have, and a weight or a setting that is not a positive number; if the text has only
            penalties.
    """
    losses = {}
    for part in _parts(text):
        name, _, weight = part.partition(":")
        name = name.strip()
        loss = name.partition("(")[0]
        if loss in REGULARIZERS:
            continue
        if loss.removeprefix(IN_BATCH) not in LOSSES:
            known = [*LOSSES, *REGULARIZERS]
            near = get_close_matches(loss, known + [IN_BATCH + other for other in LOSSES], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise InputError(
                f"Unknown loss {loss!r}{hint} Choose one of {', '.join(LOSSES)}, or {IN_BATCH} followed by one of "
                "them."
            )
        if name in losses:
            raise InputError(f"The loss {name} is given twice in {text!r}; give it once, with the sum of its weights.")
        get_loss(name)  # refuses bad settings
        losses[name] = _positive(weight or "1", f"The weight of {name}")
    if not losses:
        raise InputError(f"A penalty is added to a loss, and {text!r} has none, such as margin_mse.")
    return losses


def get_loss(name: str) -> Loss:
    """Return the loss of a name from `get_losses`; its function has the settings that the name gives.

    Raises:
        InputError: if a setting is unknown or not a positive number.
    """
    plain, parenthesis, rest = name.partition("(")
    loss = LOSSES[plain.removeprefix(IN_BATCH)]
    if not parenthesis:
        return loss
    if not rest.endswith(")"):
        raise InputError(f"The settings of a loss end with a closing parenthesis, got {name!r}.")
    return replace(loss, function=partial(loss.function, **_read_settings(plain, rest, loss.settings)))


def _read_settings(name: str, text: str, known: tuple[str, ...]) -> dict[str, float]:
    values = {}
    for setting in text.removesuffix(")").split(","):
        key, _, value = setting.partition("=")
        key = key.strip()
        if key not in known:
            raise InputError(f"{name} has no setting {key!r}; it has {', '.join(known) or 'no settings'}.")
        values[key] = _positive(value.strip(), f"The {key} of {name}")
    return values


def _positive(text: str, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise InputError(f"{what} must be a positive number, got {text!r}.")
    return number


def check_data(losses: Iterable[str], documents: int, has_only_margins: bool) -> None:
    """Refuse losses by name that need what teacher rows lack; those over the batch read no teacher row.

    `documents` is the length of the longest list; rows that have only margins hold differences of scores.
    """
    for name in losses:
        if name.startswith(IN_BATCH):
            continue
        loss = get_loss(name)
        if has_only_margins and loss.needs_single_scores:
            raise InputError(
                f"{name} reads the teacher's score of each document, and these rows hold only margins; train with "
                "margin_mse, or from a file that has both scores."
            )
        if documents < 3 and loss.needs_lists:
            raise InputError(
                f"{name} compares lists, and these rows hold {documents} documents per query; train with margin_mse, "
                "or from lists (query_id, doc_ids, teacher_scores)."
            )
