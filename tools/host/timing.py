"""Host time of a launch, by triton's own launcher: kernels are compiled for sm_90, then handed to a driver of no-ops.

The launcher is the C code that triton runs on a GPU, linked to tools/host/driver.c in libcuda's place, so that all of
the host's work is timed but the driver's own, about 2 µs a launch, and torch's for a GPU's memory.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from tools.host.stand_in import Driver

SOURCE = Path(__file__).with_name("driver.c")
# The linker asks for one name or the other.
LIBRARIES = ("libcuda.so.1", "libcuda.so")
# Seconds of a sample, short enough that little interrupts it, and of all of them; how few and how many there are.
SAMPLE, ALL, FEWEST, MOST = 0.002, 0.15, 6, 60


@dataclass(frozen=True)
class Timed:
    """Seconds of the host for a call, and for a torch.add before or after it: the least of each."""

    call: float
    add: float

    @property
    def ratio(self) -> float:
        return self.call / self.add


class LaunchingDriver(Driver):
    """Loads and launches as triton's driver for CUDA does."""

    def __init__(self) -> None:
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        self.utils = CudaUtils()
        self.launcher_cls = CudaLauncher


def why_unavailable() -> str:
    """Says why nothing can be timed here; empty where it can."""
    if torch.cuda.is_available():
        return "times are taken where there is no GPU: another library stands in for its driver"
    return "" if _compiler() else "times need a C compiler, cc or what CC names"


def _compiler() -> str | None:
    """Finds a C compiler as triton does."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


@cache
def use_launcher() -> None:
    """Has Triton compile kernels and launch them into nothing from now on, unless `why_unavailable` says otherwise."""
    library = _built()
    # Loaded under the name that triton's library asks for, it is the one that is found.
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    knobs.nvidia.libcuda_path = str(library.parent)
    driver.set_active(LaunchingDriver())


def timed(work: Callable[[], Any]) -> Timed:
    """Measures the processor's time of `work`, whatever else the machine does."""
    work()
    start = time.process_time()
    work()
    once = time.process_time() - start
    calls, samples = max(1, round(SAMPLE / once)), max(FEWEST, min(MOST, round(ALL / once)))
    gc.collect()
    gc.disable()
    try:
        before, call, after = seconds_of_add(), _least(work, calls, samples), seconds_of_add()
    finally:
        gc.enable()
    return Timed(call, min(before, after))


def seconds_of_add() -> float:
    """Measures the unit."""
    x = torch.ones(16)
    return _least(lambda: torch.add(x, x), 1000, 15)


def _least(work: Callable[[], Any], calls: int, samples: int) -> float:
    """Returns seconds of a call, in the sample that other work on the machine has disturbed least."""
    return min(_sample(work, calls) for _ in range(samples))


def _sample(work: Callable[[], Any], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        work()
    return (time.process_time() - start) / calls


def _built() -> Path:
    """Builds the library, in triton's cache."""
    text = SOURCE.read_bytes()
    stored = get_cache_manager(hashlib.sha256(text).hexdigest())
    if not all(map(stored.get_file, LIBRARIES)):
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / LIBRARIES[0]
            flags = ["-O2", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARIES[0]}"]
            subprocess.run([_compiler() or "cc", *flags, "-o", str(made), str(SOURCE)], check=True)
            for name in LIBRARIES:
                stored.put(made.read_bytes(), name)
    found = stored.get_file(LIBRARIES[0])
    assert found is not None
    return Path(found)
