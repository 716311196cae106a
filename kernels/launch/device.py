"""What launch settings need to know of the device and of the tensors' layout."""

from __future__ import annotations

import torch


def multiprocessors(device: torch.device) -> int:
    """Of `device`; the interpreter is given two, so that its programs, too, stride over several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def are_aligned(*numbers: int) -> bool:
    """Whether columns and row strides let a thread's elements share an address: triton specialises on 16."""
    return all(number % 16 == 0 for number in numbers)
