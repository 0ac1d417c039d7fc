"""Losses: functions of scores, and the names by which they are chosen.

Example:
    >>> student, teacher = torch.tensor([[3.0, 1.0]]), torch.tensor([[9.0, 4.0]])  # margins 2 and 5
    >>> kd.losses.margin_mse(student, teacher)
    tensor(9.)
"""

from .functions import adr_mse as adr_mse
from .functions import all_margins_mse as all_margins_mse
from .functions import info_nce as info_nce
from .functions import kl_div as kl_div
from .functions import lambda_loss as lambda_loss
from .functions import list_mle as list_mle
from .functions import listed_margins as listed_margins
from .functions import margin_mse as margin_mse
from .functions import margins as margins
from .functions import mse as mse
from .functions import order_ranknet as order_ranknet
from .functions import ranknet as ranknet
from .functions import spread as spread
from .functions import weighted_ranknet as weighted_ranknet
from .names import IN_BATCH as IN_BATCH
from .names import LOSSES as LOSSES
from .names import REGULARIZERS as REGULARIZERS
from .names import Loss as Loss
from .names import Regularizer as Regularizer
from .names import check_data as check_data
from .names import get_loss as get_loss
from .names import get_losses as get_losses
from .names import get_regularizers as get_regularizers
