"""`tfm train` from end to end: what it prints and writes, how it stops, and that resuming is exact."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from small_run import (
    FLAGS,
    STEPS,
    log_of,
    losses,
    pairs,
    refusal,
    start_tfm,
    tfm,
    validation_flags,
    weights_of,
    write_text,
)

from tfm.checkpoint import Run, load_model, load_tensors
from tfm.cli import runs
from tfm.cli.stopping import pasted
from tfm.cli.streams import Lines
from tfm.train import Training

PNG = b"\x89PNG\r\n\x1a\n"


def raise_signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    update = Training._update

    def raising(self: Training, batch: Any) -> Any:
        result = update(self, batch)
        if self.step == step:
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(Training, "_update", raising)


# train


def test_train_tells_what_it_reads_and_learns(trained: tuple[Path, str]) -> None:
    run, printed = trained
    assert "read 200 pairs" in printed
    assert "read 4 pairs" in printed
    assert "vocabulary: 400 tokens\n" in printed
    assert f"step {STEPS}/{STEPS}  epoch 2  loss " in printed
    assert "tokens/s" in printed
    assert f"validation at step {STEPS}: loss " in printed
    assert printed.count(f"source       {pairs()[0][0]}\n") == STEPS // 10
    assert printed.count("    translation  ") == 3 * STEPS // 10
    assert f"tfm translate {run}" in printed
    assert losses(run)[-1][1] < 0.9 * losses(run)[0][1]


def test_a_run_holds_its_files_and_no_others(trained: tuple[Path, str]) -> None:
    run, _ = trained
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    tensors = {"state.safetensors", "model.safetensors", f"checkpoints/step-{STEPS:08}.safetensors"}
    assert files == {"config.json", "paths.json", "tokenizer.json", "log.jsonl", "loss.png"} | tensors
    assert (run / "loss.png").read_bytes().startswith(PNG)


def test_train_counts_blank_and_long_pairs(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("le chien\n\n" + "chat " * 80 + "\nla rue\n", encoding="utf-8")
    target.write_text("the dog\nnothing\nmany cats\nthe street\n", encoding="utf-8")
    flags = ["--source", source, "--target", target, *FLAGS, "--max-steps", "1", "--out", tmp_path / "run"]
    result = tfm("train", *flags)
    assert result.exit_code == 0
    assert "read 3 pairs" in result.stdout
    assert "dropped 1 with a blank side" in result.stdout
    assert "skipped 1 pairs with a side of more than 64 tokens" in result.stdout
    assert "the text does not fill the 400 asked for" in result.stdout


def test_time_ends_training_with_a_checkpoint(tmp_path: Path) -> None:
    flags = [*write_text(tmp_path), *FLAGS, "--dtype", "bfloat16", "--norm-first"]
    result = tfm("train", *flags, "--minutes", "0", "--out", tmp_path / "run")
    assert result.exit_code == 0
    assert "time is up at step 1;" in result.stdout
    model, _ = load_model(tmp_path / "run")
    assert model.config.norm_first


def test_averaging_keeps_and_averages_the_last_checkpoints(tmp_path: Path) -> None:
    flags = ["--average", "2", "--every", "2", "--max-steps", "6"]
    assert tfm("train", *write_text(tmp_path), *FLAGS, *flags, "--out", tmp_path / "run").exit_code == 0
    run = Run(tmp_path / "run")
    assert [path.name for path in run.checkpoints()] == ["step-00000004.safetensors", "step-00000006.safetensors"]
    first, last = (load_tensors(path)[0] for path in run.checkpoints())
    for name, tensor in load_tensors(run.model)[0].items():
        assert torch.equal(tensor, ((first[name].double() + last[name].double()) / 2).float())
    assert not torch.equal(first["embedding"], last["embedding"])


# Stopping and resuming


@pytest.fixture(autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """A shell starts what runs in its background deaf to SIGINT, these tests too."""
    before = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGHUP, signal.SIGTERM)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=str
)
def test_a_signal_saves_and_resume_repeats_nothing(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    run = tmp_path / "run"
    handler = signal.getsignal(number)
    raise_signal_at(monkeypatch, 13, number)
    result = tfm("train", *write_text(tmp_path), *validation_flags(tmp_path), *FLAGS, "--out", run)
    assert result.exit_code == status
    assert result.stderr == (
        f"tfm: stopped by {signal.Signals(number).name} at step 13, saved; "
        f"continue with: tfm train --resume --out {run}\n"
    )
    assert signal.getsignal(number) is handler
    assert load_tensors(run / "state.safetensors")[1]["step"] == 13
    # The process was told to go: it does not stay to validate.
    assert [record["step"] for record in log_of(run) if record["event"] == "validation"] == [10]
    monkeypatch.undo()
    result = tfm("train", "--resume", "--out", run)
    assert result.exit_code == 0
    assert "resuming at step 13" in result.stdout
    assert losses(run) == losses(trained[0])
    assert weights_of(run) == weights_of(trained[0])


def test_a_killed_run_resumes_to_the_same_bits(trained: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*write_text(tmp_path), *validation_flags(tmp_path), *FLAGS]
    process = start_tfm("train", *flags, "--out", run, stdout=subprocess.DEVNULL)
    log = run / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and '"step": 12,' in log.read_text("utf-8")):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    # As long as it lives nobody else trains there; then it leaves no lock behind.
    process.send_signal(signal.SIGSTOP)
    assert refusal("train", "--resume", "--out", run) == f"--out {run}: another tfm is training in this folder"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert losses(run)[-1][0] < STEPS
    assert tfm("train", "--resume", "--out", run).exit_code == 0
    assert log_of(run) == log_of(trained[0])
    assert weights_of(run) == weights_of(trained[0])


def short_run(tmp_path: Path) -> list[str | Path]:
    return ["train", *write_text(tmp_path), *FLAGS, "--max-steps", "8", "--out", tmp_path / "a run"]


@pytest.mark.parametrize(
    ("numbers", "status", "said"),
    [
        ((signal.SIGHUP, signal.SIGHUP), 129, "stopped by SIGHUP at step 5, saved"),
        ((signal.SIGTERM, signal.SIGHUP), 143, "stopped by SIGTERM at step 5, saved"),
        ((signal.SIGHUP, signal.SIGTERM), 143, "stopped by SIGTERM at step 5, saved"),
        ((signal.SIGINT, signal.SIGINT), 130, "interrupted"),
        ((signal.SIGTERM, signal.SIGINT), 130, "interrupted"),
    ],
    ids=lambda value: " ".join(number.name for number in value) if isinstance(value, tuple) else "",
)
def test_a_second_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: tuple[signal.Signals, ...], status: int, said: str
) -> None:
    """A terminal that goes sends SIGHUP from the shell and from the system; who presses Ctrl-C twice means it."""
    for number in numbers:
        raise_signal_at(monkeypatch, 5, number)
    result = tfm(*short_run(tmp_path))
    assert result.exit_code == status
    assert result.stderr.startswith(f"tfm: {said}")
    assert (tmp_path / "a run" / "state.safetensors").exists() == said.startswith("stopped")


def test_nohup_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise_signal_at(monkeypatch, 5, signal.SIGHUP)
    result = tfm(*short_run(tmp_path))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith(f"done at step 8; translate with: tfm translate '{tmp_path}/a run' < INPUT\n")
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_reader_that_goes_ends_training_with_a_checkpoint(tmp_path: Path) -> None:
    """As `tfm train | head -4`."""
    process = start_tfm(*short_run(tmp_path), "--max-steps", "5000")
    for _ in range(4):
        assert process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read().decode()
    assert process.wait() == 128 + signal.SIGPIPE
    process.stderr.close()
    step = load_tensors(tmp_path / "a run" / "state.safetensors")[1]["step"]
    assert stderr == (
        f"tfm: stopped by its output (Broken pipe) at step {step}, saved; "
        f"continue with: tfm train --resume --out '{tmp_path}/a run'\n"
    )


class Lost(io.StringIO):
    """A terminal that hangs up after some lines."""

    def write(self, text: str) -> int:
        if self.getvalue().count("\n") >= 5:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("hung_up", [True, False], ids=["SIGHUP", "no signal"])
def test_a_terminal_that_goes_does_not_take_the_checkpoint_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hung_up: bool
) -> None:
    write_text(tmp_path)
    texts = runs.Texts(tmp_path / "source.txt", tmp_path / "target.txt")
    given = runs.Given("demo", recipe={"vocab_size": 400, "batch_tokens": 256}, texts=texts, options={"log_every": 1})
    if hung_up:
        raise_signal_at(monkeypatch, 3, signal.SIGHUP)
    monkeypatch.setattr("sys.stdout", Lost())
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with pytest.raises(typer.Exit) as raised:
        runs.start(Lines(), tmp_path, given, command="train")
    assert raised.value.exit_code == (129 if hung_up else 2)
    said = "stopped by SIGHUP" if hung_up else "stopped by its output (Input/output error)"
    assert sys.stderr.getvalue().startswith(f"tfm: {said} at step 3, saved; continue with: ")
    assert load_tensors(tmp_path / "state.safetensors")[1]["step"] == 3


# Names


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    "name", [b"a b", b"-x", b"caf\xe9", "größe".encode(), b"it's\n\\", b"$HOME", b"plain"], ids=ascii
)
def test_a_pasted_path_is_the_path(name: bytes) -> None:
    printed = subprocess.run(["bash", "-c", f"printf %s {pasted(Path(os.fsdecode(name)))}"], stdout=subprocess.PIPE)
    assert printed.stdout.removeprefix(b"./") == name
    assert not printed.stdout.startswith(b"-")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    flags = ["train", *write_text(folder), *FLAGS, "--max-steps", "1", "--out", folder / "run"]
    process = start_tfm(*flags)
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, b"")
    assert stdout.endswith(f"translate with: tfm translate $'{tmp_path}/caf\\xe9/run' < INPUT\n".encode())
    model, tokenizer = load_model(folder / "run")
    assert model.config.vocab_size == tokenizer.vocab_size
    described = Run(folder / "run").read_config()[2]
    assert runs.read_started(Run(folder / "run"), described)[2].source == folder / "source.txt"
