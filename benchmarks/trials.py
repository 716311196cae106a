"""Launch settings tried one after the other: put in place of today's, held against float64, timed as graph replays."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import tfm
from benchmarks import device
from benchmarks.candidates.sweep import Sweep
from benchmarks.device import Step
from benchmarks.measure import calibrate, failure, input_sets, step_of
from benchmarks.suite import BOTH, OURS, Case
from tfm.kernels import launch

SEED = 20170612
ROUNDS = 9 if device.CUDA else 3
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """What came of one candidate for one call: seconds of each round, or the reason why there are none."""

    function: str
    arguments: Arguments
    size: Any
    settings: Any
    expected: float
    is_current: bool
    samples: tuple[float, ...] = ()
    reason: str = ""

    @property
    def seconds(self) -> float:
        return median(self.samples)


def replay_seconds(steps: Sequence[Step]) -> list[float]:
    """Seconds of a step, a number a round, from replays of one graph of all of them."""
    replay = device.capture(steps)
    calls, _ = calibrate(replay, 1, device.clock)
    samples = []
    for _ in range(ROUNDS):
        start = device.clock()
        for _ in range(calls):
            replay()
        samples.append((device.clock() - start) / (calls * len(steps)))
    return samples


def try_all(
    sweep: Sweep,
    size: Any,
    dtype: torch.dtype,
    until: float,
    clock: Callable[[], float],
    timing: Callable[[Sequence[Step]], Sequence[float]] = replay_seconds,
) -> Iterator[Trial]:
    """Tries a sweep's candidates at one size: for each call today's settings first, then what promises most.

    Args:
        sweep: the candidates.
        size: of the sweep's suite.
        dtype: of the floating-point inputs.
        until: by `clock`: candidates whose turn comes later are named, not tried.
        clock: in seconds.
        timing: of steps, under the settings in place: seconds of each round.

    Yields:
        A trial for each candidate; one that fails to compile or to launch, or gives other numbers, is a trial too.
    """
    nothing = Trial(sweep.function, {}, size, None, 1.0, is_current=True)
    try:
        problem = Problem(sweep, size, dtype)
    except Exception as error:  # a GPU too small for the size, say: the next size may fit
        device.forget_failure()
        yield replace(nothing, reason=failure(error))
        return
    if not problem.calls:
        yield replace(nothing, reason="is not called at this size")
    for arguments, current in problem.calls:
        expected = {candidate.settings: candidate.expected for candidate in sweep.candidates(current, arguments)}
        others = sorted((settings for settings in expected if settings != current), key=expected.__getitem__)
        for settings in (current, *others):
            share = 1.0 if settings == current else expected[settings]
            trial = Trial(sweep.function, arguments, size, settings, share, is_current=settings == current)
            yield _tried(trial, problem, timing) if clock() < until else replace(trial, reason="out of time")


def _tried(trial: Trial, problem: Problem, timing: Callable[[Sequence[Step]], Sequence[float]]) -> Trial:
    try:
        with tfm.use("triton"), _substituted(trial.function, trial.arguments, trial.settings):
            problem.check()
            return replace(trial, samples=tuple(timing(problem.steps())))
    except Exception as error:  # what a candidate does wrong is the result of its trial
        device.forget_failure()
        return replace(trial, reason=failure(error))


class Problem:
    """An operation of ours at one size: its inputs, the truth in float64, and how far today's settings are from it.

    `calls` are those of the sweep's function, each once: (arguments by name, today's settings).
    """

    def __init__(self, sweep: Sweep, size: Any, dtype: torch.dtype) -> None:
        self.case, self.dtype = Case(sweep.suite, size, sweep.direction, "graph", OURS), dtype
        self.tensors = self.inputs()
        with tfm.use("reference"):
            self.truth = self.results(_cast(self.tensors, torch.float64))
        with tfm.use("triton"), _recorded(sweep.function) as self.calls:
            self.errors = self._errors()

    def inputs(self) -> tuple[Any, ...]:
        return _cast(self.case.inputs(), self.dtype)

    def results(self, tensors: Sequence[Any]) -> list[Tensor]:
        """Outputs, and gradients where the direction says so; dropout and cotangents are always the same."""
        torch.manual_seed(SEED)
        inputs = [given for given in tensors if isinstance(given, Tensor) and given.requires_grad]
        with torch.set_grad_enabled(self.case.direction == BOTH):
            outputs = self.case.peer.function(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if self.case.direction != BOTH:
            return list(outputs)
        torch.manual_seed(SEED)
        cotangents = [torch.randn(output.shape, device=output.device).to(self.dtype).to(output) for output in outputs]
        gradients = torch.autograd.grad(outputs, inputs, cotangents)
        return [*(output.detach() for output in outputs), *gradients]

    def check(self) -> None:
        """The settings in place err by at most twice what today's do, plus one rounding: the rule of the tests' oracle.

        Raises:
            ValueError: they err by more.
        """
        for k, (found, known) in enumerate(zip(self._errors(), self.errors, strict=True)):
            allowed = 2 * known + torch.finfo(self.dtype).eps
            if not found <= allowed:  # NaN included
                raise ValueError(f"result {k} errs by {found:.1e}, expected at most {allowed:.1e}")

    def steps(self) -> list[Step]:
        """What is timed: a call for each of so many sets of inputs that they do not stay in the cache."""
        size = sum(given.nbytes for given in self.tensors if isinstance(given, Tensor))
        count = input_sets(size, device.cache_bytes())
        sets = [self.tensors, *(self.inputs() for _ in range(count - 1))]
        return [step_of(self.case.peer.function, tensors, self.case.direction) for tensors in sets]

    def _errors(self) -> list[float]:
        """Of the settings in place: the largest absolute error of each result, relative to the largest true value."""
        pairs = zip(self.results(self.tensors), self.truth, strict=True)
        tiny = torch.finfo(torch.float64).tiny
        return [((found - true).abs().max() / true.abs().max().clamp(min=tiny)).item() for found, true in pairs]


def _cast(tensors: Sequence[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    def cast(given: Any) -> Any:
        if not isinstance(given, Tensor) or not given.is_floating_point():
            return given
        return given.detach().to(dtype).requires_grad_(given.requires_grad)

    return tuple(map(cast, tensors))


@contextmanager
def _recorded(name: str) -> Iterator[list[tuple[Arguments, Any]]]:
    """The calls of tfm.kernels.launch.`name` in the block, each once, with what they return."""
    function, calls = getattr(launch, name), []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        call = _bound(function, args, kwargs), function(*args, **kwargs)
        if call not in calls:
            calls.append(call)
        return call[1]

    with patch.object(launch, name, recorded):
        yield calls


@contextmanager
def _substituted(name: str, arguments: Arguments, settings: Any) -> Iterator[None]:
    """In the block tfm.kernels.launch.`name` of these arguments returns `settings`."""
    function = getattr(launch, name)

    def substituted(*args: Any, **kwargs: Any) -> Any:
        return settings if _bound(function, args, kwargs) == arguments else function(*args, **kwargs)

    with patch.object(launch, name, substituted):
        yield


def _bound(function: Callable[..., Any], args: Sequence[Any], kwargs: Arguments) -> Arguments:
    return dict(inspect.signature(function).bind(*args, **kwargs).arguments)


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The fastest, where its median beats the fastest round of today's settings; None where they stay."""
    timed = [trial for trial in trials if trial.samples]
    current = next((trial for trial in timed if trial.is_current), None)
    if current is None:
        return None
    fastest = min(timed, key=lambda trial: trial.seconds)
    return fastest if fastest.seconds < min(current.samples) and not fastest.is_current else None
