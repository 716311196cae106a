"""What a benchmark leaves behind: its samples, and the machine they are from, as JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tfm.files import write_atomically


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the software that numbers are measured on."""
    root = Path(__file__).parent.parent
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git(root, "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # of other work: numbers taken beside it are no numbers
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sacrebleu": version("sacrebleu"),
    }


def write(path: Path, record: dict[str, Any]) -> None:
    """Writes the whole record anew, atomically, so that an interrupted benchmark keeps what it has."""
    write_atomically(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(root: Path, *command: str) -> str | None:
    try:
        return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
