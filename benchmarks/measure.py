"""How a step is timed, on CPUs and GPUs alike, and what is kept of it: pytest-benchmark runs, extra_info explains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import CUDA

DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32


def measure(benchmark: Any, step: Callable[[], Any], moved: int | None = None, flops: int | None = None) -> None:
    """Times `step` to the end of its work on the device.

    Args:
        benchmark: pytest-benchmark's fixture; cases that differ in their peer alone are printed together.
        step: what is timed.
        moved: the bytes that a perfect kernel would move, for GB/s.
        flops: the floating-point operations that it would do, for GFLOP/s.
    """

    def finished() -> None:
        step()
        if CUDA:
            torch.cuda.synchronize()

    finished()
    name, _, case = benchmark.name.partition("[")
    peer = benchmark.extra_info["peer"]
    benchmark.group = f"{name.removeprefix('test_')} {case.rstrip(']').replace(peer, '', 1).strip('-')}"
    benchmark(finished)
    benchmark.extra_info |= {"device": str(DEVICE), "dtype": str(DTYPE)}
    if benchmark.stats is None:
        return
    seconds = benchmark.stats.stats.median
    if moved is not None:
        benchmark.extra_info |= {"bytes": moved, "GB/s": moved / seconds / 1e9}
    if flops is not None:
        benchmark.extra_info |= {"flops": flops, "GFLOP/s": flops / seconds / 1e9}


def measure_forward(benchmark: Any, function: Callable, tensors: Sequence[Any], **work: int) -> None:
    """Times `function` of `tensors` without gradients; `work` as in `measure`."""

    @torch.no_grad()
    def step() -> None:
        function(*tensors)

    measure(benchmark, step, **work)


def measure_both(benchmark: Any, function: Callable, tensors: Sequence[Any], **work: int) -> None:
    """Times `function` of `tensors` and the gradients of those that need one; `work` as in `measure`."""
    inputs = [given for given in tensors if isinstance(given, Tensor) and given.requires_grad]
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [torch.randn_like(output) for output in outputs]

    def step() -> None:
        torch.autograd.grad(function(*tensors), inputs, cotangents)

    measure(benchmark, step, **work)


def random(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers on the device, in the dtype measured there, that need a gradient."""
    return (torch.randn(shape, device=DEVICE) * scale).to(DTYPE).requires_grad_()
