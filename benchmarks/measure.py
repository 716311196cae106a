"""Times cases, on CPUs and GPUs alike, and keeps the samples: pytest-benchmark runs them, extra_info explains them.

A round is so many calls, one after the other, that it lasts a millisecond at least, between two readings of a clock
that waits for the device. pytest-benchmark divides by the calls, so that its statistics are seconds a call. On a GPU
the calls take turns among sets of inputs that together exceed the L2 cache twice, CUDA events time the same calls once
more, and a launch-bound case is also measured as replays of one CUDA graph of several calls.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import device
from benchmarks.device import Step
from benchmarks.suite import BOTH, NOMINAL, Case

ROUND_SECONDS = 1e-3
# Seconds that a case may take, warm-up and compilation apart, within the fewest and the most rounds.
CASE_SECONDS, ROUNDS = (0.1 if device.CUDA else 1.0), (5, 50)
if device.QUICK:
    CASE_SECONDS, ROUNDS = CASE_SECONDS / 5, (3, 10)
if device.REHEARSAL:
    CASE_SECONDS, ROUNDS = 0.0, (2, 2)
WARM_UP_SECONDS = 0.02 if device.CUDA else 0.0
EVENT_SAMPLES = 3 if device.CUDA else 1
MOST_INPUTS = 16
REASON_LENGTH = 200
CALLS_IN_GRAPH = 8  # at least: the launch of a graph itself takes as long as a few kernels


class Unavailable(Exception):
    """The reason why a peer does not exist here."""


def measure(benchmark: Any, case: Case) -> None:
    """Times `case`; a peer that fails, or is not there, is a result, and ours that fails is a failure.

    Args:
        benchmark: pytest-benchmark's fixture. Its extra_info then holds the case, bytes, flops, GB/s or TFLOP/s, the
            ceiling and the share of it where TFM_CEILINGS names a file of ceilings, or "failed": why.
        case: what is timed.
    """
    benchmark.group = f"{case.suite.operation} {case.direction} {case.size} {case.mode}"
    benchmark.params = {"size": str(case.size)}  # the case itself is no JSON
    benchmark.extra_info |= case.info()
    try:
        if reason := case.peer.missing():
            raise Unavailable(reason)
        with case.peer.context():
            _measure(benchmark, case)
        return
    except Exception as error:
        benchmark.extra_info["failed"] = reason = failure(error)
        benchmark.has_error = True  # keeps what was measured before it failed out of the record
        if case.is_ours and not isinstance(error, Unavailable):
            raise
    device.forget_failure()
    pytest.xfail(reason)


def failure(error: Exception) -> str:
    """Returns one line that says what went wrong; Dynamo and Inductor wrap the exception that knows."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    line = next(iter(str(cause).strip().splitlines()), "")
    return line if isinstance(cause, Unavailable) else shorten(f"{type(cause).__name__}: {line}", REASON_LENGTH)


def _measure(benchmark: Any, case: Case) -> None:
    function = compiled(case)
    sets = [case.inputs()]
    if benchmark.enabled:
        set_bytes = sum(given.nbytes for given in sets[0] if isinstance(given, Tensor))
        sets += [case.inputs() for _ in range(input_sets(set_bytes, device.cache_bytes()) - 1)]
    steps = [step_of(function, tensors, case.direction) for tensors in sets]
    for step in steps:
        step()
    if case.mode == "graph":
        steps *= math.ceil(CALLS_IN_GRAPH / len(steps)) if device.CUDA else 1
        turn: Turns | Replays = Replays(device.capture(steps), len(steps))
    else:
        turn = Turns(steps)
    calls, rounds = 1, 1
    if benchmark.enabled:
        calls, rounds = plan(turn, turn.calls)
    benchmark.pedantic(turn, rounds=rounds, iterations=calls)
    if device.AS_GPU:
        samples = sorted(device.event_seconds(turn, calls) for _ in range(EVENT_SAMPLES))
        benchmark.extra_info["events_seconds"] = samples[EVENT_SAMPLES // 2]
    peak = device.peak_bytes(steps[0]) if case.mode == "eager" else None
    if peak is not None:
        benchmark.extra_info["peak_bytes"] = peak
    if benchmark.stats is not None:
        benchmark.extra_info |= achieved(case, benchmark.stats.stats.median)


def step_of(function: Callable[..., Any], tensors: Sequence[Any], direction: str) -> Step:
    """Returns a call of `function` without gradients, or with those of every tensor that needs one."""
    if direction != BOTH:
        plain = [given.detach() if isinstance(given, Tensor) else given for given in tensors]

        @torch.no_grad()
        def forward() -> None:
            function(*plain)

        return forward
    inputs = [given for given in tensors if isinstance(given, Tensor) and given.requires_grad]
    outputs = _outputs(function(*tensors))
    # The gradient of a loss is 1, with which some peers are faster.
    cotangents = [torch.randn_like(x) if x.dim() else torch.ones_like(x) for x in outputs]

    def both() -> None:
        torch.autograd.grad(_outputs(function(*tensors)), inputs, cotangents)

    return both


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


class Turns:
    """Runs the steps in turn, one a call."""

    calls = 1

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps, self.next = steps, 0

    def __call__(self) -> None:
        self.steps[self.next]()
        self.next = (self.next + 1) % len(self.steps)


class Replays:
    """Spreads a graph of several calls over as many calls: the first replays them all, the others do nothing."""

    def __init__(self, replay: Step, calls: int) -> None:
        self.replay, self.calls, self.done = replay, calls, 0

    def __call__(self) -> None:
        if self.done == 0:
            self.replay()
        self.done = (self.done + 1) % self.calls


def input_sets(set_bytes: int, cache_bytes: int) -> int:
    """Returns how many sets of inputs together exceed twice the cache; 1 where there is no cache to exceed."""
    if set_bytes == 0 or cache_bytes == 0:
        return 1
    return min(MOST_INPUTS, 2 * cache_bytes // set_bytes + 1)


def plan(step: Step, multiple: int, clock: Callable[[], float] = device.clock) -> tuple[int, int]:
    """Warms up, and returns (calls of a round, rounds); the calls are a multiple of `multiple`."""
    calls, seconds = calibrate(step, multiple, clock)
    warm_until = clock() + WARM_UP_SECONDS
    while clock() < warm_until:
        for _ in range(calls):
            step()
    fewest, most = ROUNDS
    return calls, min(most, max(fewest, round(CASE_SECONDS / seconds)))


def calibrate(step: Step, multiple: int, clock: Callable[[], float]) -> tuple[int, float]:
    """Returns about the fewest calls that last ROUND_SECONDS with a tenth to spare, and the seconds that they last."""
    calls, enough = multiple, 1.1 * ROUND_SECONDS
    while True:
        started = clock()
        for _ in range(calls):
            step()
        seconds = clock() - started
        if seconds >= enough:
            return calls, seconds
        # A first guess from few calls is poor, so that no step is longer than tenfold.
        wanted = calls * min(10.0, 1.1 * enough / max(seconds, 1e-9))
        calls = multiple * max(math.ceil(wanted / multiple), calls // multiple + 1)


def achieved(case: Case, seconds: float) -> dict[str, Any]:
    """Returns bytes and flops a second, and the share of the ceiling that bounds the case."""
    work, known = case.work, ceilings()
    info: dict[str, Any] = {}
    if work.bytes:
        info |= {"bytes": work.bytes, "GB/s": work.bytes / seconds / 1e9}
    if work.flops:
        info |= {"flops": work.flops, "TFLOP/s": work.flops / seconds / 1e12}
    info["ceiling"] = work.ceiling(known or NOMINAL)
    if known:
        info["share"] = work.seconds(known)[info["ceiling"]] / seconds
    return info


@cache
def ceilings() -> dict[str, Any]:
    """Reads {"copy": GB/s, "matmul": TFLOP/s, "caches": ...} from the file TFM_CEILINGS names; empty without one."""
    path = os.environ.get("TFM_CEILINGS")
    return json.loads(Path(path).read_text()) if path else {}


_compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
_compiled_at: list[str] = []


def compiled(case: Case) -> Callable[..., Any]:
    """Returns the peer's function, compiled where it is to be: once for all directions and modes of a size."""
    if case.peer.compiled is None:
        return case.peer.function
    place = f"{case.suite.operation} {case.size}"
    if _compiled_at != [place]:
        _compiled_at[:] = [place]
        _compiled.clear()
        torch._dynamo.reset()
    key = case.peer.function, case.peer.compiled
    if key not in _compiled:
        # A rehearsal traces as the others do, but Inductor's minutes of C++ would prove nothing about its CUDA.
        how: dict[str, Any] = {"backend": "aot_eager"} if device.REHEARSAL else {"mode": case.peer.compiled}
        _compiled[key] = torch.compile(case.peer.function, fullgraph=True, dynamic=False, **how)
    return _compiled[key]
