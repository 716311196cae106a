"""The native operators, `torch.ops.tfm_native`: finds and loads their library, and says why it cannot serve a device.

The library is one file, C++ for CPUs and, where nvcc was there, CUDA. pip installs it as the module `tfm_native`, or
`tfm build` compiles it (tfm.native.build). It is loaded, never imported: torch's dispatcher is its only interface.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from tfm.native import cross_entropy, header, recipe
from tfm.operators import define

# The namespace of the native operators in torch.ops.
NAMESPACE = "tfm_native"
# The environment variable that names the CPU kernels' instruction set: avx2, avx512 or neon. Unset, the widest is used.
INSTRUCTION_SET = "TFM_INSTRUCTION_SET"

# The reasons against the CPU and against a GPU, as far as the library alone decides; None until it has been loaded.
_reasons: tuple[str, str] | None = None
_of_gpu: dict[int, str] = {}
# The parts of the library that Python defined, kept alive here.
_kept: list[torch.library.Library] = []


def library() -> Path | None:
    """Returns the file to load; None where there is none.

    TFM_NATIVE names one, there or not; else the installed module `tfm_native` is taken, else what `tfm build` made of
    exactly these sources for exactly this torch.

    Raises:
        OSError: the sources, or the folder of builds, cannot be read.
        BuildError: there is no folder of builds.
    """
    if os.environ.get("TFM_NATIVE"):
        return Path(os.environ["TFM_NATIVE"])
    installed = importlib.util.find_spec("tfm_native")
    if installed is not None and installed.origin is not None:
        return Path(installed.origin)
    sources = recipe.sources()
    if sources is None:
        return None
    built = recipe.library(sources, torch.__version__, header.digest())
    return built if built.is_file() else None


def why_unavailable(device: torch.device) -> str:
    """Says why native operators cannot run on `device`; empty where they can."""
    on_cpu, on_gpu = load() if _reasons is None else _reasons
    if device.type == "cpu":
        return on_cpu
    if device.type != "cuda":
        return f"expected CPU or CUDA tensors, got {device.type} tensors"
    if on_gpu or torch.compiler.is_compiling():
        return on_gpu or _why_chip_unavailable(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _of_gpu:
        _of_gpu[index] = _why_chip_unavailable(device)
    return _of_gpu[index]


def load() -> tuple[str, str]:
    """Loads the library, once, and says why it cannot serve CPUs and GPUs; an empty string where it can.

    tfm.ops calls it when it is imported: Dynamo cannot trace it.
    """
    global _reasons
    if _reasons is None:
        failure = _load()
        _reasons = (failure, failure) if failure else (_why_cpu_unavailable(), _why_cuda_unavailable())
    return _reasons


def _load() -> str:
    try:
        path = library()
    except (OSError, recipe.BuildError) as error:
        return f"tfm_native cannot be looked for: {error}"
    if path is None:
        return "tfm_native is not built: `tfm build` compiles it"
    if not path.is_file():
        return f"TFM_NATIVE: expected a library, got no file at {path}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        return f"tfm_native does not load: {reason}"

    declarations = getattr(torch.ops.tfm_native, "declarations", None)
    if declarations is None or declarations() != header.digest():
        return f"tfm_native at {path} is of another version of tfm: it was compiled from other declarations"
    if not _kept:
        _kept.append(define(NAMESPACE, native=True))
        cross_entropy.implement(_kept[0])
    return ""


def _why_cpu_unavailable() -> str:
    if torch.ops.tfm_native.instruction_set() == "none":
        return "expected a CPU with AVX2 and FMA, got one without"
    if chosen := os.environ.get(INSTRUCTION_SET):
        try:
            torch.ops.tfm_native.use_instruction_set(chosen)
        except RuntimeError:
            return f"{INSTRUCTION_SET}: expected a set of instructions that this CPU and the kernels have, got {chosen}"
    return ""


def _why_cuda_unavailable() -> str:
    if not torch.ops.tfm_native.has_cuda():
        return "tfm_native is built without CUDA: `tfm build` adds it where nvcc is"
    return "" if torch.version.cuda else "expected a torch with CUDA, got one without"


def _why_chip_unavailable(device: torch.device) -> str:
    chip = torch.cuda.get_device_properties(device)
    return "" if chip.major >= 8 else f"expected compute capability 8.0 or newer, got {chip.major}.{chip.minor}"
