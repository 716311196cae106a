"""Compiles kernels for GPUs that need not be here, and says what they take of a multiprocessor.

A second run on unchanged sources takes seconds: Triton's cache holds the compiled kernels by their sources and options,
and beside them lies what the disassemblers said of each. TRITON_CACHE_DIR moves both.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import sass
from benchmarks.chips import CHIPS, TENSOR_MEMORY, resident_blocks
from benchmarks.rereads import rereads

if TYPE_CHECKING:
    from benchmarks.kernel_cases.case import Case

CASES = "benchmarks.kernel_cases"
CAPABILITIES = (80, 90, 100)
EVERY_CAPABILITY = (80, 86, 89, 90, 100, 120)
# Cases by their place in the list: kernels do not travel between processes. The module, every or not, the place.
Job = tuple[str, bool, int, str, int]


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on one chip: registers and bytes of stack a thread, bytes of shared memory a block.

    `tensor_memory` counts columns; `instructions` are those that benchmarks.sass counts, `rereads` what
    benchmarks.rereads finds; `seconds` of one core went by, few where the cache had it. A kernel that does not compile
    has an `error` and no numbers.
    """

    name: str
    capability: int
    matrix: bool = False
    num_warps: int = 0
    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    rereads: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def blocks(self) -> int:
        """That a multiprocessor holds at once, estimated."""
        if self.error:
            return 0
        return resident_blocks(self.capability, self.num_warps, self.registers, self.shared)

    @property
    def occupancy(self) -> float:
        """The share of the multiprocessor's warps that those blocks are."""
        return self.blocks * self.num_warps / CHIPS[self.capability].warps

    @property
    def faults(self) -> dict[str, str]:
        """Why this kernel must not ship: kind ("error", "spill", "shared", "tensor", "barrier") and explanation."""
        if self.error:
            return {"error": f"does not compile: {self.error}"}
        found = {}
        loads, stores = self.instructions.get("LDL", 0), self.instructions.get("STL", 0)
        if self.stack or loads or stores:
            found["spill"] = f"spills: {self.stack} bytes of stack, {loads} loads and {stores} stores"
        limit = CHIPS[self.capability].block_shared
        if self.shared > limit:
            found["shared"] = f"expected at most {limit} bytes of shared memory, got {self.shared}"
        if self.tensor_memory > TENSOR_MEMORY:
            found["shared"] = f"expected at most {TENSOR_MEMORY} columns of tensor memory, got {self.tensor_memory}"
        if self.matrix and self.capability == 90 and "HGMMA" not in self.instructions:
            found["tensor"] = "multiplies matrices, but without HGMMA"
        if self.rereads:
            found["barrier"] = f"loads what it stored without a barrier between: {', '.join(self.rereads)}"
        return found

    def record(self) -> dict[str, Any]:
        """The row as JSON holds it."""
        estimates = {"blocks": self.blocks, "occupancy": self.occupancy}
        return asdict(self) | estimates | {"faults": self.faults}


def compile_all(
    module: str = CASES,
    every: bool = False,
    capabilities: Sequence[int] = CAPABILITIES,
    workers: int | None = None,
    only: Sequence[str] = (),
    report: Callable[[Compiled], Any] = lambda _: None,
) -> list[Compiled]:
    """Compiles the cases that `module` lists in ALL, in processes of their own; nothing here raises for a kernel.

    Args:
        module: lists functions of `every` that give benchmarks.kernel_cases.case.Case.
        every: the full product of settings, not the hungriest.
        capabilities: of the chips, as 90 for sm_90.
        workers: processes; None is one for each core.
        only: parts of names; cases whose name contains none of them are left out. None given takes all.
        report: is called with each row as it comes.

    Returns:
        A row for each case and capability, in the order of the cases.

    Raises:
        ValueError: a capability that benchmarks.chips does not know, or no case of such a name.
    """
    for capability in capabilities:
        if capability not in CHIPS:
            raise ValueError(f"capability: expected one of {', '.join(map(str, CHIPS))}, got {capability}")
    workers = workers or len(os.sched_getaffinity(0))
    rows = []
    with _compiling():
        with _pool(1) as pool:
            listed = pool.submit(_names_and_chips, module, every).result()
        jobs = [
            (module, every, place, name, capability)
            for (place, (name, chips)), capability in product(enumerate(listed), capabilities)
            if (chips is None or capability in chips) and (not only or any(part in name for part in only))
        ]
        if not jobs:
            raise ValueError(f"expected a kernel with {' or '.join(only) or 'any name'} in {module}, got none")
        for row in _in_order(jobs, workers):
            rows.append(row)
            report(row)
    return rows


def _in_order(jobs: Sequence[Job], workers: int) -> Iterator[Compiled]:
    """The jobs' rows; a compiler that takes its process down with it is one row, not the end of the run."""
    done = 0
    while done < len(jobs):
        with _pool(min(workers, len(jobs) - done)) as pool:
            futures = [pool.submit(_compile_job, *job) for job in jobs[done:]]
            try:
                for future in futures:
                    yield future.result()
                    done += 1
                return
            except BrokenProcessPool:
                pass
        # Whichever died, the first without a result is run alone; the others find what they had done in the cache.
        with _pool(1) as pool:
            try:
                yield pool.submit(_compile_job, *jobs[done]).result()
            except BrokenProcessPool:
                _, _, _, name, capability = jobs[done]
                yield Compiled(name, capability, error="the compiler ended its process")
        done += 1


def _pool(workers: int) -> ProcessPoolExecutor:
    # Fresh processes: a forked one would share torch's threads.
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


@contextmanager
def _compiling() -> Iterator[None]:
    """Without Triton's interpreter: the processes started here import triton anew, and read the variable then."""
    interpreting = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if interpreting is not None:
            os.environ["TRITON_INTERPRET"] = interpreting


@cache
def cases_of(module: str, every: bool) -> list[Case]:
    """The cases that `module` lists; imported late, so that only workers import triton."""
    return [case for family in importlib.import_module(module).ALL for case in family(every)]


def _names_and_chips(module: str, every: bool) -> list[tuple[str, tuple[int, ...] | None]]:
    return [(case.name, case.capabilities) for case in cases_of(module, every)]


def _compile_job(module: str, every: bool, place: int, name: str, capability: int) -> Compiled:
    try:
        return compile_case(cases_of(module, every)[place], capability)
    except Exception as error:  # whatever stops the compiler is a finding about this kernel
        reason = " ".join(str(error).split())
        return Compiled(name, capability, error=f"{type(error).__name__}: {reason[:300]}")


def compile_case(case: Case, capability: int) -> Compiled:
    """Compiles one case, or takes it from the cache."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = sum(os.times()[:4])  # of this process and of its children, ptxas and the disassemblers
    signature, constants, aligned = {}, {}, {}
    for position, parameter in enumerate(case.kernel.params):
        name, argument = parameter.name, case.arguments[parameter.name]
        if parameter.is_constexpr or not isinstance(argument, str):
            signature[name] = "constexpr"
            constants[(position,)] = argument
            continue
        signature[name] = argument.removesuffix(":16")
        if argument.endswith(":16"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constants, aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.max_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code, metadata = _read_cubin(compiled.asm["cubin"]), compiled.metadata
    return Compiled(
        case.name, capability, case.matrix, metadata.num_warps, code.registers, code.stack, metadata.shared,
        metadata.tmem_size or 0, code.instructions, rereads(compiled.asm["ttir"], case.apart),
        seconds=sum(os.times()[:4]) - start,
    )  # fmt: skip


def _read_cubin(cubin: bytes) -> sass.MachineCode:
    """`sass.read_cubin`, kept in Triton's cache under what was read and what read it."""
    from triton.runtime.cache import get_cache_manager

    reader = Path(sass.__file__).read_bytes()
    stored = get_cache_manager(hashlib.sha256(reader + cubin).hexdigest())
    file = stored.get_file("machine_code.json")
    if file is not None:
        return sass.MachineCode(**json.loads(Path(file).read_text()))
    code = sass.read_cubin(cubin)
    stored.put(json.dumps(asdict(code)), "machine_code.json", binary=False)
    return code
