"""The facts that launch settings need of the device and of the tensors' layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chip:
    """A GPU as the settings see it: the major number of its compute capability, and its multiprocessors."""

    major: int
    multiprocessors: int


# What the interpreter is taken for: Hopper, with so few multiprocessors that its programs, too, stride over many tiles.
INTERPRETER = Chip(major=9, multiprocessors=2)


def chip_of(device: torch.device) -> Chip:
    """Returns the chip of `device`."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.major, properties.multi_processor_count)


def are_aligned(*numbers: int) -> bool:
    """Tells whether columns and row strides let a thread's elements share an address: triton specialises on 16."""
    return all(number % 16 == 0 for number in numbers)
