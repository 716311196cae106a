"""The commands from end to end: what they print and write, how they stop, and that resuming is exact."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from small_run import pairs, start_tfm, tfm

from tfm import native
from tfm.checkpoint import load_model
from tfm.cli.training import BleuTokenizer, Dtype, PresetName
from tfm.config import PRESETS
from tfm.evaluate import TOKENIZERS
from tfm.generate import translate

PNG = b"\x89PNG\r\n\x1a\n"


# Pictures, demo, doctor, and the command itself


def test_attend_draws_the_models_own_translation(trained: tuple[Path, str], tmp_path: Path) -> None:
    sentence, out = pairs()[0][0], tmp_path / "new" / "a.png"
    model, tokenizer = load_model(trained[0])
    result = tfm("attend", trained[0], sentence, "--out", out)
    assert result.stdout == f"{sentence} -> {translate(model, tokenizer, [sentence])[0]}\nwrote {out}\n"
    assert out.read_bytes().startswith(PNG)


def test_plot_positions(tmp_path: Path) -> None:
    out = tmp_path / "p.png"
    assert tfm("plot", "positions", "--dim", "7", "--length", "5", "--out", out).stdout == f"wrote {out}\n"
    assert out.read_bytes().startswith(PNG)


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tfm demo` on little text, for a few updates."""
    from dataclasses import replace

    from tfm import config, demo

    training, held_out = demo.corpus()
    preset = config.PRESETS["demo"]
    small = replace(preset, recipe=replace(preset.recipe, max_steps=2, vocab_size=400))
    monkeypatch.setattr(demo, "corpus", lambda: (training[:200], held_out[:24]))
    monkeypatch.setitem(config.PRESETS, "demo", small)


def test_demo_ends_with_the_models_own_words(small_demo: None, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    for _ in range(2):
        result = tfm("demo", "--out", out, "--threads", "1")
        assert result.exit_code == 0
    model, tokenizer = load_model(out)
    said = translate(model, tokenizer, ["je suis étudiant"])[0]
    assert result.stdout.splitlines()[-1] == f"je suis étudiant -> {said}"
    for phenomenon in ("negation", "relative clauses", "all"):
        assert any(phenomenon in line for line in result.stdout.splitlines())
    assert "translated 24 held-out sentences" in result.stdout
    assert len((out / "held-out.fr").read_text("utf-8").splitlines()) == 24


def test_demo_leaves_other_folders_alone(small_demo: None, trained: tuple[Path, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    for folder in (other, trained[0]):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        result = tfm("demo", "--out", folder)
        assert result.exit_code == 2
        assert "not made by `tfm demo`" in result.stderr
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.triton
def test_doctor_tries_every_backend() -> None:
    result = tfm("doctor")
    assert result.exit_code == 0
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if " on " not in line[:19])
    assert rows["torch"].startswith(torch.__version__)
    assert "instructions" in rows["CPU"]
    tried = {line[:19].strip(): line[19:] for line in result.stdout.splitlines() if " on " in line[:19]}
    assert tried["reference on cpu"].startswith("works (greatest error ")
    if not torch.cuda.is_available():
        # The tests run Triton in its interpreter.
        assert tried["triton on cpu"].startswith("works (greatest error ")
    if native.load()[0] == "":
        assert tried["native on cpu"].startswith("works (greatest error ")
        assert rows["tfm_native"].startswith(f"{native.library()}, kernels for ")
    assert {"ninja", "nvcc"} <= rows.keys()


@pytest.mark.triton
def test_doctor_says_why_a_backend_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from tfm.cli.doctor import try_backend

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    answer = try_backend("triton", torch.device("cpu"))
    assert answer.startswith("not here: CPU tensors need Triton's interpreter")


def test_version_and_help() -> None:
    from tfm import __version__

    assert tfm("--version").stdout == f"tfm {__version__}\n"
    for command in (
        [],
        ["train"],
        ["translate"],
        ["evaluate"],
        ["attend"],
        ["plot", "positions"],
        ["demo"],
        ["build"],
        ["doctor"],
    ):
        assert tfm(*command, "--help").exit_code == 0
    process = start_tfm("--version")
    assert process.communicate()[0].decode() == f"tfm {__version__}\n"


def test_the_commands_load_nothing_slow() -> None:
    slow = {"matplotlib", "sacrebleu", "tokenizers", "triton", "safetensors", "tfm.train", "tfm.config"}
    code = "import sys, tfm.cli; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=Path(__file__).parent.parent).split()
    assert "tfm.cli.training" in loaded
    assert not slow & set(loaded)


def test_flags_offer_what_the_library_takes() -> None:
    assert get_args(PresetName) == tuple(PRESETS)
    assert get_args(BleuTokenizer) == TOKENIZERS
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in get_args(Dtype))
