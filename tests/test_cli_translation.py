"""`tfm translate` and `tfm evaluate` from end to end: a line for each line, and what sacrebleu says of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import sacrebleu
from small_run import complaints, pairs, start_tfm, tfm

from tfm.checkpoint import Run, load_model, load_tensors, save_tensors
from tfm.cli import translation
from tfm.generate import Search, translate
from tfm.tokenizer import EOS


@pytest.fixture(scope="module")
def talkative(trained: tuple[Path, str]) -> Path:
    """The run with a model that never ends a sentence early; a few updates teach most models to say nothing."""
    run = Run(Path(shutil.copytree(trained[0], trained[0].with_name("talkative"))))
    weights, metadata = load_tensors(run.model)
    weights["embedding"][EOS] = 0
    save_tensors(run.model, weights, metadata)
    return run.folder


def test_translate_gives_a_line_for_each_line(talkative: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pairs()[0]
    stdin = f"{source[0]}\r\n\n \t\n{source[1]}\n{'chat ' * 70}\u2028x\n{source[2]}".encode()
    lines = [source[0], "", " \t", source[1], "chat " * 70 + "\u2028x", source[2]]
    model, tokenizer = load_model(talkative)
    expected = translate(model, tokenizer, lines, Search(beam=2))
    for window, size in ((2, 10**9), (translation.WINDOW, 10**9), (translation.WINDOW, 300)):
        monkeypatch.setattr(translation, "WINDOW", window)
        monkeypatch.setattr(translation, "WINDOW_BYTES", size)
        result = tfm("translate", talkative, "--beam", "2", "--threads", "1", stdin=stdin)
        assert result.exit_code == 0
        assert result.stdout_bytes.decode().split("\n") == [*expected, ""]
        assert result.stderr.startswith("tfm: warning: <stdin>:5: ")
        assert result.stderr.endswith(" tokens, only the first 63 are translated\n")
    assert expected[1] == expected[2] == ""
    assert all(expected[i] for i in (0, 3, 4, 5))


@pytest.mark.parametrize(("stdin", "lines"), [(b"", 0), (b"\n", 1), (b"\n\n", 2), (b"\xef\xbb\xbfoui", 1)])
def test_translate_of_little(trained: tuple[Path, str], stdin: bytes, lines: int) -> None:
    result = tfm("translate", trained[0], "--threads", "1", stdin=stdin)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("\n") == lines


def test_a_closed_pipe_ends_quietly(trained: tuple[Path, str], tmp_path: Path) -> None:
    source = tmp_path / "many"
    source.write_text("oui\n" * 3 * translation.WINDOW, encoding="utf-8")
    with source.open("rb") as stdin:
        process = start_tfm("translate", trained[0], "--threads", "1", stdin=stdin)
        assert process.stdout.readline().endswith(b"\n")
        process.stdout.close()
        assert complaints(process.stderr.read()) == []
        assert process.wait() == 1
        process.stderr.close()


def test_evaluate_is_what_sacrebleu_says(talkative: Path, tmp_path: Path) -> None:
    folder, written = talkative.parent, tmp_path / "out.txt"
    texts = ["--source", folder / "valid-source.txt", "--reference", folder / "valid-target.txt"]
    flags = ["--tokenize", "none", "--lowercase", "--translations", written, "--threads", "1"]
    result = tfm("evaluate", talkative, *texts, *flags)
    assert result.exit_code == 0
    found = written.read_text("utf-8").splitlines()
    references = [[line.upper() for line in pairs()[1][:4]]]
    bleu = sacrebleu.BLEU(tokenize="none", lowercase=True, force=True)
    chrf = sacrebleu.CHRF(lowercase=True)
    bleu_score, chrf_score = bleu.corpus_score(found, references).score, chrf.corpus_score(found, references).score
    assert result.stdout == (
        f"BLEU {bleu_score:.2f}  {bleu.get_signature()}\nchrF {chrf_score:.2f}  {chrf.get_signature()}\n"
    )
    assert chrf_score > 0
