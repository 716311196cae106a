"""The last part of `make gpu`: what the time that is left teaches, and how much of it that was."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import pairs

from benchmarks.bench_training import parse
from benchmarks.timed_training import Task, TimedTraining, learns
from tfm.config import PRESETS
from tfm.data import ParallelText, encode_parallel
from tfm.tokenizer import Tokenizer
from tools.gpu import child
from tools.gpu.quality import LOADING, REHEARSED_UPDATES, TRANSLATING, quality
from tools.gpu.run import Options, Run

SENTENCES = 60


def a_run(folder: Path, **options: Any) -> Run:
    given = {"out": folder / "record.json", "suites": ("training",), "minutes": 9, "rehearse": True} | options
    return Run(Options(**given), folder, started=time.perf_counter())


@pytest.fixture
def data(tmp_path) -> Path:
    """A few sentences in files named as Multi30k's."""
    folder = tmp_path / "data"
    folder.mkdir()
    for part, count in (("train", SENTENCES), ("val", 3), ("test_2016_flickr", 2)):
        for language, lines in zip(("en", "de"), pairs(), strict=True):
            with gzip.open(folder / f"{part}.lc.norm.tok.{language}.gz", "wt", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines[:count])
    return folder


def test_a_few_updates_and_their_bleu(data, tmp_path):
    run = a_run(tmp_path, data=data)
    state, reason = quality(run, 300.0)
    assert state == "done", (reason, run.commands[0].text())
    (learnt,) = run.record["quality"]["quality"]
    assert (learnt["contender"], learnt["updates"]) == ("tfm-bf16", REHEARSED_UPDATES)
    assert run.record["quality"]["arguments"]["updates"] == REHEARSED_UPDATES
    assert run.record["quality"]["corpus"] == "multi30k"
    assert learnt["seconds"] > 0
    assert learnt["epochs"] > 0
    assert learnt["points"][-1]["step"] == REHEARSED_UPDATES
    assert [len(learnt[part]["samples"]) for part in ("validation", "test")] == [3, 2]
    assert f"{REHEARSED_UPDATES} updates; " in reason
    assert f"BLEU {learnt['validation']['bleu']:.1f} on the validation set" in reason


def test_what_does_not_fit_is_said(data, tmp_path, monkeypatch):
    assert quality(a_run(tmp_path), 300.0) == ("missing", "BLEU needs real text: --data names none")
    run = a_run(tmp_path, data=data, rehearse=False)
    assert quality(run, LOADING + TRANSLATING) == (
        "out of time",
        "60 s are left; loading and translating alone take 60",
    )
    score = {"bleu": 12.34}
    learnt = {"updates": 5120, "epochs": 85.3, "seconds": 60.0, "validation": score, "test": score}

    def trained(command: child.Command, seconds: float) -> child.End:
        words = dict(zip(command.words[3::2], command.words[4::2], strict=True))
        assert float(words["--minutes"]) == pytest.approx((seconds - LOADING - TRANSLATING) / 60)
        assert words["--updates"] == str(PRESETS["tiny"].recipe.max_steps) == "8000"
        Path(words["--out"]).write_text(json.dumps({"quality": [learnt]}))
        return child.End(0, seconds, "")

    monkeypatch.setattr(child, "run_one", trained)
    assert quality(run, 110.0) == (
        "out of time",
        "5,120 of 8,000 updates fitted; 85.3 epochs in 60 s; BLEU 12.3 on the validation set, 12.3 on the test set",
    )


@pytest.mark.parametrize(("limits", "done"), [((0.0, 2), 0), ((1e9, 2), 2)])
def test_a_training_ends_at_the_first_of_its_limits(limits, done, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.timed_training.SECONDS_PER_LINE", 0.0)
    text = ParallelText(*(lines[:SENTENCES] for lines in pairs()))
    tokenizer = Tokenizer.train(text.source + text.target, 300)
    config, recipe = PRESETS["tiny"].config(tokenizer.vocab_size, dim=16, heads=2, ffn_dim=16), PRESETS["tiny"].recipe
    task = Task(text, text, text, tokenizer, config, recipe, encode_parallel(text, tokenizer, config.max_length))
    training = TimedTraining("tfm", task, torch.device("cpu"), seed=1)
    assert training.run_for(*limits)["updates"] == done == training.step
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.partition(" s: ")[2].partition(",")[0] for line in said.err.splitlines()] == [
        f"{update} updates" for update in range(1, done + 1)
    ]


def test_updates_alone_are_a_limit(capsys):
    assert (parse([]).minutes, parse([]).updates) == (20.0, None)
    alone = parse(["--updates", "8000"])
    assert (alone.minutes, alone.updates) == (None, 8000)
    assert learns(alone)
    assert not learns(parse(["--minutes", "0"]))
    with pytest.raises(SystemExit):
        parse(["--updates", "0"])
    assert "expected a positive number, got '0'" in capsys.readouterr().err
