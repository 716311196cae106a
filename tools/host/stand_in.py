"""CPU tensors that stand in for a GPU's: tfm chooses and does for them what it would for an H200's.

tfm asks a tensor's device in few places; each is told here what a GPU would answer. Numbers mean nothing: no Triton
kernel runs, and what it would have written is memory as it was allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tfm.kernels import tape
from tfm.kernels.launch import device
from tfm.kernels.launch.device import Chip
from tfm.operators import chunks, cross_entropy
from tfm.ops import backends, routing

DEVICE, CAPABILITY = 0, 90
CHIP = Chip(major=9, multiprocessors=132)
# Imported by name, since tfm.ops has functions of these names.
READERS = [cross_entropy, *map(import_module, ("tfm.ops.attention_rules", "tfm.ops.cross_entropy"))]


class Driver:
    """The answers that Triton needs of a driver before it compiles; it has nothing to load or launch with."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Makes tfm do with CPU tensors, within the block, what it does with a GPU's."""
    told: list[tuple[Any, str, Any]] = [
        (backends, "why_triton_unavailable", lambda device, automatic: ""),
        *((module, "chip_of", lambda device: CHIP) for module in (device, tape)),
        (chunks, "_add_product", _add_product),
        (chunks, "_add_rows", _add_rows),
        # Values on a GPU are not read: that would wait for it.
        *((reader, "is_readable", lambda x: False) for reader in READERS),
    ]
    with ExitStack() as stack:
        stack.enter_context(routing.unused())
        for module, name, answer in told:
            stack.enter_context(patch.object(module, name, answer))
        yield


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Makes one product, as cuBLAS adds 16-bit ones to fp32; CPUs have none such, so its numbers are dropped."""
    torch.mm(a, b)


def _add_rows(total: Tensor, rows: Tensor, first: bool) -> None:
    """Makes a sum, and what puts it into place."""
    summed = rows.sum(0, dtype=total.dtype)
    total.copy_(summed) if first else total.add_(summed)
