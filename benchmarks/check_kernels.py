"""Compiles every kernel for GPUs that need not be here, and fails on spills and on shared memory that does not fit.

    python -m benchmarks.check_kernels [--every] [--capability 90] [--cases benchmarks.kernel_cases]

Exit status 1 where a kernel's registers do not suffice (a spill, or any other stack) or its shared memory is above the
chip's limit.
"""

from __future__ import annotations

import os

# Interpreted kernels cannot be compiled; triton reads the variable when it is imported, and so do the pool's workers.
os.environ.pop("TRITON_INTERPRET", None)

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that one block may use (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_LIMITS = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes of a multiprocessor."""

    name: str
    capability: int
    registers: int
    stack: int
    shared: int

    @property
    def complaint(self) -> str:
        """Why this kernel must not ship; empty where it may."""
        if self.stack:
            return f"{self.stack} bytes of stack: the registers do not suffice"
        if self.shared > SHARED_LIMITS[self.capability]:
            return f"{self.shared} bytes of shared memory, the chip has {SHARED_LIMITS[self.capability]}"
        return ""


def compile_case(module: str, every: bool, index: int, capability: int) -> Usage:
    """Compiles case `index` of `module`; a worker finds it by number, as kernels do not travel between processes."""
    case = cases_of(module, every)[index]
    names = case.kernel.arg_names
    types = {name: given for name, given in case.arguments.items() if isinstance(given, str)}
    signature = {name: types[name].removesuffix(":16") if name in types else "constexpr" for name in names}
    constants = {(i,): case.arguments[name] for i, name in enumerate(names) if name not in types}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").endswith(":16")
    }
    source = ASTSource(case.kernel, signature, constants, aligned)
    options = {"num_warps": case.num_warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = resource_usage(compiled.asm["cubin"])
    return Usage(case.name, capability, registers, stack, compiled.metadata.shared)
