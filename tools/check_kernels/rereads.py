"""Finds what a kernel stores and may load again without a barrier between, in Triton's first intermediate form.

Threads of one program share no order but a barrier's. Triton puts one where values pass through shared memory, none
where they pass through an address: what one thread stored another may load before it is there, if layouts differ.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

ARGUMENT = re.compile(r"(%\w+): !tt\.ptr")
RESULT = re.compile(r"(%\w+)(?::\d+)? = ")
VALUE = re.compile(r"%\w+")
LOCATION = re.compile(r" loc\([^()]*(?:\([^()]*\))*[^()]*\)")
LOOP = re.compile(r"scf\.for (%\w+) = (%[\w#]+) to (%[\w#]+) ")
LOOP_ARGUMENT = re.compile(r"(%\w+) = (%[\w#]+)")
BARRIER = re.compile(r"\b(?:gpu|ttg)\.barrier\b")


@dataclass(frozen=True)
class Region:
    """A block between braces: a loop and its variable, a branch of a condition, or another operation's.

    `continues` is the number of the loop that ended where this one begins, as an unrolled loop's remainder does.
    """

    number: int
    is_loop: bool = False
    variable: str = ""
    branch: int = 0
    continues: int | None = None


@dataclass(frozen=True)
class Event:
    """A load, a store or a barrier: its address, the arguments that comes from, the loop variables it depends on."""

    kind: str
    line: int
    regions: tuple[Region, ...]
    address: str = ""
    origins: frozenset[str] = frozenset()
    variables: frozenset[str] = frozenset()


def rereads(ttir: str, apart: Collection[str] = ()) -> list[str]:
    """Returns the arguments that are loaded after a store to them, on some path without a barrier; sorted.

    `apart` names those whose loads never meet their stores, which the intermediate form cannot show.
    """
    events = list(_events(ttir))
    barriers = [event for event in events if event.kind == "barrier"]
    found: set[str] = set()
    for store in (event for event in events if event.kind == "store"):
        for load in (event for event in events if event.kind == "load"):
            if (shared := store.origins & load.origins) and _may_meet(store, load, barriers):
                found |= shared
    return sorted({name.removeprefix("%") for name in found} - set(apart))


def _may_meet(store: Event, load: Event, barriers: list[Event]) -> bool:
    common = [region for region in store.regions if region in load.regions]
    loops = [region for region in reversed(common) if region.is_loop]
    branches = {region.number for region in store.regions} & {region.number for region in load.regions}
    if store.line < load.line and len(branches) == len(common):  # else the two branches of one condition
        # Two addresses of what an iteration has to itself are two tiles.
        apart = bool(loops) and loops[0].variable in store.variables & load.variables and store.address != load.address
        apart = apart or _is_of_remainder(load, store)
        if not apart and not any(store.line < barrier.line < load.line for barrier in barriers):
            return True
    for loop in loops:
        # Each iteration stores to a tile of its own, where it has loaded before.
        if loop.variable in store.variables & load.variables:
            continue
        return not any(loop in b.regions and (b.line > store.line or b.line < load.line) for b in barriers)
    return False


def _is_of_remainder(load: Event, store: Event) -> bool:
    """Tells whether the load is in the remainder of the store's loop, whose iterations have tiles of their own."""
    return any(
        loop.number == rest.continues and loop.variable in store.variables and rest.variable in load.variables
        for loop in store.regions
        for rest in load.regions
    )


def _events(ttir: str) -> Iterator[Event]:
    origins: dict[str, frozenset[str]] = {}
    variables: dict[str, frozenset[str]] = {}
    ended: dict[str, int] = {}
    regions: tuple[Region, ...] = ()
    for number, line in enumerate(LOCATION.sub("", ttir).splitlines()):
        line = line.strip()
        if line.startswith("tt.func"):
            origins = {name: frozenset((name,)) for name in ARGUMENT.findall(line)}
        closed = None
        if line.startswith("}") and regions:
            *outer, closed = regions
            regions = tuple(outer)
        variable, continues = "", None
        if loop := LOOP.search(line):
            variable, start, end = loop.groups()
            variables[variable], continues = frozenset((variable,)), ended.get(start)
            ended[end] = number
        for name, given in LOOP_ARGUMENT.findall(line) if "iter_args" in line else ():
            for known in (origins, variables):
                known[name] = known.get(name, frozenset()) | known.get(given, frozenset())
        if result := RESULT.match(line):
            used = VALUE.findall(line[result.end() :])
            for known in (origins, variables):
                known[result[1]] = frozenset().union(*(known.get(value, frozenset()) for value in used))
            # A loaded value is data: it does not point to where it came from.
            if " = tt.load " in line:
                yield _access("load", number, regions, used[0], origins, variables)
                origins[result[1]] = frozenset()
        elif line.startswith("tt.store "):
            yield _access("store", number, regions, VALUE.findall(line)[0], origins, variables)
        if BARRIER.search(line):
            yield Event("barrier", number, regions)
        if line.endswith("{"):
            is_else = closed is not None and "else" in line
            entered = (
                Region(closed.number, branch=closed.branch + 1)
                if closed and is_else
                else Region(number, "scf.for" in line or "scf.while" in line, variable, continues=continues)
            )
            regions = (*regions, entered)


def _access(
    kind: str, line: int, regions: tuple[Region, ...], address: str,
    origins: dict[str, frozenset[str]], variables: dict[str, frozenset[str]],
) -> Event:  # fmt: skip
    nothing = frozenset[str]()
    return Event(kind, line, regions, address, origins.get(address, nothing), variables.get(address, nothing))
