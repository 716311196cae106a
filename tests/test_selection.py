"""Which tests are left out, that it is told, and in which order the others run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import selection
from selection import SLOWEST, VARIABLE, Selection, long_but


class Item:
    """As much of a test as is looked at."""

    def __init__(self, file: str, *marks: str) -> None:
        self.path, self.marks = Path(file), marks

    def get_closest_marker(self, name: str) -> bool:
        return name in self.marks


def selected(plugin: Selection, *items: Item) -> tuple[list[Item], list[Item]]:
    """What is left of the items, and what pytest is told was left out."""
    told: list[Item] = []
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: told.extend(items)))
    left = list(items)
    plugin.pytest_collection_modifyitems(config, left)
    return left, told


def said(plugin: Selection) -> list[str]:
    lines: list[str] = []
    plugin.pytest_terminal_summary(SimpleNamespace(write_line=lines.append))
    return lines


def test_long_tests_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "EVERY", False)
    plugin = Selection(SimpleNamespace())
    first, long, gpu, last = Item("test_a.py"), Item("test_a.py", "long"), Item("test_a.py", "gpu"), Item("test_b.py")
    assert selected(plugin, first, long, gpu, last) == ([first, gpu, last], [long])
    assert said(plugin) == ["1 long tests left out: TFM_EVERY=1 runs them (make test-all)"]


def test_every_test_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "EVERY", True)
    plugin, long = Selection(SimpleNamespace()), Item("test_a.py", "long")
    assert selected(plugin, long) == ([long], [])
    assert said(plugin) == []


def test_the_slowest_files_come_first_in_their_own_order() -> None:
    early, late, one, two = Item("test_a.py"), Item("test_z.py"), *(Item(SLOWEST[-1]) for _ in range(2))
    assert selected(Selection(SimpleNamespace()), early, one, late, two)[0] == [one, two, early, late]
    assert all((Path(__file__).parent / name).is_file() for name in SLOWEST)


def test_what_processes_left_out_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "EVERY", False)
    workers = [SimpleNamespace(workeroutput={}) for _ in range(2)]
    for worker in workers:
        selected(Selection(worker), Item("test_a.py", "long"))
    assert [worker.workeroutput for worker in workers] == [{VARIABLE: 1}] * 2
    plugin = Selection(SimpleNamespace())
    # The second was started for a third that died.
    for node in (workers[0], SimpleNamespace(), workers[1]):
        plugin.pytest_testnodedown(node)
    assert said(plugin) == ["1 long tests left out: TFM_EVERY=1 runs them (make test-all)"]


def test_a_few_of_many_are_not_long() -> None:
    few, long = long_but(("a",), ("a", "b"))
    assert (few.values, few.marks, few.id) == (("a",), (), "a")
    assert (long.values, [mark.name for mark in long.marks]) == (("b",), ["long"])
