"""The states that a recurrence keeps for its backward, which computes those between again."""

from __future__ import annotations

import torch
from torch import Tensor

# Steps from one kept state to the next: as many as a thread of a GPU holds in registers.
KEPT_EVERY = 8


def kept_states(state: Tensor, steps: int, every: int) -> Tensor:
    """Returns empty memory for the states before each `every` steps, end to end; for one at least, or none if 0.

    A dimension for them, or Python's max, would make a graph of torch.compile's for few steps and another for many.
    """
    count = torch.sym_max(1, -(-steps // every)) if every else 0
    return state.new_empty(count * state.numel())
