"""Runs that are damaged, edited, incomplete or at work elsewhere: one clear line, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_run import FLAGS, STEPS, pairs, refusal, tfm, write_text

from tfm.checkpoint import Run
from tfm.cli.stopping import alone_in
from tfm.files import LEFT_BEHIND


@pytest.fixture
def run(trained: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of a finished run, to be damaged."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_no_run(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for command in (["translate", missing], ["attend", missing, "oui"], ["train", "--resume", "--out", missing]):
        assert refusal(*command) == f"{missing}: no such run folder"
    assert refusal("translate", tmp_path) == f"{tmp_path}: not a run folder, config.json is missing"


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("model.safetensors", ["translate", "RUN"]),
        ("state.safetensors", ["train", "--resume", "--max-steps", "42", "--out", "RUN"]),
    ],
)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "altered"])
def test_a_damaged_checkpoint(run: Path, name: str, command: list[str], damage: str) -> None:
    path = run / name
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    if damage == "altered":
        data[middle] ^= 1
    path.write_bytes({"truncated": data[:middle], "emptied": b"", "altered": data}[damage])
    before = contents(run)
    message = refusal(*(str(run) if word == "RUN" else word for word in command))
    assert message.startswith(f"{path}: ")
    assert "damaged" in message
    assert contents(run) == before


def test_a_run_without_a_checkpoint_does_not_translate(run: Path) -> None:
    (run / "model.safetensors").unlink()
    assert refusal("translate", run) == f"{run}: no checkpoint yet, model.safetensors is missing"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"model": {}}', b'{"model": {}, "recipe": {}, "training": {}}'],
)
def test_config_garbage(run: Path, content: bytes) -> None:
    path = run / "config.json"
    path.write_bytes(content)
    assert refusal("translate", run).startswith(f"{path}: ")
    assert refusal("train", "--resume", "--out", run).startswith(f"{path}: ")


@pytest.mark.parametrize(("name", "value"), [("heads", 3), ("heads", 0), ("dim", "wide"), ("dropout", None)])
def test_config_values_that_no_model_has(run: Path, name: str, value: Any) -> None:
    path = run / "config.json"
    values = json.loads(path.read_text("utf-8"))
    values["model"][name] = value
    path.write_text(json.dumps(values), encoding="utf-8")
    assert refusal("translate", run).startswith(f"{path}: ")


def test_a_run_that_was_not_made_by_train(run: Path) -> None:
    path = run / "config.json"
    values = json.loads(path.read_text("utf-8"))
    values["training"] = {}
    path.write_text(json.dumps(values), encoding="utf-8")
    assert refusal("train", "--resume", "--out", run).startswith(f"{path}: not written by `tfm train`")


def test_the_tokenizer_of_another_run(run: Path, tmp_path: Path) -> None:
    # As large as the right one, so that the model would take it, and translate into nonsense.
    _, source, _, _ = write_text(tmp_path)
    other = tmp_path / "other"
    flags = [*FLAGS, "--max-steps", "1", "--out", other]
    assert tfm("train", "--source", source, "--target", source, *flags).exit_code == 0
    shutil.copy(other / "tokenizer.json", run)
    message = f"{run / 'tokenizer.json'}: not the tokenizer that the model beside it was trained with"
    assert refusal("translate", run) == message
    assert refusal("train", "--resume", "--out", run) == message


def test_resume_keeps_what_belongs_to_the_run(run: Path) -> None:
    for flag, given, started in (("preset", "tiny", "demo"), ("seed", "2", "1"), ("every", "5", "10")):
        message = refusal("train", "--resume", f"--{flag}", given, "--out", run)
        assert message == f"--{flag} {given}: the run in {run} was started with {started}, and --resume keeps it"
    assert tfm("train", "--resume", "--preset", "demo", "--seed", "1", "--out", run).exit_code == 0


def test_resume_notices_another_text(run: Path, tmp_path: Path) -> None:
    _, source, _, target = write_text(tmp_path)
    lines = [*pairs()[0][:-1], "un autre"]
    Path(source).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    flags = ["--source", source, "--target", target, "--max-steps", "42"]
    message = refusal("train", "--resume", *flags, "--out", run)
    assert message == f"{source} and {target}: not the text that the run in {run} was started with"
    assert Run(run).read_config()[1].max_steps == STEPS


# State and log


def test_a_run_that_lost_its_state_keeps_its_model(run: Path) -> None:
    (run / "state.safetensors").unlink()
    before = contents(run)
    message = refusal("train", "--resume", "--max-steps", STEPS + 2, "--out", run)
    assert message == (
        f"{run / 'state.safetensors'}: missing, though the log records the checkpoint of step {STEPS}: without it the "
        "run cannot go on, and starting again would overwrite its weights; put it back, or train in another folder"
    )
    assert contents(run) == before


@pytest.mark.parametrize("line", ["{}", "[]", "1"])
def test_a_log_that_is_none(run: Path, line: str) -> None:
    with (run / "log.jsonl").open("a") as log:
        log.write(f"{line}\n")
    before = contents(run)
    assert refusal("train", "--resume", "--max-steps", STEPS + 2, "--out", run).startswith(f"{run / 'log.jsonl'}:")
    assert contents(run) == before


def test_another_end_before_where_the_run_stands_is_a_slip(run: Path) -> None:
    before = contents(run)
    message = refusal("train", "--resume", "--max-steps", "1", "--out", run)
    assert message == f"--max-steps 1: the run in {run} is at step {STEPS} already; nothing is changed"
    assert contents(run) == before


# Other processes


@pytest.mark.parametrize("command", [["train", "--resume"], ["train"], ["demo"]], ids=" ".join)
def test_a_folder_in_which_another_trains(run: Path, tmp_path: Path, command: list[str]) -> None:
    text = write_text(tmp_path) if command == ["train"] else []
    before = contents(run)
    with alone_in(run, new=False):
        message = refusal(*command, *text, "--out", run)
    assert message == f"--out {run}: another tfm is training in this folder"
    assert contents(run) == before


def test_what_a_killed_writer_left_is_taken_away(run: Path) -> None:
    left = [folder / LEFT_BEHIND.replace("*", "0") for folder in (run, run / "checkpoints")]
    for path in left:
        path.write_bytes(b"half")
    assert tfm("train", "--resume", "--out", run).exit_code == 0
    assert not any(path.exists() for path in left)


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    missing = tmp_path / "missing"
    for out in (tmp_path / "here", tmp_path / "deep" / "er"):
        message = refusal("train", *FLAGS, "--source", missing, "--target", missing, "--out", out)
        assert message == f"{missing}: no such file"
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
