"""The processes of an `accelerate` job."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def processes() -> PartialState:
    """Return accelerate's process state: rank, number of processes, device and barriers.

    Without `cpu=True` accelerate gives every process of a machine without a GPU a state of its own, so that each of
    them would do the whole work.
    """
    return PartialState(cpu=not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"))
