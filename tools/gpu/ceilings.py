"""The speeds that no kernel on this GPU exceeds: a copy of device memory, and a product of large bf16 matrices.

    python -m tools.gpu.ceilings

Run by `python -m tools.gpu`, in a process of its own; each ceiling is a line of the journal, each sample kept.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import record
from tools.gpu.child import JOURNAL, append


@dataclass(frozen=True)
class Work:
    """The amount of work: the size of the copied buffer, the matrices' side, samples, and steps in each."""

    copied: int
    side: int
    samples: int
    steps: int


# 4 GiB are eighty times the L2 cache of the largest GPU. A sample is some 10 ms of work on it.
WORK = Work(copied=4 << 30, side=8192, samples=30, steps=8)
REHEARSAL = Work(copied=1 << 20, side=64, samples=3, steps=2)
# Launched ahead, so that the clocks are read while the GPU works: a second of products.
LOAD = 700


def main() -> None:
    rehearse = os.environ.get("TFM_REHEARSAL") == "1"
    device = torch.device("cpu" if rehearse else "cuda")
    work = REHEARSAL if rehearse else WORK
    journal = Path(os.environ[JOURNAL])

    samples = copy_rates(device, work)
    append(journal, {"copy": {"GB/s": statistics.median(samples), "samples": samples}})
    torch.manual_seed(1)
    # Random numbers: zeros draw less power, and let the clocks rise.
    left, right = (torch.randn(work.side, work.side, device=device).to(torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    samples = matmul_rates(left, right, product, work)
    append(journal, {"matmul": {"TFLOP/s": statistics.median(samples), "samples": samples}})
    for _ in range(0 if rehearse else LOAD):
        torch.mm(left, right, out=product)
    append(journal, {"clocks_under_load": record.clocks(device)})


def copy_rates(device: torch.device, work: Work) -> list[float]:
    """Returns GB/s of what is read and written by `Tensor.copy_` inside the device's memory, each sample."""
    size = work.copied
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        size = min(size, free // 4)
    source = torch.ones(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    seconds = sample(lambda: target.copy_(source), device, work)
    return [2 * source.nbytes / each / 1e9 for each in seconds]


def matmul_rates(left: torch.Tensor, right: torch.Tensor, product: torch.Tensor, work: Work) -> list[float]:
    """Returns TFLOP/s of torch's product of two square matrices, each sample."""
    seconds = sample(lambda: torch.mm(left, right, out=product), left.device, work)
    return [2 * work.side**3 / each / 1e12 for each in seconds]


def sample(step: Callable[[], object], device: torch.device, work: Work) -> list[float]:
    """Returns seconds of one step, by the host's clock around `work.steps` of them; the first sample warms up."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = []
    for _ in range(1 + work.samples):
        finish()
        started = time.perf_counter()
        for _ in range(work.steps):
            step()
        finish()
        seconds.append((time.perf_counter() - started) / work.steps)
    return seconds[1:]


if __name__ == "__main__":
    main()
