"""One seed, one thread, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Must be set before anything imports triton; cross-compilation therefore runs in processes of its own.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# The same examples on every run, so that a change is judged by what it changed; `make test-all` draws new ones.
settings.register_profile("repeated", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeated"))


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, every test of a kernel is a GPU test; elsewhere those that need one are skipped."""
    for item in items:
        if torch.cuda.is_available() and "kernel_device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        elif not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20170612)


@pytest.fixture
def filled_with_nan() -> Iterator[None]:
    """What torch allocates holds NaN: an element that nobody writes is seen. (tests/launches.py does it for Triton.)"""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernel_device() -> torch.device:
    """Where Triton kernels run here: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
