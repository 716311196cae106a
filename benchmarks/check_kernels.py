"""Compiles every kernel for GPUs that need not be here, and fails on spills and on shared memory that does not fit.

    python -m benchmarks.check_kernels [--every] [--cases benchmarks.kernel_cases]

Prints a table of registers and shared memory. Exit status 1 where a kernel has a stack (its registers did not suffice)
or more shared memory than the chip.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Bytes of shared memory that a block may use (CUDA C++ Programming Guide, technical specifications per capability).
SHARED_LIMITS = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes of a multiprocessor; stack and shared memory in bytes."""

    name: str
    capability: int
    num_warps: int
    registers: int
    stack: int
    shared: int

    @property
    def complaint(self) -> str:
        """Why this kernel must not ship; empty where it may."""
        if self.stack:
            return f"spills: {self.stack} bytes of stack"
        limit = SHARED_LIMITS[self.capability]
        return f"expected at most {limit} bytes of shared memory" if self.shared > limit else ""

    def __str__(self) -> str:
        numbers = f"{self.num_warps:5}  {self.registers:9}  {self.stack:5}  {self.shared:6}"
        return f"{self.name:<32}  sm_{self.capability:<3}  {numbers}  {self.complaint}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel and check its registers and shared memory.")
    parser.add_argument("--every", action="store_true", help="every launch setting and capability, not the hungriest")
    parser.add_argument("--cases", default="benchmarks.kernel_cases", help="the module that lists the kernels in ALL")
    arguments = parser.parse_args()
    capabilities = tuple(SHARED_LIMITS) if arguments.every else CAPABILITIES

    # Interpreted kernels cannot be compiled, and triton reads the variable when it is imported: here, in the workers.
    os.environ.pop("TRITON_INTERPRET", None)
    start = time.perf_counter()
    failures = 0
    print(f"{'kernel columns dtype':<32}  {'chip':<6}  warps  registers  stack  shared")
    # Fresh processes: a forked one would share torch's threads. Two: what a small machine has.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        names = pool.submit(case_names, arguments.cases, arguments.every).result()
        jobs = [
            pool.submit(compile_case, arguments.cases, arguments.every, index, capability)
            for index, capability in product(range(len(names)), capabilities)
        ]
        for job in jobs:
            usage = job.result()
            print(usage, flush=True)
            failures += bool(usage.complaint)
    seconds = time.perf_counter() - start
    print(f"{len(jobs)} compilations in {seconds:.0f} s, {failures} of them must not ship")
    return 1 if failures or not jobs else 0


def cases_of(module: str, every: bool) -> list[Any]:
    """The cases that `module` lists; imported late, so that only workers import triton."""
    return [case for family in importlib.import_module(module).ALL for case in family(every)]


def case_names(module: str, every: bool) -> list[str]:
    return [case.name for case in cases_of(module, every)]


def compile_case(module: str, every: bool, index: int, capability: int) -> Usage:
    """Compiles one case, found by its number: kernels do not travel between processes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case = cases_of(module, every)[index]
    signature, constants, aligned = {}, {}, {}
    for position, name in enumerate(case.kernel.arg_names):
        argument = case.arguments[name]
        if not isinstance(argument, str):
            signature[name] = "constexpr"
            constants[(position,)] = argument
            continue
        signature[name] = argument.removesuffix(":16")
        if argument.endswith(":16"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constants, aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = resource_usage(compiled.asm["cubin"], Path(triton.__file__).parent)
    return Usage(case.name, capability, case.num_warps, registers, stack, compiled.metadata.shared)


def resource_usage(cubin: bytes, triton_root: Path) -> tuple[int, int]:
    """Registers a thread and bytes of stack a thread, as cuobjdump of triton's wheel reads them."""
    cuobjdump = triton_root / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"expected REG and STACK in the output of cuobjdump, got {text!r}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    sys.exit(main())
