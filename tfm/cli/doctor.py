"""`tfm doctor`: what this machine has, and which backends work on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import torch

# Like torch's own tests: fp32 results of another order of summation.
TOLERANCE = 1e-4


def doctor() -> None:
    """Show versions and devices, and try every backend on each of them."""
    import torch

    from tfm import __version__
    from tfm.ops.backends import BACKENDS

    _row("tfm", __version__)
    _row("Python", platform.python_version())
    _row("torch", torch.__version__)
    _row("triton", _installed("triton"))
    _row("CUDA of torch", torch.version.cuda or "none: a CPU build")
    _row("nvcc", _answer("nvcc", "--version"))
    _row("C++ compiler", _compiler())
    _row("ninja", _ninja())
    _row("tfm_native", _native())
    _row("GPU driver", _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"))
    capability = torch.backends.cpu.get_cpu_capability()
    _row("CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, instructions {capability}")
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        devices.append(torch.device("cuda", index))
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        _row(f"cuda:{index}", f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory}")
    for backend in BACKENDS:
        for device in devices:
            _row(f"{backend} on {device}", try_backend(backend, device))


def try_backend(backend: str, device: torch.device) -> str:
    """Runs Add & Norm on one backend, checks it against float64 on the CPU, and says whether it works or why not."""
    import torch

    from tfm import ops
    from tfm.ops.backends import choose

    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 7, 33, generator=generator, dtype=torch.float64)
    try:
        choose("residual_layer_norm", backend, torch.empty(1, device=device))
    except ValueError as refusal:
        return f"not here: {str(refusal).partition(': ')[2]}"
    truth, _ = ops.residual_layer_norm(x, residual, impl="reference")
    try:
        on_device = x.float().to(device), residual.float().to(device)
        found, _ = ops.residual_layer_norm(*on_device, impl=backend)
        error = (found.cpu().double() - truth).abs().max().item()
    # Whatever a broken driver or compiler raises is what the user came to read.
    except Exception as failure:
        return f"fails: {type(failure).__name__}: {' '.join(str(failure).split())}"
    return f"works (greatest error {error:.1e})" if error < TOLERANCE else f"wrong results: error {error:.1e}"


def _row(name: str, value: str) -> None:
    typer.echo(f"{name:<18} {value}")


def _compiler() -> str:
    from tfm.native import recipe, toolchain

    try:
        command = toolchain.compiler()
        return f"{' '.join(command)}, {toolchain.version_of(command).splitlines()[0]}"
    except recipe.BuildError as error:
        return f"not found: {error}"


def _ninja() -> str:
    from tfm.native import recipe, toolchain

    try:
        return _answer(toolchain.ninja(), "--version")
    except recipe.BuildError as error:
        return f"not found: {error}"


def _native() -> str:
    """Says which library of native operators is loaded, for which processors; or why none is, and how to get one."""
    from tfm import native

    reason = native.load()[0]
    if reason:
        return f"not here: {reason}"
    import torch

    operators = torch.ops.tfm_native
    chosen = f" ({native.INSTRUCTION_SET})" if os.environ.get(native.INSTRUCTION_SET) else ""
    cuda = "with CUDA" if operators.has_cuda() else "without CUDA"
    return f"{native.library()}, kernels for {operators.instruction_set()}{chosen}, {cuda}"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _answer(*command: str) -> str:
    """Returns the last line that a program prints; nvcc's names its build."""
    if shutil.which(command[0]) is None:
        return "not found"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"fails: {error}"
    return done.stdout.strip().splitlines()[-1]
