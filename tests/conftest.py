"""One seed, one thread, and where there is no GPU Triton's interpreter and csrc's emulation."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from selection import EVERY, Selection
from torch.utils._device import _device_constructors

from tfm import native
from tfm.native import toolchain
from tfm.ops import backends
from tools import interpreter

ROOT = Path(__file__).parent.parent
NO_PARAMETERS = SimpleNamespace(params={})

if torch.cuda.is_available():
    # Before cuBLAS is used: its products are deterministic then, as filled_with_nan has torch demand.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # Must be set before anything imports triton; cross-compilation therefore runs in processes of its own.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # Inductor's cache does not ask for which vectors its C++ was written, and what it holds may not compile for others.
    folder = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


class SkipsWithoutTriton(MetaPathFinder):
    """Where triton is not installed, a test of its kernels says so; torch, which can do without it, sees no more."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "triton":
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename and frame.f_back is not None:
                frame = frame.f_back
            if ROOT in Path(frame.f_code.co_filename).parents and "site-packages" not in frame.f_code.co_filename:
                pytest.skip("triton is not installed", allow_module_level=True)


if not backends.has_triton():
    sys.meta_path.append(SkipsWithoutTriton())

# The same examples on every run, so that a change is judged by what it changed; `make test-all` draws new ones.
settings.register_profile("repeated", derandomize=True)
settings.load_profile("default" if EVERY else "repeated")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Selection(config))
    torch.set_num_threads(1)
    # torch remembers what makes tensors when it is first asked: not while a test has put something else in their place.
    _device_constructors()
    interpreter.mend()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, every test of a kernel is a GPU test; elsewhere those that need one are skipped."""
    without_compiler = toolchain.missing()
    for item in items:
        if torch.cuda.is_available() and "kernel_device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        elif not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if item.get_closest_marker("triton") and not backends.has_triton():
            item.add_marker(pytest.mark.skip(reason="triton is not installed"))
        if without_compiler and "inductor" in getattr(item, "callspec", NO_PARAMETERS).params.values():
            item.add_marker(pytest.mark.skip(reason=f"Inductor compiles C++: {without_compiler}"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20170612)


@pytest.fixture(autouse=True)
def _no_routes() -> None:
    """No test meets launches of kernels that another has replaced, or settings that another has changed."""
    if "tfm.ops.routing" in sys.modules:
        sys.modules["tfm.ops.routing"].forget()


@pytest.fixture
def filled_with_nan() -> Iterator[None]:
    """What torch allocates holds NaN: an element that nobody writes is seen. (tests/launches.py does it for Triton.)"""
    with warnings.catch_warnings():
        # Some of torch's operations on GPUs have no deterministic version: NaN is all that is wanted of it here.
        warnings.filterwarnings("ignore", ".*deterministic", UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
        yield
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernel_device() -> torch.device:
    """Where Triton kernels run here: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def cuda_device(kernel_device: torch.device) -> torch.device:
    """Where csrc's CUDA kernels run here: the GPU, or the CPU under tests/cuda_emulation."""
    reason = native.why_unavailable(kernel_device) if kernel_device.type == "cuda" else ""
    if reason:
        pytest.skip(reason)
    return kernel_device


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run, and what training it printed; do not change it. Its text and validation lie beside it."""
    from small_run import FLAGS, tfm, validation_flags, write_text

    folder = tmp_path_factory.mktemp("trained")
    result = tfm("train", *write_text(folder), *validation_flags(folder), *FLAGS, "--out", folder / "run")
    assert result.exit_code == 0, result.stderr
    return folder / "run", result.stdout
