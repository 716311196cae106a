"""A pytest plugin: every result becomes a line of the journal at once, so that a run that is killed keeps what it had.

Loaded by `pytest -p tools.gpu.pytest_journal`; the variable TFM_JOURNAL names the file. A case that the journal
names already is not run again: where a process died, the next one goes on behind the case that it died of.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

from tools.gpu.child import GPU_LOST, JOURNAL, append, lost_gpu, read

# The characters kept of the traceback of a test that failed.
DETAIL_CHARACTERS = 2000


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Journal(Path(os.environ[JOURNAL]), is_worker=hasattr(config, "workerinput")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Takes the interpreter for the GPU in a rehearsal; tests/conftest.py has skipped what needs a real one."""
    for item in items:
        if os.environ.get("TFM_REHEARSAL") == "1" and "kernel_device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")


class Journal:
    """The plugin. Under pytest-xdist the workers only watch their GPU: the one process that hears of all writes."""

    def __init__(self, path: Path, is_worker: bool) -> None:
        self.path = path
        self.is_worker = is_worker
        self.is_counted = False

    def write(self, **line: Any) -> None:
        if not self.is_worker:
            append(self.path, line)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # xdist wants the same collection of a worker that replaces another.
        seen = set() if self.is_worker else {line["started"] for line in read(self.path) if "started" in line}
        items[:] = [item for item in items if item.nodeid not in seen]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self.collected([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        if not self.is_counted:
            self.is_counted = True
            self.collected(ids)

    def collected(self, ids: Iterable[str]) -> None:
        """Notes how many there are to run, file by file."""
        self.write(collected=Counter(name.partition("::")[0] for name in ids))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(finished=report.nodeid, outcome="failed", seconds=0.0, message=_message(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(started=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            message = "" if report.passed else _message(report)
            detail = report.longreprtext[-DETAIL_CHARACTERS:] if report.failed else ""
            known = {"outcome": report.outcome, "seconds": report.duration, "message": message, "detail": detail}
            self.write(finished=report.nodeid, **known)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        fixture = getattr(item, "funcargs", {}).get("benchmark")
        if report.when == "call" and fixture is not None:
            # A peer that fails is a result and no failure of the test; benchmarks.measure says why.
            reason = fixture.extra_info.get("failed", _message(report) if report.failed else None)
            if reason is not None:
                self.write(entry=failed_entry(item.nodeid, reason, fixture.extra_info))
            elif fixture.stats:
                self.write(entry=fixture.stats.as_dict())
        return report

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Notes what is known of a benchmark before it runs: its process may not come back from it."""
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "benchmark" in getattr(item, "fixturenames", ()) and "case" in params:
            self.write(case=item.nodeid, info=params["case"].info())

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        """Ends the process after an illegal access, when every later call fails; the next process goes on."""
        reason = lost_gpu()
        if reason:
            self.write(finished=item.nodeid, outcome="failed", seconds=0.0, message=reason)
            fixture = getattr(item, "funcargs", {}).get("benchmark")
            if fixture is not None:
                self.write(entry=failed_entry(item.nodeid, reason, fixture.extra_info))
            os._exit(GPU_LOST)


def failed_entry(nodeid: str, reason: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    """Makes the entry of a case that failed, in the place of pytest-benchmark's."""
    name = nodeid.partition("::")[2]
    return {"name": name, "fullname": nodeid, "extra_info": extra_info | {"failed": reason}, "stats": None}


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Returns the exception, in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    lines = text.strip().splitlines() or [""]
    return lines[-1] if crash is None else lines[0]
