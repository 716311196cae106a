"""Candidates tried one after the other: put in place of today's, held against float64, timed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

import tfm
from benchmarks import device
from benchmarks.device import Step
from benchmarks.measure import Turns, calibrate, failure, input_sets, step_of
from benchmarks.suite import BOTH, OURS, Case
from tools.tune.candidates.sweep import EAGER, Sweep

SEED = 20170612
OUT_OF_TIME = "out of time"
ROUNDS = 9 if device.CUDA else 3
Timing = Callable[[Sequence[Step], str], Sequence[float]]


@dataclass(frozen=True)
class Trial:
    """The outcome of one candidate for one call: seconds of each round, or the reason why there are none."""

    call: str
    settings: str
    expected: float
    is_current: bool
    samples: Sequence[float] = ()
    reason: str = ""

    @property
    def seconds(self) -> float:
        return median(self.samples)


def timed(steps: Sequence[Step], mode: str) -> list[float]:
    """Returns seconds of a step, a number a round: of replays of one graph of all of them, or of calls in turn."""
    is_eager = mode == EAGER
    run = Turns(steps) if is_eager else device.capture(steps)
    # One call of a graph is all steps; called in turn, each is called as often.
    steps_a_call, multiple = (1, len(steps)) if is_eager else (len(steps), 1)
    calls, _ = calibrate(run, multiple, device.clock)
    samples = []
    for _ in range(ROUNDS):
        start = device.clock()
        for _ in range(calls):
            run()
        samples.append((device.clock() - start) / (calls * steps_a_call))
    return samples


class Problem:
    """A sweep's operation at one size: its inputs, the truth in float64, and how far from it others may be.

    `calls` are those that choose, each once: (arguments by name, today's choice).
    """

    def __init__(self, sweep: Sweep, size: Any, dtype: torch.dtype) -> None:
        self.sweep, self.dtype = sweep, dtype
        self.case = Case(sweep.suite, size, sweep.direction, sweep.mode, OURS)
        # The same seed in every process, so that one which goes on for another compares the same.
        torch.manual_seed(SEED)
        self.tensors = self.inputs()
        with sweep.recorded() as self.calls:
            self.todays = self.results(self.tensors)

    def inputs(self) -> tuple[Any, ...]:
        return _cast(self.case.inputs(), self.dtype)

    def results(self, tensors: Sequence[Any]) -> list[Tensor]:
        """Returns outputs, and gradients where the direction says so; dropout and cotangents are always the same."""
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

    def learn_truth(self) -> None:
        """Computes the truth, and `errors`: today's, or plain torch's in the same dtype where those are larger."""
        with tfm.use("reference"):
            self.truth = self.results(_cast(self.tensors, torch.float64))
            plain = self.errors_of(self.results(self.tensors))
        self.errors = list(map(max, plain, self.errors_of(self.todays)))

    def errors_of(self, results: Sequence[Tensor]) -> list[float]:
        """Returns the largest absolute error of each result, relative to the largest true value."""
        tiny = torch.finfo(torch.float64).tiny
        pairs = zip(results, self.truth, strict=True)
        return [((found - true).abs().max() / true.abs().max().clamp(min=tiny)).item() for found, true in pairs]

    def check(self) -> None:
        """Checks that the choice in place errs by at most twice `errors`, plus a rounding, as in the tests' oracle.

        Raises:
            ValueError: it errs by more.
        """
        found_errors = self.errors_of(self.results(self.tensors))
        for k, (found, known) in enumerate(zip(found_errors, self.errors, strict=True)):
            allowed = 2 * known + torch.finfo(self.dtype).eps
            if not found <= allowed:  # NaN included
                raise ValueError(f"result {k} errs by {found:.1e}, expected at most {allowed:.1e}")

    def steps(self) -> list[Step]:
        """Returns the calls that are timed, one for each of as many sets of inputs as do not stay in the cache."""
        size = sum(given.nbytes for given in self.tensors if isinstance(given, Tensor))
        count = input_sets(size, device.cache_bytes())
        sets = [self.tensors, *(self.inputs() for _ in range(count - 1))]
        return [step_of(self.case.peer.function, tensors, self.case.direction) for tensors in sets]

    def candidates(self) -> Iterator[tuple[Trial, AbstractContextManager[None]]]:
        """Yields each call's trials, today's choice first, then what promises most; and how to put it in place."""
        for arguments, current in self.calls:
            words = ", ".join(f"{name}={value}" for name, value in arguments.items())
            call = f"{self.sweep.subject}({words})"
            yield Trial(call, str(current), 1.0, is_current=True), self.sweep.substituted(arguments, current)
            seen = [current]
            for candidate in self.sweep.candidates(current, arguments):
                if candidate.settings not in seen:
                    seen.append(candidate.settings)
                    trial = Trial(call, str(candidate.settings), candidate.expected, is_current=False)
                    yield trial, self.sweep.substituted(arguments, candidate.settings)


class Notes:
    """The notes taken before and after each trial of a problem, so that they outlive the process. Here: none."""

    def is_known(self, place: int) -> bool:
        """Tells whether the trial of this place has been begun before."""
        return False

    def begin(self, place: int, trial: Trial) -> None:
        """Notes that the trial of this place begins; place 0 builds the problem."""

    def end(self, place: int, trial: Trial) -> None:
        """Notes that it has ended so."""


def try_all(
    sweep: Sweep,
    size: Any,
    dtype: torch.dtype,
    until: float,
    clock: Callable[[], float],
    notes: Notes,
    timing: Timing = timed,
) -> list[Trial]:
    """Tries a sweep's candidates at one size; one that fails to compile or to launch, or gives other numbers, says so.

    Args:
        sweep: the candidates.
        size: of the sweep's suite.
        dtype: of the floating-point inputs.
        until: by `clock`: candidates whose turn comes later are named, not tried.
        clock: in seconds.
        notes: told of each trial; those it knows are not run again.
        timing: of steps in the sweep's mode, the candidate in place: seconds of each round.
    """
    built = Trial(sweep.subject, "", 1.0, is_current=True)
    if not notes.is_known(0):
        notes.begin(0, built)
    try:
        problem = Problem(sweep, size, dtype)
        if not problem.calls:
            built = replace(built, reason="is not called at this size")
        else:
            problem.learn_truth()
    except Exception as error:  # a GPU too small for the size, say: the next size may fit
        built = replace(built, reason=failure(error))
    _end(notes, 0, built)
    if built.reason:
        return [built]
    trials = []
    for place, (trial, substituted) in enumerate(problem.candidates(), start=1):
        if notes.is_known(place):
            continue
        if clock() < until:
            notes.begin(place, trial)
            trial = _tried(trial, problem, substituted, timing)
        else:
            trial = replace(trial, reason=OUT_OF_TIME)
        _end(notes, place, trial)
        trials.append(trial)
    return trials


def _tried(trial: Trial, problem: Problem, substituted: AbstractContextManager[None], timing: Timing) -> Trial:
    try:
        with substituted:
            problem.check()
            return replace(trial, samples=tuple(timing(problem.steps(), problem.sweep.mode)))
    except Exception as error:  # what a candidate does wrong is the result of its trial
        return replace(trial, reason=failure(error))


def _end(notes: Notes, place: int, trial: Trial) -> None:
    # First, since nothing can be given back of a GPU that is lost.
    notes.end(place, trial)
    if trial.reason:
        device.forget_failure()


def compile_all(
    sweep: Sweep, size: Any, dtype: torch.dtype, until: float, clock: Callable[[], float], notes: Notes
) -> None:
    """Runs each candidate once, untimed and unchecked, so that it is compiled; as `try_all`."""
    notes.begin(0, Trial(sweep.subject, "", 1.0, is_current=True))
    problem = Problem(sweep, size, dtype)
    for place, (trial, substituted) in enumerate(problem.candidates(), start=1):
        if clock() >= until:
            return
        notes.begin(place, trial)
        with suppress(Exception), substituted:  # its trial will say what is wrong
            problem.results(problem.tensors)
            notes.end(place, trial)


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Returns the fastest, where its median beats the fastest round of today's choice; None where that stays."""
    measured = [trial for trial in trials if trial.samples]
    current = next((trial for trial in measured if trial.is_current), None)
    if current is None:
        return None
    fastest = min(measured, key=lambda trial: trial.seconds)
    return fastest if fastest.seconds < min(current.samples) and not fastest.is_current else None


def _cast(tensors: Sequence[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    def cast(given: Any) -> Any:
        if not isinstance(given, Tensor) or not given.is_floating_point():
            return given
        return given.detach().to(dtype).requires_grad_(given.requires_grad)

    return tuple(map(cast, tensors))
