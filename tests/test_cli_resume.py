"""`tfm train --resume`: what it goes on from, what it asks for, and what it says it changes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import FLAGS, STEPS, log_of, losses, refusal, tfm, write_text

from tfm.checkpoint import Run
from tfm.train import Training


@pytest.fixture
def run(trained: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


class Died(Exception):
    """Stands for the end of the process."""


def test_a_run_without_a_checkpoint_starts_again(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def die(self: Training) -> None:
        raise Died

    monkeypatch.setattr(Training, "save", die)
    with pytest.raises(Died):
        tfm("train", *write_text(tmp_path), *FLAGS, "--out", run)
    assert losses(run)[-1][0] == 10
    monkeypatch.undo()
    result = tfm("train", "--resume", "--out", run)
    assert result.exit_code == 0
    assert "no checkpoint was written yet: starting again from step 0 with the same seed, 1" in result.stdout
    assert losses(run) == losses(trained[0])


def test_resume_of_a_finished_run_goes_on_only_to_another_end(trained: tuple[Path, str], tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    before = log_of(run)
    result = tfm("train", "--resume", "--out", run)
    assert result.exit_code == 0
    assert f"done already, at step {STEPS} of {STEPS}" in result.stdout
    assert log_of(run) == before
    assert tfm("train", "--resume", "--max-steps", STEPS + 2, "--out", run).exit_code == 0
    assert losses(run)[-1][0] == STEPS + 2
    assert Run(run).read_config()[1].max_steps == STEPS + 2


def test_resume_finds_the_same_text_elsewhere(trained: tuple[Path, str], tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    flags = write_text(tmp_path)
    assert tfm("train", "--resume", *flags, "--max-steps", STEPS + 1, "--out", run).exit_code == 0
    assert json.loads((run / "paths.json").read_text())["source"] == Path(flags[1]).as_uri()


def test_config_tells_nobody_where_the_text_lies(run: Path) -> None:
    assert str(run.parent.parent) not in (run / "config.json").read_text()
    (run / "paths.json").unlink()
    message = refusal("train", "--resume", "--out", run)
    assert message == f"{run}: the location of its text is not recorded; give --source and --target"


def test_a_run_whose_config_has_the_paths_goes_on_without(trained: tuple[Path, str], run: Path) -> None:
    config, text = run / "config.json", trained[0].parent
    values = json.loads(config.read_text("utf-8"))
    paths = {name: str(text / f"{name}.txt") for name in ("source", "target")}
    values["training"] |= paths | {"valid_source": None, "valid_target": None}
    config.write_text(json.dumps(values), "utf-8")
    (run / "paths.json").unlink()
    assert tfm("train", "--resume", "--max-steps", STEPS + 1, "--out", run).exit_code == 0
    assert str(text) not in config.read_text("utf-8")
    assert json.loads((run / "paths.json").read_text())["target"] == Path(paths["target"]).as_uri()


def test_another_end_is_told_with_what_it_does_to_the_learning_rate(run: Path) -> None:
    config, recipe, training = Run(run).read_config()
    result = tfm("train", "--resume", "--max-steps", STEPS + 2, "--out", run)
    assert result.stdout.startswith(
        f"the run ends at step {STEPS + 2}, not {STEPS}; --max-steps changes that again\n"
        "its learning rate falls to 0 by that step: the next update is made at 0.000615, not 0\n"
    )
    longer = replace(recipe, max_steps=STEPS + 2)
    assert longer.learning_rate_at(STEPS + 1) == pytest.approx(0.000615, rel=2e-3)
    Run(run).write_config(config, replace(longer, schedule="inverse_sqrt"), training)
    result = tfm("train", "--resume", "--max-steps", STEPS + 3, "--out", run)
    assert result.stdout.startswith(f"the run ends at step {STEPS + 3}, not {STEPS + 2}; ")
    assert "learning rate" not in result.stdout


def test_a_stored_slip_is_mended_by_the_next_call(run: Path) -> None:
    config, recipe, training = Run(run).read_config()
    Run(run).write_config(config, replace(recipe, max_steps=1), training)
    result = tfm("train", "--resume", "--out", run)
    assert f"done already, at step {STEPS} of 1; --max-steps sets another end" in result.stdout
    assert tfm("train", "--resume", "--max-steps", STEPS + 1, "--out", run).exit_code == 0
    assert losses(run)[-1][0] == STEPS + 1
    assert Run(run).read_config()[1] == replace(recipe, max_steps=STEPS + 1)
