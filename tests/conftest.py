"""One seed, one thread, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

# Must be set before anything imports triton; cross-compilation therefore runs in processes of its own.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


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
def kernel_device() -> torch.device:
    """Where Triton kernels run here: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
