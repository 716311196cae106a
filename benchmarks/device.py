"""Names the device that is measured, and waits for it: a GPU, a CPU, or a CPU that rehearses for a GPU.

Environment: TFM_REHEARSAL=1 takes every path that a GPU takes, on the CPU at tiny shapes: kernels in Triton's
interpreter, the host's clock for CUDA events, a plain call for the replay of a graph. TFM_QUICK=1 measures the first
size of each suite alone, in fewer rounds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from tfm.ops import backends
from tools import interpreter

REHEARSAL = os.environ.get("TFM_REHEARSAL") == "1"
QUICK = os.environ.get("TFM_QUICK") == "1"
CUDA = torch.cuda.is_available() and not REHEARSAL
AS_GPU = CUDA or REHEARSAL
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if AS_GPU else torch.float32

if REHEARSAL:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
    interpreter.mend()

Step = Callable[[], Any]


def synchronize() -> None:
    """Waits until the device has done all that it was given."""
    if CUDA:
        torch.cuda.synchronize()


def clock() -> float:
    """Returns the time in seconds after the device's last work: pytest-benchmark's timer, around each of its rounds."""
    synchronize()
    return time.perf_counter()


class HostEvent:
    """Stands in for torch.cuda.Event where there is none: what the host has done, it has finished."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        """Returns milliseconds, as torch.cuda.Event does."""
        return 1e3 * (end.seconds - self.seconds)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True) if CUDA else HostEvent()


def event_seconds(step: Step, calls: int) -> float:
    """Returns the seconds of one of so many calls, by the device's own clock."""
    start, end = _event(), _event()
    synchronize()
    start.record()
    for _ in range(calls):
        step()
    end.record()
    synchronize()
    return 1e-3 * start.elapsed_time(end) / calls


def capture(steps: Sequence[Step]) -> Step:
    """Captures all `steps`, in order, as one CUDA graph; a call of the result replays it.

    Raises:
        RuntimeError: a step waits for the device, or does what no graph can hold.
    """
    if not CUDA:
        return lambda: [step() for step in steps]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), _no_waiting():
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph.replay


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Makes a step that waits for the device fail here: in a capture it would spoil torch's random generator too."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def cache_bytes() -> int:
    """Returns the size of the GPU's L2 cache, in a rehearsal that of its inputs; 0 on a CPU, whose inputs stay put."""
    return torch.cuda.get_device_properties(DEVICE).L2_cache_size if CUDA else 1024 if REHEARSAL else 0


def peak_bytes(step: Step) -> int | None:
    """Returns the most that `step` holds allocated at once, its results included; None where nobody counts."""
    if not CUDA:
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def forget_failure() -> None:
    """Frees what a failed step had allocated."""
    if CUDA:
        torch.cuda.empty_cache()


@contextmanager
def kernels_as_on_a_gpu() -> Iterator[None]:
    """Makes impl="auto" take the interpreter, in a rehearsal, wherever it would take a kernel on a GPU."""
    if not REHEARSAL:
        yield
        return
    reason = backends.why_triton_unavailable
    with patch.object(backends, "why_triton_unavailable", lambda device, automatic: reason(device, automatic=False)):
        yield
