"""The operators of csrc/cuda, on a GPU or, as torch.ops.tfm_emulated.*, on CPU tensors: under tests/cuda_emulation.

`operators("norm", device, ...)` gives those of csrc/cuda/norm.cu, and impl="native" runs them. For the CPU the file is
compiled as C++, once for each content of what it includes; schemas and fakes are those of tfm_native; a race, or a
barrier that threads miss, raises RuntimeError.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tfm import native
from tfm.native import header, recipe
from tfm.operators import define
from tfm.operators.declaration import FLOATS
from tfm.ops import backends

NAMESPACE = "tfm_emulated"
ROOT = Path(__file__).parent.parent
EMULATION = ROOT / "tests" / "cuda_emulation"
TORCH = Path(torch.__file__).parent
FOLDER = recipe.cache().parent / "emulated"
FLAGS = (
    "-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE",
    *recipe.DEFINES, f"-Dtfm_native={NAMESPACE}",
)  # fmt: skip
INCLUDES = (
    f"-I{EMULATION}", f"-I{ROOT / 'csrc'}", f"-I{header.write(FOLDER / header.digest())}",
    "-isystem", str(TORCH / "include"), "-isystem", sysconfig.get_paths()["include"],
)  # fmt: skip
# g++ announces what the code touches; tests/cuda_emulation/race_check.cpp listens. Never linked to a sanitizer.
CHECKED = ("-fsanitize=thread,alignment,bounds", "-Wall", "-Wextra", "-Wno-unknown-pragmas")


def operators(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Those of csrc/cuda/`name`.cu for tensors of `device`; impl="native" runs them, in every dtype of a GPU."""
    if device.type == "cuda":
        return torch.ops.tfm_native
    load(name)
    rows = [row for row in backends.TABLE if row.backend == "native"]
    monkeypatch.setattr(backends, "TABLE", [dataclasses.replace(row, dtypes=FLOATS) for row in rows])
    monkeypatch.setattr(native, "NAMESPACE", NAMESPACE)
    monkeypatch.setattr(native, "why_unavailable", lambda device: "")
    return getattr(torch.ops, NAMESPACE)


@cache
def load(name: str) -> None:
    """Registers the operators of csrc/cuda/`name`.cu, compiled for the CPU."""
    _module()
    torch.ops.load_library(str(library(name.replace("/", "_"), ROOT / "csrc" / "cuda" / f"{name}.cu")))


@cache
def _module() -> torch.library.Library:
    torch.ops.load_library(str(library("module", ROOT / "csrc" / "module.cpp")))
    return define(NAMESPACE, native=True)


def library(name: str, source: Path) -> Path:
    """What `source` compiles to, with the emulation where it is CUDA; skips the test where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("compiles CUDA for the CPU, and there is no g++")
    runtime = sorted(EMULATION.glob("*.cpp")) if source.suffix == ".cu" else []
    folders = (EMULATION, ROOT / "csrc" / "common", ROOT / "csrc" / "cuda")
    headers = [path for folder in folders for path in sorted(folder.rglob("*.*h"))]
    digest = hashlib.sha256(repr((torch.__version__, FLAGS, CHECKED, header.digest())).encode())
    for path in (source, *runtime, *headers):
        digest.update(path.read_bytes())
    built = FOLDER / f"{name}-{digest.hexdigest()[:20]}.so"
    # The other workers of a test run wait for the first.
    with (FOLDER / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.is_file():
            for old in FOLDER.glob(f"{name}-*"):
                old.unlink()
            _compile(source, runtime, built)
    return built


def _compile(source: Path, runtime: list[Path], built: Path) -> None:
    objects = []
    for path in (source, *runtime):
        objects.append(built.with_name(f"{built.stem}-{path.stem}.o"))
        checked = CHECKED if path == source and path.suffix == ".cu" else ()
        _run("g++", "-x", "c++", *FLAGS, *INCLUDES, *checked, "-c", str(path), "-o", str(objects[-1]))
    unfinished = built.with_suffix(".unfinished")
    torch_libraries = (f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl")
    _run("g++", "-shared", "-o", str(unfinished), *map(str, objects), *torch_libraries)
    unfinished.rename(built)
    for path in objects:
        path.unlink()


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"
