"""The tape through which a launch function makes its outputs and scratch memory and launches its kernels.

`Tape` does it at once. tools/check_kernels has one that takes down what would be launched, for tensors without memory
(torch's device "meta") and for any chip: so the cases that are compiled follow from the launch functions themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

from tfm.kernels.launch.device import Chip, chip_of

L = TypeVar("L", bound=Callable[..., Any])


# Launch functions that no plan can repeat: torch computes between their launches, or kernels are given descriptors.
UNPLANNED: set[Callable[..., Any]] = set()


def unplanned(launch: L) -> L:
    """Marks such a launch function, which then takes no time to find out."""
    UNPLANNED.add(launch)
    return launch


class Tape:
    """Runs launch functions."""

    def chip(self, device: torch.device) -> Chip:
        """Returns the chip that settings are for."""
        return chip_of(device)

    def outputs(self, call: Any) -> Any:
        """Returns the results of an operator's call, still empty."""
        return call.outputs()

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns scratch memory."""
        return torch.empty(shape, dtype=dtype, device=device)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns scratch memory that sums are added to."""
        return torch.zeros(shape, dtype=dtype, device=device)

    def scratch(self, x: Tensor) -> Tensor:
        """Returns scratch memory that was just made, by the rule of another tensor, say."""
        return x

    def launch(self, kernel: KernelInterface, grid: tuple[int, ...], options: dict[str, Any], **arguments: Any) -> None:
        """Launches `kernel` with all of its arguments; they go by place, which Triton binds faster than names.

        Args:
            kernel: a function under triton.jit.
            grid: how many programs there are.
            options: num_warps and whatever else the compiler is told.
            arguments: by the names of the kernel's parameters.

        Raises:
            TypeError: an argument too many.
            KeyError: an argument too few.
        """
        names = kernel.arg_names
        if len(arguments) != len(names):
            odd = sorted(set(arguments) ^ set(names))
            raise TypeError(f"{kernel.fn.__name__}: expected its {len(names)} parameters, got others: {', '.join(odd)}")
        kernel[grid](*[arguments[name] for name in names], **options)
