"""What cannot fit into memory is refused by its name: how much is left, and who asks."""

from __future__ import annotations

import gzip
import io
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from samples import small_model

from tfm import memory
from tfm.data import lines_of, read_lines, split_lines, text
from tfm.errors import UserError
from tfm.generate import Search, translate
from tfm.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
MIB = 2**20


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 8 MiB left, which hold 2 MiB of text."""
    monkeypatch.setattr(memory, "_of_machine", lambda: 8 * MIB)
    monkeypatch.setattr(text, "PIECE", MIB // 2)


def test_a_machine_has_some_memory() -> None:
    assert MIB < memory.available() < 2**50


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    free = memory.available()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    assert memory.available() > free / 2
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.available() == 5000 - 3000 + 500
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.available() == 0


def test_ulimit_counts() -> None:
    # The module alone: torch takes more than the limit.
    program = "import sys; sys.path.insert(0, 'tfm'); import memory; print(memory.available())"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))

    command = [sys.executable, "-c", program]
    found = int(subprocess.run(command, cwd=ROOT, preexec_fn=limit, stdout=subprocess.PIPE, check=True).stdout)
    assert 0 < found < 2**31


@pytest.mark.parametrize(
    ("size", "words"),
    [(5, "5 bytes"), (1024, "1.0 KiB"), (3 * 2**30, "3.0 GiB"), (10**400, "888,178,419,700,125.2 PiB")],
)
def test_sizes_in_words(size: int, words: str) -> None:
    assert memory.readable(size) == words


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_text_beyond_memory_is_told(little: None, tmp_path: Path, pack: type[bytes]) -> None:
    path = tmp_path / "x"
    path.write_bytes(pack(b"a line of text\n" * 150_000))
    with pytest.raises(UserError, match=rf"^{path}: more than 2.0 MiB of text: too large for this machine's memory$"):
        read_lines(path)
    path.write_bytes(pack(b"a line of text\n" * 100_000))
    assert len(read_lines(path)) == 100_000


def test_what_python_cannot_hold_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bytes:
        raise MemoryError

    (tmp_path / "x").write_bytes(b"a\n")
    monkeypatch.setattr(text, "_contents", full)
    with pytest.raises(UserError, match=r"x: too large for the memory of this machine$"):
        read_lines(tmp_path / "x")


@pytest.mark.parametrize("letter", ["a", "é", "☃"])
def test_a_line_that_is_no_sentence_is_told(letter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "LONGEST_LINE", 12)
    longest = letter * (12 // len(letter.encode()))
    data = f"{longest}\n{longest}\nx\n".encode()
    assert split_lines(data, "name") == [longest, longest, "x"]
    message = "name:3: more than 12 bytes without a line break, expected one sentence a line"
    with pytest.raises(UserError, match=f"^{message}$"):
        split_lines(f"{longest}\nx\n{longest}{letter}".encode(), "name")


def test_a_stream_without_a_line_break_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "LONGEST_LINE", 12)
    assert list(lines_of(io.BytesIO(b"a" * 11 + b"\nb"), "name")) == [b"a" * 11 + b"\n", b"b"]
    stream = io.BytesIO(b"x\n" + b"a" * 1000)
    lines = lines_of(stream, "name")
    assert next(lines) == b"x\n"
    with pytest.raises(UserError, match=r"^name:2: more than 12 bytes"):
        next(lines)
    assert stream.tell() == 15


def test_a_beam_beyond_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and probabilities of 3 sentences: 2 x 3 x beam x 280 tokens x 4 bytes."""
    tokenizer = Tokenizer.train(["un deux trois"] * 3, 280)
    model = small_model(vocab_size=tokenizer.vocab_size).float().eval()
    monkeypatch.setattr(memory, "_of_machine", lambda: 2 * 3 * 5 * tokenizer.vocab_size * 4)
    assert len(translate(model, tokenizer, ["un", "deux", "trois"], Search(beam=5))) == 3
    with pytest.raises(UserError, match=r"a beam of 6 for 3 sentences at once needs .* KiB of memory, and .* are left"):
        translate(model, tokenizer, ["un", "deux", "trois"], Search(beam=6))
    with pytest.raises(UserError, match="a beam of 1,000,000,"):
        translate(model, tokenizer, ["un"], Search(beam=10**30))
