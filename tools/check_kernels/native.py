"""Compiles the kernels of csrc/cuda for GPUs that need not be here, and says what they take of a multiprocessor.

nvcc compiles each file for each chip, without the host part; ptxas, the PTX and the disassembly say the rest. A kernel
is named by its file and its name in C++. What was found is kept beside the builds, by the sources and nvcc's version.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from tfm.files import write_atomically
from tfm.native import header, recipe, toolchain
from tools.check_kernels.allowed import Allowed
from tools.check_kernels.compiled import Compiled
from tools.check_kernels.sass import disassemble

# sm_90's instructions for tensor cores exist under this name only.
ARCHITECTURES = {90: "90a"}
ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame.*?Used (\d+) registers([^\n]*)", re.DOTALL
)
# The chips of an ordinary check; csrc/cuda has no instructions of sm_100's own, which --every compiles for too.
CAPABILITIES = (80, 90)
# In the PTX: a kernel's name and, before its body, the threads of its largest block.
THREADS = re.compile(r"\.entry (\w+)\([^)]*\)\s*(?:\.maxntid (\d+))?")
LARGEST_BLOCK = 1024


def usable() -> tuple[Path | None, str]:
    """Returns nvcc, or why there is nothing to compile."""
    csrc = recipe.sources()
    if csrc is None or not any(csrc.rglob("*.cu")):
        return None, "no sources"
    return toolchain.find_nvcc()


def concerns(exception: Allowed) -> bool:
    """Tells whether an exception is about kernels of csrc."""
    return any(".cu " in name for name in exception.kernels)


def compile_all(
    nvcc: Path,
    capabilities: Sequence[int],
    workers: int | None = None,
    only: Sequence[str] = (),
    report: Callable[[Compiled], Any] = lambda _: None,
    csrc: Path | None = None,
) -> list[Compiled]:
    """Returns a row for each kernel and chip; arguments as in tools.check_kernels.compiled.compile_all."""
    csrc = csrc or recipe.sources()
    assert csrc is not None
    version, rows = toolchain.version_of([str(nvcc)]), []
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        started = [
            [pool.submit(_compile, nvcc, version, csrc, source, capability) for capability in capabilities]
            for source in sorted(csrc.rglob("*.cu"))
        ]
        for chips in started:
            found = [row for chip in chips for row in chip.result()]
            # A kernel's chips stand under its name.
            for row in sorted(found, key=lambda row: (row.name, row.capability)):
                if not only or any(part in row.name for part in only):
                    rows.append(row)
                    report(row)
    return rows


def _compile(nvcc: Path, version: str, csrc: Path, source: Path, capability: int) -> list[Compiled]:
    """Returns the kernels of one file on one chip, from the cache where nothing changed."""
    headers = sorted(path for path in csrc.rglob("*") if path.suffix in (".h", ".cuh"))
    read = b"".join(path.read_bytes() for path in (Path(__file__), source, *headers))
    columns = [field.name for field in fields(Compiled)]
    options = repr((version, recipe.DEVICE_FLAGS, header.digest(), _label(csrc, source), capability, columns))
    stored = recipe.cache() / "checks" / f"{hashlib.sha256(options.encode() + read).hexdigest()[:20]}.json"
    if stored.is_file():
        return [Compiled(**row) for row in json.loads(stored.read_text())]
    start = time.perf_counter()
    release = re.search(r"release ([\d.]+)", version)
    rows = [
        replace(row, assembler=f"nvcc {release[1] if release else ''}".strip())
        for row in _compile_anew(nvcc, csrc, source, capability, lambda: time.perf_counter() - start)
    ]
    if not any(row.error for row in rows):
        write_atomically(stored, json.dumps([asdict(row) | {"seconds": 0.0} for row in rows]).encode())
    return rows


def _compile_anew(
    nvcc: Path, csrc: Path, source: Path, capability: int, seconds: Callable[[], float]
) -> list[Compiled]:
    chip = ARCHITECTURES.get(capability, str(capability))
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernels.cubin", Path(folder) / f"{source.stem}.ptx"
        made = header.write(Path(folder) / "made")
        command = [
            str(nvcc), "-cubin", f"-arch=sm_{chip}", "-Xptxas=-v", "--keep", f"--keep-dir={folder}",
            *recipe.DEVICE_FLAGS, recipe.CUDA_DEFINE, *toolchain.includes(csrc, made), str(source), "-o", str(cubin),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        if done.returncode != 0:
            wrong = [line for line in said.splitlines() if "error" in line] or ["nvcc failed without a word"]
            return [Compiled(_label(csrc, source), capability, error=wrong[0].strip()[:300], seconds=seconds())]
        listing = ptx.read_text()
        blocks = {name: int(threads or LARGEST_BLOCK) for name, threads in THREADS.findall(listing)}
        dynamic = _with_dynamic_shared(listing)
        code = disassemble(cubin)
    entries = ENTRY.findall(said)
    names = _readable([mangled for mangled, *_ in entries])
    rows = []
    for (mangled, stack, registers, rest), name in zip(entries, names, strict=True):
        static = re.search(r"(\d+) bytes smem", rest)
        shared, took = int(static[1]) if static else 0, seconds() / len(entries)
        warps = -(-blocks[mangled] // 32)
        more = ", dynamic shared" * (mangled in dynamic)
        name = f"{_label(csrc, source)} {name}{more}"
        row = Compiled(name, capability, num_warps=warps, registers=int(registers), stack=int(stack), shared=shared)
        rows.append(replace(row, instructions=code[mangled], seconds=took))
    return rows


def _label(csrc: Path, source: Path) -> str:
    """Returns what the names of the file's kernels begin with: attention/short.cu."""
    return source.relative_to(csrc / "cuda").as_posix()


def _with_dynamic_shared(listing: str) -> set[str]:
    """Returns the kernels of a PTX whose launch gives the size of shared memory: `shared` and `blocks` leave it out."""
    names = re.findall(r"\.extern \.shared [^;]*?(\w+)\[\]", listing)
    _, *parts = re.split(r"\.entry (\w+)\(", listing)
    return {kernel for kernel, body in zip(parts[::2], parts[1::2], strict=True) if any(name in body for name in names)}


def _readable(mangled: Sequence[str]) -> list[str]:
    """Returns names as in the source: without namespaces, parameters and casts."""
    if not mangled:
        return []
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    found = []
    for name in done.stdout.splitlines():
        name = re.sub(r"(?:\(anonymous namespace\)|\w+)::", "", name.removeprefix("void "))
        name = re.sub(r"\(\w+\)(?=\d)", "", name)
        depth, end = 0, len(name)
        for place, letter in enumerate(name):
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                end = place
                break
        found.append(name[:end])
    return found
