"""A benchmark file names its PEERS, functions of the same arguments, and its SIZES; each test runs at every pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, values in (("size", "SIZES"), ("peer", "PEERS")):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(getattr(metafunc.module, values)), ids=str)


@pytest.fixture
def function(peer: str, request: pytest.FixtureRequest, benchmark: Any) -> Callable:
    """The peer's function; "compile" is compiled anew for each size."""
    benchmark.extra_info["peer"] = peer
    chosen = request.module.PEERS[peer]
    if peer != "compile":
        return chosen
    torch._dynamo.reset()
    return torch.compile(chosen, fullgraph=True, dynamic=False)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A second one would measure what else runs on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    yield
    torch.set_num_threads(threads)
