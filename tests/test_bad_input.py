"""Each mistake of the user's ends in one clear line on stderr and exit status 2, and costs no checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import FLAGS, complaints, log_of, pairs, refusal, start_tfm, tfm, write_text

from tfm import generate
from tfm.checkpoint import Run, load_model
from tfm.config import PRESETS
from tfm.generate import translate


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten updates; do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    result = tfm("train", *write_text(folder), *FLAGS, "--max-steps", "10", "--out", folder / "run")
    assert result.exit_code == 0, result.stderr
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def usage_error(*arguments: Any) -> str:
    """What typer says of a wrong flag, without its box."""
    result = tfm(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.replace("│", " ").split())


def refused_training(tmp_path: Path, *flags: Any) -> str:
    """A refusal that leaves no folder behind."""
    out = tmp_path / "out"
    message = refusal("train", *FLAGS, "--out", out, *flags)
    assert not out.exists()
    return message


# Text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"un\ndeux\n", "{a} has 2 lines but {b} has 200: expected equally many"),
        (b"un\nd\xe9ux\n", "{a}:2: not valid UTF-8 (byte 0xe9 at column 2)"),
        (b"", "{a}: empty, expected at least one line"),
        (b"\n" * 200, "in every pair of lines a side is blank"),
        (b"\x1f\x8b\x08\x00broken", "{a}: truncated or damaged gzip file"),
        (b"mot " * 70 + b"\n", "none of 1 pairs has at most 64 tokens a side"),
    ],
    ids=["line counts", "not UTF-8", "empty", "blank", "gzip", "too long"],
)
def test_text_that_cannot_be_trained_on(tmp_path: Path, content: bytes, expected: str) -> None:
    write_text(tmp_path)
    a, b = tmp_path / "a.txt", tmp_path / "target.txt"
    a.write_bytes(content)
    if content.startswith(b"mot"):
        b.write_bytes(content)
    assert expected.format(a=a, b=b) in refused_training(tmp_path, "--source", a, "--target", b)


def test_text_that_is_not_there(tmp_path: Path) -> None:
    _, source, _, target = write_text(tmp_path)
    missing = tmp_path / "missing"
    assert refused_training(tmp_path, "--source", missing, "--target", target) == f"{missing}: no such file"
    message = refused_training(tmp_path, "--source", source, "--target", tmp_path)
    assert message == f"{tmp_path}: a directory, expected a text file"
    assert "--source and --target: expected two files" in refused_training(tmp_path, "--source", source)
    flags = ["--source", source, "--target", target, "--valid-source", source]
    assert refused_training(tmp_path, *flags) == "--valid-source and --valid-target: expected both or neither"


def test_vocabulary_sizes(tmp_path: Path) -> None:
    message = refused_training(tmp_path, *write_text(tmp_path), "--vocab-size", "258")
    assert message.startswith("vocabulary size 258 is too small: expected at least 259")
    flags = [*write_text(tmp_path), *FLAGS, "--vocab-size", "50000", "--max-steps", "1", "--out", tmp_path / "run"]
    result = tfm("train", *flags)
    assert result.exit_code == 0
    reached = Run(tmp_path / "run").read_config()[0].vocab_size
    assert f"vocabulary: {reached:,} tokens: the text does not fill the 50,000 asked for\n" in result.stdout
    assert 259 < reached < 5000


def test_a_batch_too_small_for_the_longest_sentence(tmp_path: Path) -> None:
    message = refused_training(tmp_path, *write_text(tmp_path), "--batch-tokens", "5")
    assert message.startswith("a batch of 5 tokens cannot hold the longest sentence: expected at least ")


def test_undecodable_stdin_names_its_line(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfm.cli.translation.WINDOW", 2)
    result = tfm("translate", trained, "--threads", "1", stdin=b"oui\nnon\nun\ndeux \xff\n")
    assert result.exit_code == 2
    assert result.stderr == "tfm: error: <stdin>:4: not valid UTF-8 (byte 0xff at column 6)\n"
    # What came before the bad window is not lost.
    assert result.stdout.count("\n") == 2


def test_evaluate_needs_as_many_references(trained: Path, tmp_path: Path) -> None:
    _, source, _, target = write_text(tmp_path)
    Path(target).write_text("one\n", encoding="utf-8")
    message = refusal("evaluate", trained, "--source", source, "--reference", target)
    assert message == f"{source} has 200 lines but {target} has 1: expected equally many"


def test_attend_needs_a_sentence_that_fits(trained: Path, tmp_path: Path) -> None:
    assert refusal("attend", trained, " ") == "the sentence is blank"
    message = refusal("attend", trained, "oui", "--translation", "x " * 70, "--out", tmp_path / "a.png")
    assert message.startswith("the translation has ")
    assert message.endswith(" tokens, the model takes at most 63")
    assert not (tmp_path / "a.png").exists()


# Flags


def test_an_out_that_holds_something(tmp_path: Path, run: Path) -> None:
    flags = [*write_text(tmp_path), *FLAGS]
    before = log_of(run)
    message = refusal("train", *flags, "--out", run)
    assert message == f"--out {run}: not empty; give --resume to continue the run in it, or another folder"
    assert log_of(run) == before
    a_file = tmp_path / "source.txt"
    assert refusal("train", *flags, "--out", a_file) == f"--out {a_file}: a file, expected a folder"
    below = a_file / "run"
    assert refusal("train", *flags, "--out", below) == f"{below}: Not a directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_an_out_that_cannot_be_written(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    message = refusal("train", *write_text(tmp_path), *FLAGS, "--out", closed / "run")
    assert message == f"{closed / 'run'}: Permission denied"


def test_an_output_that_cannot_be_written_is_found_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out, missing = tmp_path / "file" / "p.png", tmp_path / "missing"
    for command in (
        ["plot", "positions", "--length", "9" * 12, "--out", out],
        ["attend", missing, "oui", "--out", out],
        ["evaluate", missing, "--source", missing, "--reference", missing, "--translations", out],
    ):
        assert refusal(*command) == f"{out}: cannot be written (Not a directory)"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that root cannot write into")
def test_a_run_that_cannot_be_written_is_found_before_any_work(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for command in (["train", "--source", missing, "--target", missing], ["demo"]):
        assert refusal(*command, "--out", "/proc/run") == "/proc/run: No such file or directory"


def test_a_full_disk_leaves_the_score(trained: Path, tmp_path: Path) -> None:
    _, source, _, target = write_text(tmp_path)
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    texts = ["--source", source, "--reference", target, "--threads", "1"]
    result = tfm("evaluate", trained, *texts, "--translations", full)
    assert result.exit_code == 2
    assert result.stdout.startswith("BLEU ")
    assert result.stderr == f"tfm: error: {full}: cannot be written (No space left on device)\n"
    assert full.is_char_device()


@pytest.mark.parametrize(
    ("stdin", "beam", "expected"),
    [
        (b"oui\n", 10**12, "a beam of 1,000,000,000,000 for 1 sentences at once needs 2.8 PiB of memory, and "),
        (b"oui\n" + b"a" * 2**20 + b"b\n", 1, "<stdin>:2: more than 1,048,576 bytes without a line break"),
    ],
    ids=["beam", "line"],
)
def test_what_no_memory_holds(trained: Path, stdin: bytes, beam: int, expected: str) -> None:
    assert refusal("translate", trained, "--beam", str(beam), stdin=stdin).startswith(expected)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(trained: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        process = start_tfm("translate", trained, stdin=subprocess.PIPE, stdout=full)
        _, stderr = process.communicate(b"oui\n")
    assert process.returncode == 2
    assert complaints(stderr) == ["tfm: error: No space left on device"]


def test_an_unknown_preset_is_told_which_there_are() -> None:
    message = usage_error("train", "--out", "x", "--preset", "huge")
    assert "Invalid value for '--preset'" in message
    assert all(name in message for name in PRESETS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_where_there_is_none(tmp_path: Path, trained: Path) -> None:
    message = refused_training(tmp_path, *write_text(tmp_path), "--device", "cuda")
    assert message == f"--device cuda: torch {torch.__version__} finds no CUDA device here"
    assert refusal("translate", trained, "--device", "cuda") == message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["translate", "x", "--beam", "0"], "Invalid value for '--beam'"),
        (["train"], "Missing option '--out'"),
        (["train", "--out", "x", "--dropout", "2"], "Invalid value for '--dropout'"),
        (["train", "--out", "x", "--device", "tpu"], "Invalid value for '--device'"),
        (["train", "--out", "x", "--dtype", "int8"], "Invalid value for '--dtype'"),
        (["train", "--out", "x", "--warmup", "0"], "Invalid value for '--warmup'"),
        (["train", "--out", "x", "--seed", "9" * 20], "Invalid value for '--seed'"),
        (["train", "--out", "x", "--threads", "100000"], "Invalid value for '--threads'"),
        (["train", "--out", "x", "--vocab-size", "9" * 20], "Invalid value for '--vocab-size'"),
        (["translat"], "No such command 'translat'"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_wrong_flags(arguments: list[str], expected: str) -> None:
    assert expected in usage_error(*arguments)


# While it runs


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(run: Path) -> None:
    model, tokenizer = load_model(run)
    before = translate(model, tokenizer, pairs()[0][:3])
    path = run / "config.json"
    values = json.loads(path.read_text("utf-8"))
    values["recipe"]["learning_rate"] = 1e30
    path.write_text(json.dumps(values), encoding="utf-8")
    message = refusal("train", "--resume", "--max-steps", "20", "--out", run)
    assert message == (
        "the loss or its gradient is not finite at step 12: training stopped, the checkpoint of step 10 is kept"
    )
    model, tokenizer = load_model(run)
    assert translate(model, tokenizer, pairs()[0][:3]) == before
    assert [path.name for path in Run(run).checkpoints()] == ["step-00000010.safetensors"]


def test_a_loss_that_is_not_finite_before_any_checkpoint(tmp_path: Path) -> None:
    flags = ["--learning-rate", "1e30", "--warmup", "1", "--log-every", "4"]
    message = refusal("train", *write_text(tmp_path), *FLAGS, *flags, "--out", tmp_path / "run")
    assert message == "the loss or its gradient is not finite at step 2: training stopped, no checkpoint yet"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_out_of_memory_comes_with_advice(error: Exception, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> list[str]:
        raise error

    monkeypatch.setattr(generate, "translate", too_large)
    message = refusal("translate", trained, stdin=b"oui\n")
    assert message == "out of memory: try a lower --beam or --batch-tokens"


def test_a_bug_keeps_its_traceback(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> list[str]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(generate, "translate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        tfm("translate", trained, stdin=b"oui\n")


def test_ctrl_c_is_no_traceback(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "translate", interrupted)
    result = tfm("translate", trained, stdin=b"oui\n")
    assert (result.exit_code, result.stderr) == (130, "tfm: interrupted\n")
