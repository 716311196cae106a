"""What training says while it runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tfm.cli.progress import TrainingProgress, clock


def test_a_terminal_shows_a_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, _environ={"TERM": "xterm"})
    record = {"event": "train", "step": 30, "epoch": 0, "loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 4321.0}
    with TrainingProgress(console, first_step=10, last_step=50, seconds=None) as progress:
        progress.report(record | {"seconds": 10.0})
        assert progress.bar is not None
        assert progress.bar.tasks[0].completed == pytest.approx(0.5)
        progress.bar.refresh()
    shown = console.file.getvalue()
    for part in ("step 30/50", "loss 2.500", "lr 1.00e-03", "4,321 tokens/s", "0:10 left"):
        assert part in shown


def test_time_left_is_what_ends_first(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"event": "train", "step": 30, "epoch": 0, "loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 1.0}
    for seconds, left in ((None, "0:10"), (12.0, "0:02"), (100.0, "0:10")):
        progress = TrainingProgress(Console(width=120), first_step=10, last_step=50, seconds=seconds)
        progress.report(record | {"seconds": 10.0})
        assert capsys.readouterr().out.endswith(f"1 tokens/s  {left} left\n")


def test_samples_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "[bold]a[/bold] :smile: " + "long " * 40 + "end"
    sample = {"source": odd, "reference": odd, "translation": odd}
    record = {"event": "validation", "step": 3, "loss": 1.0, "perplexity": 2.7, "bleu": 9.0, "samples": [sample]}
    TrainingProgress(Console(width=80), 0, 10, None).report(record)
    assert capsys.readouterr().out.count(f"  {odd}\n") == 3


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.1, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
