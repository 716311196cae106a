"""Writes what a benchmark leaves behind: its samples, and the machine they are from, as JSON."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tfm.files import write_atomically

ROOT = Path(__file__).parent.parent
# Packages whose versions affect a measurement, where they are installed.
PACKAGES = (
    "triton", "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "transformers", "tokenizers", "sacrebleu",
    "liger-kernel",
)  # fmt: skip
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu")


def environment(device: torch.device) -> dict[str, Any]:
    """Describes the machine and the software that numbers are measured on; None for what is not there."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        # A copy of a checkout has no history: whoever made the copy knows the commit.
        "commit": os.environ.get("COMMIT") or _git("rev-parse", "HEAD"),
        "uncommitted_changes": changes if changes is None else bool(changes),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # of other work: numbers taken beside it are no numbers
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: installed(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "nvcc": last_line("nvcc", "--version"),
        "compute_sanitizer": last_line("compute-sanitizer", "--version"),
        **_gpu(device),
    }


def sources(root: Path = ROOT) -> dict[str, str]:
    """Returns the SHA-256 of every file of kernels/ and csrc/: the numbers belong to these files."""
    files = sorted(path for folder in ("kernels", "csrc") for path in (root / folder).rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if "__pycache__" not in path.parts
    }


def clocks(device: torch.device) -> dict[str, str] | None:
    """Reads the GPU's clocks, power and temperature at this moment; it never sets them."""
    return _nvidia_smi(device, CLOCKS) if device.type == "cuda" else None


def write(path: Path, record: dict[str, Any]) -> None:
    """Writes the whole record anew, atomically, so that an interrupted benchmark keeps what it has."""
    write_atomically(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def installed(package: str) -> str | None:
    """Returns the package's version, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cuda_tool(name: str) -> str | None:
    """Finds a program of the CUDA toolkit: on PATH, or where toolkits are installed."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(folders))


def last_line(tool: str, *arguments: str) -> str | None:
    """Returns what a program of the CUDA toolkit prints last; None where it is not there or fails."""
    program = cuda_tool(tool)
    lines = (_answer(program, *arguments) or "").splitlines() if program else []
    return lines[-1] if lines else None


def _gpu(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"gpu": None, "driver": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "driver": (_nvidia_smi(device, ("driver_version",)) or {}).get("driver_version"),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "clocks": clocks(device),
    }


def _nvidia_smi(device: torch.device, names: Sequence[str]) -> dict[str, str] | None:
    # torch numbers the GPUs that it may see, nvidia-smi all of them.
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    text = _answer("nvidia-smi", f"--id={identity}", f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    return None if text is None else dict(zip(names, text.split(", "), strict=True))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*command: str) -> str | None:
    # A copy inside another repository is not that repository.
    return _answer("git", *command) if (ROOT / ".git").exists() else None


def _answer(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
