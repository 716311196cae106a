"""A small call of every operation of tfm.ops, as a GPU would be given it: bf16, dropout where a model has it."""

from __future__ import annotations

import torch

from tools.host.call import Call
from tools.subjects import subjects


def operation_cases() -> list[Call]:
    """Returns the calls of every subject."""
    seed = torch.tensor(5)
    return [call for subject in subjects() for call in subject.timed(seed)]
