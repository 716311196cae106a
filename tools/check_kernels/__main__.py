"""Compiles every kernel for GPUs that need not be here, and fails on what must not ship: Triton's, and where nvcc is
those of csrc/cuda.

    python -m tools.check_kernels [--every] [--only layer_norm,attention] [--json FILE]

Prints a table: registers, stack and shared memory, how many blocks a multiprocessor holds, and the instructions that
speed depends on (loads and stores as count x bits); sm_90 has a line for each assembler that may make its kernels, the
second with instructions where it schedules products. Exit status 1 where a kernel spills, does not fit the chip, does
not compile, multiplies matrices on sm_90 without HGMMA or one product at a time, touches what a product still uses, or
loads what it stored without a barrier, unless tools/check_kernels/allowed.py says why it may under this triton; and
where an exception there is not needed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

from tools.check_kernels import assemblers, native
from tools.check_kernels.chips import CHIPS
from tools.check_kernels.compiled import CAPABILITIES, CASES, EVERY_CAPABILITY, Compiled, compile_all
from tools.check_kernels.verdict import by_assembler, verdict

ALLOWED = "tools.check_kernels.allowed"
HEADER = "kernel\n  chip    by    warps  regs  stack  shared     blocks  instructions"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel; fail on what must not ship.")
    parser.add_argument(
        "--every", action="store_true", help="compile every launch setting for every chip, not only the hungriest"
    )
    parser.add_argument(
        "--only", type=_names, default=(), help="compile only kernels whose name contains one of these: norm,attention"
    )
    parser.add_argument("--capabilities", type=_numbers, help="compute capabilities of the chips: 90,100")
    parser.add_argument("--workers", type=int, help="number of processes; default: one for each core")
    parser.add_argument("--json", type=Path, help="file to write all rows to")
    parser.add_argument("--cases", default=CASES, help="the module that lists the kernels in ALL")
    parser.add_argument("--allowed", default=ALLOWED, help="the module that lists exceptions in ALLOWED")
    arguments = parser.parse_args()
    capabilities = arguments.capabilities or (EVERY_CAPABILITY if arguments.every else CAPABILITIES)
    of_csrc = arguments.capabilities or (EVERY_CAPABILITY if arguments.every else native.CAPABILITIES)

    if not set(capabilities) <= CHIPS.keys():
        parser.error(f"--capabilities: expected some of {', '.join(map(str, CHIPS))}, got {capabilities}")
    nvcc, why_not = native.usable() if arguments.cases == CASES else (None, f"not part of {arguments.cases}")
    start = time.perf_counter()
    print(HEADER)
    table = Table()
    rows: list[Compiled] = []
    if nvcc is not None:
        rows = native.compile_all(nvcc, of_csrc, arguments.workers, arguments.only, report=table.add)
    try:
        rows += compile_all(
            arguments.cases, arguments.every, capabilities, arguments.workers, arguments.only,
            report=table.add,
        )  # fmt: skip
    except ValueError as error:
        if not rows:
            parser.error(str(error))
    seconds = time.perf_counter() - start
    if arguments.json:
        arguments.json.write_text(json.dumps([row.record() for row in rows], indent=1) + "\n")

    whole = arguments.every and not arguments.only and set(capabilities) >= set(EVERY_CAPABILITY)
    allowed = importlib.import_module(arguments.allowed).ALLOWED
    if nvcc is None:
        allowed = [exception for exception in allowed if not native.concerns(exception)]
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
    """The table of a run: a line for each chip under the kernel's name, as the rows come."""

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
    """Formats counts of instructions as "MUFU 8  LDG 4x128 2x16", tensor cores first."""
    counts = defaultdict(list)
    for opcode, count in sorted(instructions.items(), key=lambda item: "MMA" not in item[0]):
        name, _, bits = opcode.partition(".")
        counts[name].append(f"{count}x{bits}" if bits else str(count))
    return "  ".join(f"{name} {' '.join(numbers)}" for name, numbers in counts.items())


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    sys.exit(main())
