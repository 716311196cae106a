"""Compiles every kernel for GPUs that need not be here, and fails on what must not ship: Triton's, and where nvcc is
those of csrc/cuda.

    python -m benchmarks.check_kernels [--every] [--only layer_norm,attention] [--json FILE]

Prints a table: registers, stack and shared memory, how many blocks a multiprocessor holds, and the instructions that
speed depends on (loads and stores as count x bits); sm_90 has a line for each assembler that may make its kernels. Exit
status 1 where a kernel spills, does not fit the chip, does not compile, multiplies matrices on sm_90 without HGMMA or
one product at a time, touches what a product still uses, or loads what it stored without a barrier, unless
benchmarks/allowed.py says why it may; and where an exception there is not needed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks import assemblers, native_kernels
from benchmarks.allowed import Allowed
from benchmarks.chips import CHIPS
from benchmarks.compiled import CAPABILITIES, CASES, EVERY_CAPABILITY, OF_ASSEMBLERS, Compiled, compile_all

HEADER = "kernel\n  chip    by    warps  regs  stack  shared     blocks  instructions"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel; fail on what must not ship.")
    parser.add_argument("--every", action="store_true", help="every launch setting and chip, not the hungriest")
    parser.add_argument(
        "--only", type=_names, default=(), help="kernels whose name contains one of these: norm,attention"
    )
    parser.add_argument("--capabilities", type=_numbers, help="of the chips: 90,100")
    parser.add_argument("--workers", type=int, help="processes; one for each core where not given")
    parser.add_argument("--json", type=Path, help="where to write all rows")
    parser.add_argument("--cases", default=CASES, help="the module that lists the kernels in ALL")
    parser.add_argument("--allowed", default="benchmarks.allowed", help="the module that lists exceptions in ALLOWED")
    arguments = parser.parse_args()
    capabilities = arguments.capabilities or (EVERY_CAPABILITY if arguments.every else CAPABILITIES)

    if not set(capabilities) <= CHIPS.keys():
        parser.error(f"--capabilities: expected some of {', '.join(map(str, CHIPS))}, got {capabilities}")
    nvcc, why_not = native_kernels.usable() if arguments.cases == CASES else (None, f"not part of {arguments.cases}")
    start = time.perf_counter()
    print(HEADER)
    table = Table()
    native: list[Compiled] = []
    if nvcc is not None:
        native = native_kernels.compile_all(nvcc, capabilities, arguments.workers, arguments.only, report=table.add)
    try:
        rows = compile_all(
            arguments.cases, arguments.every, capabilities, arguments.workers, arguments.only,
            report=table.add,
        )  # fmt: skip
    except ValueError as error:
        if not native:
            parser.error(str(error))
        rows = []
    rows = native + rows
    seconds = time.perf_counter() - start
    if arguments.json:
        arguments.json.write_text(json.dumps([row.record() for row in rows], indent=1) + "\n")

    whole = arguments.every and not arguments.only and set(capabilities) >= set(EVERY_CAPABILITY)
    allowed = importlib.import_module(arguments.allowed).ALLOWED
    if nvcc is None:
        allowed = [exception for exception in allowed if not native_kernels.concerns(exception)]
    failures = verdict(rows, allowed, whole)
    slowest = max(rows, key=lambda row: row.seconds)
    print(f"\n{len(rows)} compilations in {seconds:.0f} s, {sum(row.seconds for row in rows):.0f} s of one core")
    print(f"slowest: {slowest.name}, sm_{slowest.capability}, {slowest.seconds:.0f} s of one core")
    print("\n".join(by_assembler(rows)))
    for line in assemblers.missing():
        print(line)
    if why_not:
        print(f"csrc/cuda was not compiled: {why_not}")
    print(f"{len(failures)} failures")
    print("\n".join(failures))
    return 1 if failures else 0


class Table:
    """A line for each chip, under the kernel's name, as the rows come."""

    def __init__(self) -> None:
        self.name = ""

    def add(self, row: Compiled) -> None:
        if row.name != self.name:
            self.name = row.name
            print(row.name)
        blocks = f"{row.blocks} ({row.occupancy:.0%})"
        used = f"{row.num_warps:5}  {row.registers:4}  {row.stack:5}  {row.shared:6}  {blocks:>9}"
        line = "does not compile" if row.error else f"{used}  {_mix(row.instructions)}"
        print(f"  sm_{row.capability:<3}  {row.release:4}  {line}", flush=True)


def _mix(instructions: dict[str, int]) -> str:
    """As "MUFU 8  LDG 4x128 2x16": tensor cores first."""
    counts = defaultdict(list)
    for opcode, count in sorted(instructions.items(), key=lambda item: "MMA" not in item[0]):
        name, _, bits = opcode.partition(".")
        counts[name].append(f"{count}x{bits}" if bits else str(count))
    return "  ".join(f"{name} {' '.join(numbers)}" for name, numbers in counts.items())


def by_assembler(rows: Sequence[Compiled]) -> list[str]:
    """A line for each assembler: its kernels, and how many have which of its faults."""
    lines = []
    for assembler in sorted({row.assembler for row in rows if row.assembler}):
        own = [row for row in rows if row.assembler == assembler]
        chips = ", ".join(f"sm_{chip}" for chip in sorted({row.capability for row in own}))
        faults = Counter(fault for row in own for fault in row.faults)
        spill, serialised, hazard, error = (faults[kind] for kind in ("spill", "serialised", "hazard", "error"))
        found = f"{spill} spill, {serialised} wait for each wgmma, {hazard} with hazards" + f", {error} refused" * (
            error > 0
        )
        lines.append(f"{assembler}: {len(own)} kernels of {chips}; {found}")
    return lines


def verdict(rows: Sequence[Compiled], allowed: Sequence[Allowed], whole: bool) -> list[str]:
    """What must not ship, a line each: faults that are not allowed, and exceptions that are not needed.

    `whole`: every case was compiled, so that an exception that no row takes is one for nothing.
    """
    excused = {
        (name, chip, tool, exception.fault)
        for exception in allowed
        for name in exception.kernels
        for chip in exception.capabilities
        for tool in exception.assemblers
    }
    found = {(row.name, row.capability, row.tool, kind): text for row in rows for kind, text in row.faults.items()}
    lines = set()
    for name, chip, tool, kind in found.keys() - excused:
        by = f", {tool}" * (kind in OF_ASSEMBLERS and tool != "")
        lines.add(f"{name}, sm_{chip}{by}: {found[name, chip, tool, kind]}")
    compiled = {(row.name, row.capability, row.tool) for row in rows}
    anyhow = {(name, chip) for name, chip, _ in compiled}
    for name, chip, tool, kind in excused - found.keys():
        if (name, chip, tool) in compiled:
            lines.add(f"{name}, sm_{chip}, {tool}: its exception ({kind}) is not needed")
        elif whole and (name, chip) not in anyhow:
            lines.add(f"{name}, sm_{chip}: its exception ({kind}) is not needed")
    return sorted(lines)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    sys.exit(main())
