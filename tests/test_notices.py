"""What commands read, and what they say beside their results: missing kernels, tokenizers that cannot cut, fonts."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import FLAGS, pairs, tfm, write_text

from tfm import native
from tfm.cli import devices
from tfm.fonts import fonts_for
from tfm.native import recipe, toolchain


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten updates; do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    result = tfm("train", *write_text(folder), *FLAGS, "--max-steps", "10", "--out", folder / "run")
    assert result.exit_code == 0, result.stderr
    return folder / "run"


def raise_no_ninja() -> str:
    raise recipe.BuildError("no ninja")


def test_missing_kernels_are_told_once(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_unavailable", lambda device: "tfm_native is not built: `tfm build` compiles it")
    monkeypatch.setattr(toolchain, "ninja", raise_no_ninja)
    devices.say_what_is_missing.cache_clear()
    first, second = (tfm("translate", trained, "--threads", "1", stdin=b"oui\n") for _ in range(2))
    assert first.stderr == (
        "tfm: note: slower than it could be, on the reference in plain torch: tfm_native is not built: `tfm build` "
        "compiles it, which needs more first: no ninja\n"
    )
    assert (first.stdout, second.stderr) == (second.stdout, "")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_translate_reads_compressed_lines(trained: Path, pack: Callable[[bytes], bytes]) -> None:
    lines = "".join(f"{line}\n" for line in pairs()[0][:3]).encode()
    plain, packed = (tfm("translate", trained, "--threads", "1", stdin=stdin) for stdin in (lines, pack(lines)))
    assert packed.exit_code == 0
    assert packed.stdout == plain.stdout
    broken = tfm("translate", trained, "--threads", "1", stdin=pack(lines)[:-9])
    assert broken.exit_code == 2
    assert broken.stderr.startswith("tfm: error: <stdin>: truncated or damaged ")


def test_bleu_that_cannot_work_is_told(trained: Path, tmp_path: Path) -> None:
    source, reference = tmp_path / "source", tmp_path / "reference"
    source.write_text("".join(f"{line}\n" for line in pairs()[0][:2]), "utf-8")
    reference.write_text("我喜欢你的猫。\n两个男人站在花园里。\n", "utf-8")
    texts = ["--source", source, "--reference", reference, "--threads", "1"]
    warning = "tfm: warning: the references are Chinese, which tokenizer 13a does not cut into words"
    assert tfm("evaluate", trained, *texts).stderr.startswith(warning)
    fitting = tfm("evaluate", trained, *texts, "--tokenize", "zh")
    assert (fitting.exit_code, fitting.stderr) == (0, "")
    assert "|tok:zh|" in fitting.stdout
    validation = ["--valid-source", source, "--valid-target", reference, "--max-steps", "1"]
    trained_on = tfm("train", *write_text(tmp_path), *FLAGS, *validation, "--out", tmp_path / "run")
    assert trained_on.stderr.startswith(warning)
    assert trained_on.exit_code == 0


def test_attend_names_the_font_that_is_missing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", list)
    fonts_for.cache_clear()
    unknown = "\U0001e900"  # Adlam
    result = tfm("attend", trained, f"oui {unknown}", "--translation", "yes", "--out", tmp_path / "a.svg")
    assert result.stderr == (
        "tfm: warning: no installed font has every character, boxes stand for the others: install Noto Sans Adlam for "
        f"{unknown} (on Debian: fonts-noto-core)\n"
    )
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    refused = tfm("attend", trained, "oui", "--out", tmp_path / "a.jpg")
    assert refused.exit_code == 2
    assert refused.stderr == f"tfm: error: {tmp_path / 'a.jpg'}: expected a name that ends in .png, .pdf, .svg\n"
    assert not (tmp_path / "a.jpg").exists()
