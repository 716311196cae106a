"""The progress that training shows: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def say(console: Console, text: str) -> None:
    """Prints one line as it is: no markup, no colours, no breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)


class TrainingProgress:
    """Shows the records that `Training.train` reports.

    Args:
        console: where they are shown.
        first_step: updates done before this call.
        last_step: updates at which training ends.
        seconds: time after which it ends, if it has not before.
    """

    def __init__(self, console: Console, first_step: int, last_step: int, seconds: float | None) -> None:
        self.console = console
        self.first_step, self.last_step, self.seconds = first_step, last_step, seconds
        self.bar: Progress | None = None
        # A terminal that cannot move its cursor (TERM=dumb) would show nothing of a bar.
        if console.is_interactive:
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[numbers]}")
            self.bar = Progress(*columns, console=console, transient=True)
            self.task = self.bar.add_task(f"step {first_step:,}/{last_step:,}", total=1.0, numbers="")

    def __enter__(self) -> TrainingProgress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def report(self, record: dict[str, Any]) -> None:
        """Shows one record of the log."""
        if record["event"] == "train":
            self._train(record)
        elif record["event"] == "validation":
            self._validation(record)
        elif record["event"] == "checkpoint":
            say(self.console, f"saved the checkpoint of step {record['step']:,}")

    def _train(self, record: dict[str, Any]) -> None:
        step, elapsed = record["step"], record["seconds"]
        by_steps = elapsed * (self.last_step - step) / (step - self.first_step)
        left = by_steps if self.seconds is None else min(by_steps, max(self.seconds - elapsed, 0.0))
        numbers = (
            f"loss {record['loss']:.3f}  lr {record['learning_rate']:.2e}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  {clock(left)} left"
        )
        place = f"step {step:,}/{self.last_step:,}"
        if self.bar is None:
            say(self.console, f"{place}  epoch {record['epoch'] + 1}  {numbers}")
        else:
            self.bar.update(
                self.task, description=place, completed=elapsed / max(elapsed + left, 1e-9), numbers=numbers
            )

    def _validation(self, record: dict[str, Any]) -> None:
        scores = f"loss {record['loss']:.3f}  perplexity {record['perplexity']:.2f}  BLEU {record['bleu']:.2f}"
        say(self.console, f"validation at step {record['step']:,}: {scores}")
        for sample in record["samples"]:
            say(self.console, f"    source       {sample['source']}")
            say(self.console, f"    reference    {sample['reference']}")
            say(self.console, f"    translation  {sample['translation']}")


def clock(seconds: float) -> str:
    """Formats seconds as hours, minutes and seconds: 1:02:03, or 2:03 under an hour."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
