"""A few sentences of the bundled corpus, and a run that learns them in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tfm.checkpoint import load_tensors
from tfm.cli import app
from tfm.demo import corpus

PAIRS = 200
STEPS = 20
FLAGS = (
    "--preset demo --vocab-size 400 --batch-tokens 256 --warmup 10 --every 10 --log-every 1 --dropout 0.1 "
    f"--max-length 64 --max-steps {STEPS} --threads 1 --device cpu"
).split()


@cache
def pairs() -> tuple[list[str], list[str]]:
    """French and English lines."""
    training = corpus()[0][:PAIRS]
    return [pair.source for pair in training], [pair.target for pair in training]


def write_text(folder: Path) -> list[str]:
    """Writes the text, and gives the flags that name it."""
    flags = []
    for name, lines in zip(("source", "target"), pairs(), strict=True):
        path = folder / f"{name}.txt"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        flags += [f"--{name}", str(path)]
    return flags


def validation_flags(folder: Path) -> list[str]:
    flags = []
    for name, lines in zip(("source", "target"), pairs(), strict=True):
        path = folder / f"valid-{name}.txt"
        path.write_text("".join(f"{line}\n" for line in lines[:4]), encoding="utf-8")
        flags += [f"--valid-{name}", str(path)]
    return flags


def tfm(*arguments: str | Path, stdin: bytes = b"") -> Any:
    """The command in this process: exit_code, stdout, stderr. A bug raises what it raised."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, catch_exceptions=False)


def refusal(*arguments: str | Path, stdin: bytes = b"") -> str:
    """What the command says as it refuses: one line."""
    result = tfm(*arguments, stdin=stdin)
    assert result.exit_code == 2
    assert result.stderr.startswith("tfm: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("tfm: error: ").rstrip("\n")


def start_tfm(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    """The command in a process of its own, for what signals and pipes do to it."""
    command = [sys.executable, "-m", "tfm", *(str(argument) for argument in arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    return subprocess.Popen(
        command, env=environment, cwd=root, **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options)
    )


def complaints(stderr: bytes) -> list[str]:
    """The lines of stderr but for the note of a machine without native kernels."""
    return [line for line in stderr.decode().splitlines() if not line.startswith("tfm: note: ")]


def log_of(run: Path) -> list[dict[str, Any]]:
    """The run's log without what a clock says."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second", "path")} for r in records]


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of the log's training records."""
    return [(record["step"], record["loss"]) for record in log_of(run) if record["event"] == "train"]


def weights_of(run: Path) -> dict[str, bytes]:
    """Of the model that translates, by name."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_tensors(run / "model.safetensors")[0].items()}
