"""Sets up `pytest benchmarks`: one thread, the device's clock, failed peers kept, ratios in record and on screen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import device
from benchmarks.summary import Entry, add_speed_ups, failures, tables

REPORT_WIDTH = 150
FAILED = pytest.StashKey[list[Entry]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAILED] = []
    # Its table is a line a peer and wider than a screen; ours follows.
    config.option.benchmark_quiet = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=device.clock, disable_gc=True))


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Runs on one thread: a second one would measure what else runs on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    with device.kernels_as_on_a_gpu():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _keep_failure(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "failed" in benchmark.extra_info:
        entry = {"group": benchmark.group, "name": benchmark.name, "fullname": benchmark.fullname}
        request.config.stash[FAILED].append(entry | {"extra_info": benchmark.extra_info, "stats": None})


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["benchmarks"] += config.stash[FAILED]
    add_speed_ups(output_json["benchmarks"])


def pytest_terminal_summary(config: pytest.Config) -> None:
    measured = [run.as_dict(include_data=False) for run in config._benchmarksession.benchmarks if not run.has_error]  # type: ignore[attr-defined]
    if not measured:
        return
    entries = measured + config.stash[FAILED]
    console = Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)
    for table in tables(entries):
        console.print(table)
    for line in failures(entries):
        console.print(line, markup=False)
