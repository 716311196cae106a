"""The plugin of pytest under which torch_suite.py runs a file of torch's tests.

Puts tfm's classes in torch's place where TFM_TORCH_SUITE says so. Keeps the tests that use one of those, stops each
after TFM_TORCH_SUITE_SECONDS, and writes what became of it to the file TFM_TORCH_SUITE_RECORD, line by line: what a
file's time or a crash cuts short leaves the results so far.
"""

from __future__ import annotations

import builtins
import inspect
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch_suite_selection import NAMES, named, reaching

LIBRARY = os.environ.get("TFM_TORCH_SUITE", "torch")
SECONDS = int(os.environ.get("TFM_TORCH_SUITE_SECONDS", "0"))
RECORD = os.environ.get("TFM_TORCH_SUITE_RECORD", os.devnull)


class Dropped:
    """Stands for a helper that tests of another version import and the installed torch lacks.

    False where asked, empty where walked through, itself where called; as a decorator it changes nothing.
    """

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Iterator[object]:
        return iter(())

    def __radd__(self, other: object) -> object:
        return other

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: object, **named: object) -> object:
        decorates = len(arguments) == 1 and callable(arguments[0]) and not named
        return arguments[0] if decorates else self


def importing(
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """The import statement; in a file of tests, what torch lacks is Dropped."""
    module = ordinary_import(name, globals, locals, fromlist, level)
    a_test = globals is not None and Path(str(globals.get("__file__"))).is_relative_to(Path.cwd())
    if a_test and name.split(".")[0] == "torch":
        for missing in [wanted for wanted in fromlist or () if wanted != "*" and not hasattr(module, wanted)]:
            setattr(module, missing, Dropped())
    return module


ordinary_import = builtins.__import__


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    builtins.__import__ = importing
    try:
        return (yield)
    finally:
        builtins.__import__ = ordinary_import


def exchange_classes() -> None:
    """tfm.nn's classes under torch.nn's names, wherever torch keeps those."""
    from torch.nn.modules import activation, normalization, transformer

    from tfm.patching.torch_modules import PAIRS

    for theirs, ours in PAIRS.items():
        for module in (torch.nn, torch.nn.modules, activation, normalization, transformer):
            if getattr(module, theirs.__name__, None) is theirs:
                setattr(module, theirs.__name__, ours)


if LIBRARY == "tfm":
    exchange_classes()


def _record(name: str, outcome: str) -> None:
    with Path(RECORD).open("a") as stream:
        stream.write(json.dumps([name, outcome]) + "\n")


def _uses_one(item: pytest.Item) -> bool:
    """Whether a test's name or source has what is exchanged."""
    code = getattr(inspect.unwrap(getattr(item, "function", item.runtest)), "__code__", None)
    paths = {item.path, Path(code.co_filename)} if code else {item.path}
    # Tests made for a device or a setting carry it behind the method's name.
    methods = (method for path in paths for method in reaching(path, NAMES))
    return named(item.name, NAMES) or any(f"{item.name}_".startswith(f"{method}_") for method in methods)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, others = [], []
    for item in items:
        (kept if _uses_one(item) else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = kept


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _record(report.nodeid, str(report.longrepr).strip().splitlines()[-1])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    def stop(*unused: object) -> None:
        raise TimeoutError(f"not done within {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash else report.longrepr).strip().splitlines() or [""]
    _record(".".join(report.nodeid.split("::")[-2:]), lines[0] if report.failed else report.outcome)
