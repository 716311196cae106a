"""The recipe of a build: every object with its flags, and the name that a build of exactly this goes by.

It runs no compiler and imports no torch: all of it follows from the sources and its arguments.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tfm

SUFFIXES = (".cpp", ".h", ".cu", ".cuh")
# The stable ABIs of torch 2.11 and Python 3.10: one binary serves all newer versions.
DEFINES = ("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030a0000")
# No -ffast-math: NaN and infinity keep their meaning.
HOST_FLAGS = (
    "-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
    *DEFINES,
)  # fmt: skip
DEVICE_FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *DEFINES, "-DUSE_CUDA")
CUDA_DEFINE = "-DTFM_WITH_CUDA"
# Kernels for CPUs are compiled once for each of these, in a namespace of that name.
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx512": (
            "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512",
            "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # GCC 12 warns of its own intrinsics
        ),
    },
    "aarch64": {"neon": ()},
}  # fmt: skip
# The code that chooses among them is compiled once, for every processor.
WITHOUT_KERNELS = ("cpu/isa.cpp",)
# The chips of data centres, and PTX for newer ones: compiled for where there is neither a list nor a GPU.
ARCHITECTURES = "8.0;9.0a;10.0+PTX"
FAMILIES = {"Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0a", "Blackwell": "10.0;12.0+PTX"}
OLDEST = (8, 0)


class BuildError(Exception):
    """The reason why there is no library, in one line."""


@dataclass(frozen=True)
class Object:
    """One run of a compiler: nvcc for a .cu file, the C++ compiler for all others."""

    source: Path
    label: str
    flags: tuple[str, ...]

    @property
    def file(self) -> str:
        """The file that it writes."""
        return self.label.replace("/", "_").replace(" ", ".") + ".o"

    @property
    def is_device(self) -> bool:
        return self.source.suffix == ".cu"


def sources() -> Path | None:
    """Returns the folder of the sources: beside the package in a checkout, inside it where it is installed."""
    for folder in tfm.__path__:
        if (Path(folder) / "csrc" / "module.cpp").is_file():
            return Path(folder) / "csrc"
    return None


def cache() -> Path:
    """Returns the folder that keeps builds: libraries, and objects.

    It is never one that all users share: what lies there is loaded into the process.

    Raises:
        BuildError: this user has no home folder, and XDG_CACHE_HOME names none.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / "tfm" / "native"
    except RuntimeError:
        raise BuildError(
            f"no folder to keep builds in: user {os.getuid()} has no home folder (set HOME or XDG_CACHE_HOME)"
        ) from None


def library(csrc: Path, torch_version: str, declarations: str) -> Path:
    """Returns the path of the library that is built of exactly these sources, flags, torch and declarations."""
    flags = (torch_version, declarations, HOST_FLAGS, DEVICE_FLAGS, variants())
    digest = hashlib.sha256(repr(flags).encode())
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in SUFFIXES):
        code = path.read_bytes()
        digest.update(f"{path.relative_to(csrc)} {len(code)}\n".encode() + code)
    return cache() / "libraries" / digest.hexdigest()[:20] / "tfm_native.so"


def variants() -> dict[str, tuple[str, ...]]:
    """Returns the variants of this machine's architecture: names and flags."""
    return VARIANTS.get(platform.machine(), {})


def objects(csrc: Path, gencode: Iterable[str] = (), extra: tuple[str, ...] = ()) -> list[Object]:
    """Lists every object of the library.

    Args:
        csrc: the sources.
        gencode: nvcc's flags for the GPUs to compile for; none leaves CUDA out.
        extra: flags for the C++ compiler after all others.
    """
    cuda = sorted(csrc.rglob("*.cu")) if gencode else []
    host = (*HOST_FLAGS, CUDA_DEFINE) if cuda else HOST_FLAGS
    found = []
    for source in sorted(csrc.rglob("*.cpp")):
        label = source.relative_to(csrc).as_posix()
        found.append(Object(source, label, (*host, *extra)))
        if label.startswith("cpu/") and label not in WITHOUT_KERNELS:
            for name, flags in variants().items():
                found.append(Object(source, f"{label} {name}", (*host, f"-DTFM_ISA={name}", *flags, *extra)))
    for source in cuda:
        label = source.relative_to(csrc).as_posix()
        found.append(Object(source, label, (*DEVICE_FLAGS, CUDA_DEFINE, *gencode)))
    return found


def gencode(architectures: str) -> list[str]:
    """Returns nvcc's flags for a list as in TORCH_CUDA_ARCH_LIST: "8.0;9.0a;10.0+PTX", "Hopper".

    Chips older than 8.0 are left out.

    Raises:
        BuildError: a name that is none, or nothing is left.
    """
    flags: list[str] = []
    for name in architectures.replace(";", " ").split():
        for part in FAMILIES.get(name, name).split(";"):
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", part)
            if match is None:
                raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected names such as 8.0, 9.0a or 10.0+PTX, got {part!r}")
            major, minor, suffix, with_ptx = match.groups()
            if (int(major), int(minor)) < OLDEST:
                continue
            number = major + minor + suffix
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if with_ptx:
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected a chip of 8.0 or newer, got {architectures!r}")
    return list(dict.fromkeys(flags))
