"""What a record says of the machine and of the sources."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from benchmarks import record

ROOT = Path(record.ROOT)


def test_sources_are_every_kernel_file():
    found = record.sources()
    assert set(found) == {
        str(path.relative_to(ROOT))
        for folder in ("kernels", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert found["kernels/philox.py"] == hashlib.sha256((ROOT / "kernels" / "philox.py").read_bytes()).hexdigest()


def test_a_commit_that_is_given_is_taken(monkeypatch):
    monkeypatch.setenv("COMMIT", "1234abcd")
    assert record.environment(torch.device("cpu"))["commit"] == "1234abcd"


def test_a_copy_without_history_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    found = record.environment(torch.device("cpu"))
    assert found["commit"] is None
    assert found["uncommitted_changes"] is None


def test_what_is_absent_is_none(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(record, "PACKAGES", ("pytest", "no-such-package"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    found = record.environment(torch.device("cpu"))
    assert found["pytest"]
    assert found["no-such-package"] is None
    assert found["gpu"] is None
    assert record.last_line("no-such-tool") is None
