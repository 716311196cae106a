"""Which tests run, and in which order: those marked `long` where TFM_EVERY=1 alone, the slowest files first.

pytest-xdist gives each file to one of its processes (--dist loadfile), so that what a fixture of a module makes is made
once, and takes files in this order (--no-loadscope-reorder).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import Any

import pytest

VARIABLE = "TFM_EVERY"
EVERY = os.environ.get(VARIABLE) == "1"
# Behind the others each would keep one process at work while the other has nothing left to do.
SLOWEST = ("test_gpu_run.py", "test_check_kernels.py", "test_dynamic_shapes.py", "test_tune_candidates.py")


def long_but(few: Collection[str], every: Iterable[str]) -> list[Any]:
    """A parameter for each of `every`; those that are not among `few` are long."""
    return [pytest.param(name, marks=() if name in few else pytest.mark.long, id=name) for name in every]


class Selection:
    """A plugin of pytest: each process selects, and the one that shows the results says how many were left out."""

    def __init__(self, config: pytest.Config) -> None:
        # Of a process of pytest-xdist: what it hands over when it ends.
        self.output: dict[str, Any] = getattr(config, "workeroutput", {})
        self.left_out = 0

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        long = [] if EVERY else [item for item in items if item.get_closest_marker("long")]
        if long:
            config.hook.pytest_deselected(items=long)
            items[:] = [item for item in items if not item.get_closest_marker("long")]
        items.sort(key=lambda item: item.path.name not in SLOWEST)
        self.left_out = self.output[VARIABLE] = len(long)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        # All processes collect the same tests; one that died says nothing.
        self.left_out = max(self.left_out, getattr(node, "workeroutput", {}).get(VARIABLE, 0))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.left_out:
            terminalreporter.write_line(f"{self.left_out} long tests left out: {VARIABLE}=1 runs them (make test-all)")
