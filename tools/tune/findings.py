"""The findings of a run: of each task its trials and whether the prediction held; what is printed and recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from tools.tune.problems import Task
from tools.tune.trials import OUT_OF_TIME, Trial, best_of

# The characters of each part of what is printed last; together within 12,000.
FASTER, MISSED, FAILED, NOT_TRIED = 5500, 3000, 1500, 1200


@dataclass(frozen=True)
class Verdict:
    """The outcome of one call: the least share of today's time, expected and measured, and the spread of samples."""

    call: str
    expected: float
    measured: float
    spread: float
    settings: str

    @property
    def held(self) -> bool:
        """True where they are no farther apart than the samples."""
        return abs(self.measured - self.expected) <= self.spread


@dataclass(frozen=True)
class Finding:
    """The outcome of one task; no trials where its turn did not come."""

    task: Task
    trials: Sequence[Trial]

    def calls(self) -> list[list[Trial]]:
        return [list(trials) for _, trials in groupby(self.trials, key=lambda trial: trial.call)]

    def verdicts(self) -> Iterator[Verdict]:
        """Yields one for each call whose today's choice was timed, and another one, too."""
        for trials in self.calls():
            tried = [trial for trial in trials if trial.reason != OUT_OF_TIME]
            measured = [trial for trial in tried if trial.samples]
            current = next((trial for trial in measured if trial.is_current), None)
            if current is None or len(measured) < 2:
                continue
            best = min(measured, key=lambda trial: trial.seconds)
            spread = sum((max(trial.samples) - min(trial.samples)) / trial.seconds for trial in (current, best))
            expected = min(trial.expected for trial in tried)
            yield Verdict(best.call, expected, best.seconds / current.seconds, spread, best.settings)

    def record(self) -> dict[str, Any]:
        sweep = self.task.sweep
        return {
            "family": self.task.family,
            "subject": sweep.subject,
            "direction": sweep.direction,
            "mode": sweep.mode,
            "size": str(self.task.size),
            "dtype": str(self.task.dtype).removeprefix("torch."),
            "question": sweep.question,
            "prediction": sweep.prediction,
            "gain": sweep.gain,
            "verdicts": [asdict(verdict) | {"held": verdict.held} for verdict in self.verdicts()],
            "trials": [asdict(trial) for trial in self.trials],
        }


def findings(chosen: Sequence[Task], lines: Sequence[dict[str, Any]]) -> list[Finding]:
    """Returns the outcome of each task, from the lines of the journal; the first that was noted of a trial counts."""
    ended: dict[tuple[int, int], Trial] = {}
    for line in lines:
        if "ended" in line:
            number, place = line["ended"]
            trial = Trial(**line["trial"])
            # It is no result that a problem could be built.
            if place > 0 or trial.reason:
                ended.setdefault((number, place), trial)
    return [
        Finding(task, [trial for (of, _), trial in sorted(ended.items(), key=lambda item: item[0]) if of == number])
        for number, task in enumerate(chosen)
    ]


def rows(finding: Finding) -> Iterator[str]:
    """Yields a table for the terminal: the trials as shares of today's time."""
    yield f"\n{finding.task}"
    yield "  expected  measured        µs"
    for trials in finding.calls():
        current = next((trial for trial in trials if trial.is_current and trial.samples), None)
        for trial in trials:
            if not trial.samples:
                yield f"  {trial.expected:8.2f}  {trial.reason}: {trial.settings or trial.call}"
                continue
            share = "" if current is None else f"{trial.seconds / current.seconds:.3f}"
            today = "  (today's)" if trial.is_current else ""
            yield f"  {trial.expected:8.2f}  {share:>8}  {1e6 * trial.seconds:8.1f}  {trial.settings}{today}"


def summary(found: Sequence[Finding]) -> Iterator[str]:
    """Yields what to paste, what was predicted wrongly, what failed and what was not tried, short enough to be seen."""
    better = []
    missed = []
    failed: Counter[str] = Counter()
    for finding in found:
        for trials in finding.calls():
            best = best_of(trials)
            if best is not None:
                current = next(trial for trial in trials if trial.is_current)
                share = best.seconds / current.seconds
                what = f"{1 - share:.1%} less, {1e6 * best.seconds:.1f} µs: {finding.task}"
                better.append((share, f"{what}\n    {best.call}\n    {best.settings}"))
        for verdict in finding.verdicts():
            if not verdict.held:
                numbers = f"expected {verdict.expected:.2f}, measured {verdict.measured:.2f} ± {verdict.spread:.2f}"
                missed.append((-abs(verdict.measured - verdict.expected), f"{numbers}: {finding.task}"))
        failed.update(
            f"{finding.task.sweep.subject}: {trial.reason}"
            for trial in finding.trials
            if trial.reason and trial.reason != OUT_OF_TIME
        )
    late = [
        f"{finding.task}" + (f" ({count} candidates)" if finding.trials else "")
        for finding in found
        if (count := sum(trial.reason == OUT_OF_TIME for trial in finding.trials)) or not finding.trials
    ]
    held = [verdict.held for finding in found for verdict in finding.verdicts()]
    yield from _shortened("Faster than today's:", [line for _, line in sorted(better)], FASTER)
    yield from _shortened(
        f"Predictions that missed, {held.count(False)} of {len(held)}:", [line for _, line in sorted(missed)], MISSED
    )
    yield from _shortened("Failed:", [f"{reason} ({count})" for reason, count in failed.most_common()], FAILED)
    yield from _shortened("Not tried for want of time:", late, NOT_TRIED)


def _shortened(title: str, lines: Sequence[str], characters: int) -> Iterator[str]:
    yield f"\n{title}" if lines else f"\n{title} none"
    left = characters
    for k, line in enumerate(lines):
        left -= len(line) + 3
        if left < 0:
            yield f"  and {len(lines) - k} more, in the record"
            return
        yield f"  {line}"
