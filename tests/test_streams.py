"""Standard streams that are closed, full, or no terminal to draw on: one line, and no file takes their place."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from small_run import start_tfm

from tfm.cli import streams
from tfm.cli.progress import TrainingProgress
from tfm.errors import UserError

ROOT = Path(__file__).parent.parent
RECORD = {"event": "train", "step": 30, "epoch": 0, "loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 4321.0}


def shell(words: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", words, "sh", sys.executable]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


NO_INPUT = "standard input is closed: expected text"
NO_OUTPUT = "standard output is closed: what this command says would be lost"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("translate RUN <&-", NO_INPUT),
        ("translate RUN >&-", NO_OUTPUT),
        ("evaluate RUN --source x --reference x >&-", NO_OUTPUT),
    ],
    ids=["input", "output", "evaluate"],
)
def test_a_closed_stream_is_told(words: str, message: str) -> None:
    finished = shell(f'"$1" -m tfm {words}')
    assert (finished.returncode, finished.stderr) == (2, f"tfm: error: {message}\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(closed: str) -> None:
    """Else what is printed there, by whatever library, would stand in a checkpoint."""
    program = "import os; from tfm.cli import streams; streams.prepare(); os._exit(os.open(os.devnull, os.O_RDONLY))"
    assert shell(f'"$1" -c "{program}" {closed}').returncode == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_on_a_full_disk(flag: str) -> None:
    with Path("/dev/full").open("wb") as full:
        process = start_tfm(flag, stdout=full)
        _, stderr = process.communicate()
    assert (process.returncode, stderr) == (2, b"tfm: error: No space left on device\n")


def test_two_streams_that_are_lost_leave_the_status() -> None:
    """As `2>&1 | head -0`: Python would end with 120 for what it cannot flush."""
    process = start_tfm("train", "--resume", "--out", "nowhere", stderr=subprocess.STDOUT)
    process.stdout.close()
    assert process.wait() == 2


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_what_is_lost_is_noticed_once() -> None:
    watched = streams.Watched(Full())
    console = Console(file=watched)
    for _ in range(2):
        console.print("a")
    assert str(watched.lost) == "[Errno 28] No space left on device"


def test_what_is_shown_is_what_was_printed() -> None:
    stream = io.StringIO()
    watched = streams.Watched(stream)
    print("a", file=watched)
    assert (stream.getvalue(), watched.lost, watched.isatty()) == ("a\n", None, False)
    closed = streams.Watched(None)
    print("a", file=closed, flush=True)
    assert (closed.lost, closed.isatty()) == (None, False)


def test_a_closed_stream_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, ask in (("stdin", streams.standard_input), ("stdout", streams.standard_output)):
        monkeypatch.setattr(sys, name, None)
        with pytest.raises(UserError, match=rf"standard {name[3:]}put is closed"):
            ask()


@pytest.mark.parametrize(("terminal", "bar"), [("xterm", True), ("dumb", False), ("unknown", False)])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(terminal: str, bar: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, _environ={"TERM": terminal})
    with TrainingProgress(console, first_step=10, last_step=50, seconds=None) as progress:
        assert (progress.bar is not None) == bar
        progress.report(RECORD | {"seconds": 10.0})
    shown = console.file.getvalue()
    assert ("step 30/50  epoch 1  loss 2.500" in shown) != bar
