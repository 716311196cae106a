"""The compilers of this machine: finds them, and the GPUs that nvcc compiles for here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from tfm.native import recipe
from tfm.native.recipe import BuildError

COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Cuda:
    """nvcc, with its flags for the GPUs that it compiles for; or why it is left out."""

    nvcc: Path | None = None
    gencode: tuple[str, ...] = ()
    why_not: str = ""

    @property
    def libraries(self) -> list[str]:
        """The linker's flags for CUDA's runtime, which becomes part of the library."""
        assert self.nvcc is not None
        toolkit = self.nvcc.parent.parent
        folders = [toolkit / "lib64", toolkit / "lib", *toolkit.glob("targets/*/lib")]
        return [*(f"-L{folder}" for folder in folders if folder.is_dir()), "-lcudart_static", "-ldl", "-lrt"]


def compiler() -> list[str]:
    """Returns the command of the C++ compiler: $CXX, or the first of COMPILERS on PATH.

    Raises:
        BuildError: there is none, or Python's headers are missing.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    candidates = chosen[:1] or COMPILERS
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is None:
        where = "that CXX names" if chosen else "on PATH (or in CXX)"
        raise BuildError(f"no C++ compiler: looked for {', '.join(candidates)} {where}")
    if not (python_headers() / "Python.h").is_file():
        raise BuildError(f"no headers of Python in {python_headers()} (on Debian: python3-dev)")
    return [found, *chosen[1:]]


def ninja() -> str:
    """Returns the path of ninja, from its Python package or on PATH.

    Raises:
        BuildError: there is none.
    """
    beside = Path(sysconfig.get_path("scripts")) / "ninja"
    found = str(beside) if beside.is_file() else shutil.which("ninja") or shutil.which("ninja-build")
    if found is None:
        raise BuildError(
            "no ninja: looked for it beside Python and on PATH (pip install ninja, which tfm's extra `build` brings)"
        )
    return found


def missing() -> str:
    """Says why nothing can be compiled here; empty where it can."""
    try:
        compiler()
        ninja()
    except BuildError as error:
        return str(error)
    return ""


def python_headers() -> Path:
    return Path(sysconfig.get_path("include"))


def torch_folder() -> Path:
    return Path(torch.__file__).parent


def includes(csrc: Path, made: Path) -> list[str]:
    """Returns the flags for headers: ours first, those `made` too, torch's and Python's without warnings."""
    return [f"-I{csrc}", f"-I{made}", "-isystem", str(torch_folder() / "include"), "-isystem", str(python_headers())]


def version_of(command: list[str]) -> str:
    """Returns the version that a compiler prints.

    Raises:
        BuildError: it does not run.
    """
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from None
    return done.stdout.strip()


def cuda(wanted: bool = True) -> Cuda:
    """Returns nvcc where it is wanted, is whole, and there is a torch to use it; else why not.

    TFM_BUILD_CUDA=1 asks for the CUDA part with a torch built without CUDA too, TFM_BUILD_CUDA=0 for none.

    Raises:
        BuildError: TFM_BUILD_CUDA=1 where nvcc cannot compile, or a wrong TORCH_CUDA_ARCH_LIST.
    """
    asked = os.environ.get("TFM_BUILD_CUDA", "")
    if not wanted or asked == "0":
        return Cuda(why_not="not wanted")
    if asked != "1" and torch.version.cuda is None:
        return Cuda(why_not="this torch is built without CUDA")
    nvcc, reason = find_nvcc()
    if nvcc is None:
        if asked == "1":
            raise BuildError(f"TFM_BUILD_CUDA=1: {reason}")
        return Cuda(why_not=reason)
    return Cuda(nvcc, tuple(recipe.gencode(architectures(nvcc))))


def find_nvcc() -> tuple[Path | None, str]:
    """Returns nvcc inside its toolkit, or why there is none. What is on PATH may be a link or a script elsewhere."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else None
    found = found or shutil.which("nvcc")
    if found is None:
        return None, "no nvcc in CUDA_HOME or on PATH"
    try:
        done = subprocess.run(
            [found, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{found} does not run: {error}"
    here = re.search(r"^#\$ _HERE_=(.*)$", done.stderr, re.MULTILINE)
    nvcc = Path(here.group(1)) / "nvcc" if here else Path(found).resolve()
    toolkit = nvcc.parent.parent
    if not any(toolkit.glob("include/cuda_runtime.h")) and not any(toolkit.glob("targets/*/include/cuda_runtime.h")):
        return None, f"no CUDA headers in {toolkit}"
    return nvcc, ""


def architectures(nvcc: Path) -> str:
    """Returns the chips to compile for: TORCH_CUDA_ARCH_LIST, else the GPUs here, else the usual that nvcc knows."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    chips = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    present = [
        f"{major}.{minor}" + "a" * (major == 9) for major, minor in sorted(chips) if (major, minor) >= recipe.OLDEST
    ]
    if present:
        return ";".join(present)
    done = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True, timeout=60)
    known = {line.removeprefix("compute_") for line in done.stdout.split()}
    usual = [name for name in recipe.ARCHITECTURES.split(";") if re.sub(r"\D", "", name) in known]
    return ";".join(usual or ["8.0+PTX"])
