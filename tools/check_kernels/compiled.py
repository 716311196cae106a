"""Compiles kernels for GPUs that need not be here, and says what they take of a multiprocessor.

A second run on unchanged sources takes seconds: Triton's cache holds the compiled kernels by their sources and options,
and beside them lies what each assembler made of each. TRITON_CACHE_DIR moves both.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.check_kernels import assemblers, hazards, sass
from tools.check_kernels.assemblers import Assembler
from tools.check_kernels.chips import CHIPS, TENSOR_MEMORY, resident_blocks
from tools.check_kernels.rereads import rereads

if TYPE_CHECKING:
    from tools.check_kernels.case import Case

CASES = "tools.subjects"
CAPABILITIES = (80, 90, 100)
EVERY_CAPABILITY = (80, 86, 89, 90, 100, 120)
# Cases by their place in the list: kernels do not travel between processes. The module, every or not, the place; name,
# chip, and whether by every assembler.
Job = tuple[str, bool, int, str, int, bool]
# These faults differ by assembler; the others are the kernel's whichever assembles it.
OF_ASSEMBLERS = ("error", "spill", "serialised", "hazard")


@dataclass(frozen=True)
class Compiled:
    """The resources of one kernel on one chip: registers and bytes of stack a thread, bytes of shared memory a block.

    By one `assembler`, as it prints itself; "" where the kernel came to none. `tensor_memory` counts columns;
    `instructions` are those that tools.check_kernels.sass counts, `serialised` and `hazards` as there, `rereads` what
    tools.check_kernels.rereads finds; `seconds` of one core went by, few where the cache had it. A kernel that does not
    compile has an `error` and no numbers.
    """

    name: str
    capability: int
    assembler: str = ""
    matrix: bool = False
    num_warps: int = 0
    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    serialised: str = ""
    hazards: list[str] = field(default_factory=list)
    rereads: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def tool(self) -> str:
        """Its assembler's name; `release` is the version of that."""
        return self.assembler.partition(" ")[0]

    @property
    def release(self) -> str:
        return self.assembler.partition(" ")[2]

    @property
    def blocks(self) -> int:
        """The estimated number of blocks that a multiprocessor holds at once."""
        if self.error:
            return 0
        return resident_blocks(self.capability, self.num_warps, self.registers, self.shared)

    @property
    def occupancy(self) -> float:
        """The share of the multiprocessor's warps that those blocks are."""
        return self.blocks * self.num_warps / CHIPS[self.capability].warps

    @property
    def faults(self) -> dict[str, str]:
        """The reasons why this kernel must not ship: each kind, named as in tools.check_kernels.allowed, explained."""
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
        if self.serialised:
            found["serialised"] = f"waits for each wgmma before the next: {self.serialised}"
        if self.hazards:
            found["hazard"] = f"touches registers of a wgmma before its wait: {self.hazards[0]}"
        if self.rereads:
            found["barrier"] = f"loads what it stored without a barrier between: {', '.join(self.rereads)}"
        return found

    def record(self) -> dict[str, Any]:
        """Returns the row as JSON holds it."""
        estimates = {"blocks": self.blocks, "occupancy": self.occupancy}
        return asdict(self) | estimates | {"faults": self.faults}


def compile_all(
    module: str = CASES,
    every: bool = False,
    capabilities: Sequence[int] = CAPABILITIES,
    workers: int | None = None,
    only: Sequence[str] = (),
    report: Callable[[Compiled], Any] = lambda _: None,
    by_every: bool = True,
    chosen: bool = True,
) -> list[Compiled]:
    """Compiles the cases that `module` lists in ALL, in processes of their own; nothing here raises for a kernel.

    Args:
        module: lists functions of `every` that give tools.check_kernels.case.Case.
        every: the full product of settings, not the hungriest.
        capabilities: of the chips, as 90 for sm_90.
        workers: processes; None is one for each core.
        only: parts of names; cases whose name contains none of them are left out. None given takes all.
        report: is called with each row as it comes.
        by_every: with every assembler that may make a chip's kernels, not Triton's own alone.
        chosen: of the cases that are not of `every` setting, the most telling of each chip.

    Returns:
        A row for each case, capability and assembler, in the order of the cases.

    Raises:
        ValueError: a capability that tools.check_kernels.chips does not know, or no case of such a name.
    """
    for capability in capabilities:
        if capability not in CHIPS:
            raise ValueError(f"capability: expected one of {', '.join(map(str, CHIPS))}, got {capability}")
    workers, rows = workers or len(os.sched_getaffinity(0)), []
    with _compiling(), _pool(workers) as pool:
        listed = pool.submit(_names_and_chips, module, every, chosen and not every).result()
        jobs = [
            (module, every, place, name, capability, by_every)
            for (place, (name, chips)), capability in product(enumerate(listed), capabilities)
            if (chips is None or capability in chips) and (not only or any(part in name for part in only))
        ]
        if not jobs:
            raise ValueError(f"expected a kernel with {' or '.join(only) or 'any name'} in {module}, got none")
        for row in chain.from_iterable(_in_order(jobs, workers, pool)):
            rows.append(row)
            report(row)
    return rows


def _in_order(jobs: Sequence[Job], workers: int, pool: ProcessPoolExecutor) -> Iterator[list[Compiled]]:
    """Yields each job's rows; a compiler that takes its process down with it is one row, not the end of the run."""
    done = 0
    futures = [pool.submit(_compile_job, *job) for job in jobs]
    try:
        for future in futures:
            yield future.result()
            done += 1
        return
    except BrokenProcessPool:
        pass
    # Whichever died, the first without a result is run alone; the others find what they had done in the cache.
    with _pool(1) as alone:
        try:
            yield alone.submit(_compile_job, *jobs[done]).result()
        except BrokenProcessPool:
            _, _, _, name, capability, _ = jobs[done]
            yield [Compiled(name, capability, error="the compiler ended its process")]
    with _pool(workers) as others:
        yield from _in_order(jobs[done + 1 :], workers, others)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Fresh processes: a forked one would share torch's threads.
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


@contextmanager
def _compiling() -> Iterator[None]:
    """Switches Triton's interpreter off: the processes started here import triton anew, and read the variable then."""
    interpreting = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if interpreting is not None:
            os.environ["TRITON_INTERPRET"] = interpreting


@cache
def cases_of(module: str, every: bool) -> list[Case]:
    """Lists the cases of `module`; imported late, so that only workers import triton."""
    return [case for family in importlib.import_module(module).ALL for case in family(every)]


def _names_and_chips(module: str, every: bool, chosen: bool) -> list[tuple[str, tuple[int, ...] | None]]:
    from tools.check_kernels.case import telling

    cases = cases_of(module, every)
    chips = telling(cases) if chosen else [case.capabilities for case in cases]
    return [(case.name, those) for case, those in zip(cases, chips, strict=True)]


def _compile_job(module: str, every: bool, place: int, name: str, capability: int, by_every: bool) -> list[Compiled]:
    try:
        return list(compile_case(cases_of(module, every)[place], capability, by_every))
    except Exception as error:  # whatever stops the compiler is a finding about this kernel
        return [Compiled(name, capability, error=_brief(error))]


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def compile_case(case: Case, capability: int, by_every: bool = True) -> Iterator[Compiled]:
    """Compiles one case, or takes it from the cache; a row for each assembler, Triton's own first."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = _seconds()
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}

    def kind(argument: Any, place: tuple[int, ...], is_constant: bool) -> Any:
        """Returns an argument's type, as Triton's signatures write it; of a tuple those of its fields."""
        if isinstance(argument, tuple) and not is_constant:
            kinds = [kind(field, (*place, i), False) for i, field in enumerate(argument)]
            return type(argument)(*kinds) if hasattr(argument, "_fields") else tuple(kinds)
        if is_constant or not isinstance(argument, str):
            constants[place] = argument
            return "constexpr"
        if argument.endswith(":16"):
            aligned[place] = [["tt.divisibility", 16]]
        return argument.removesuffix(":16")

    signature = {
        parameter.name: kind(case.arguments[parameter.name], (position,), parameter.is_constexpr)
        for position, parameter in enumerate(case.kernel.params)
    }
    source = ASTSource(case.kernel, signature, constants, aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.max_registers}
    with assemblers.heard() as said:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    again, metadata = rereads(compiled.asm["ttir"], case.apart), compiled.metadata
    for place, assembler in enumerate(assemblers.of(capability, by_every)):
        row = Compiled(
            case.name, capability, str(assembler), case.matrix, metadata.num_warps, shared=metadata.shared,
            tensor_memory=metadata.tmem_size or 0, rereads=again,
        )  # fmt: skip
        try:
            log = said.getvalue() if place == 0 else ""
            # Other assemblers' instructions matter where one may touch what a product still uses.
            code = _machine_code(compiled.asm, assembler, capability, options, log, place == 0 or case.matrix)
            row = replace(row, **asdict(code))
        except Exception as error:  # one assembler may refuse what another takes
            row = Compiled(case.name, capability, str(assembler), error=_brief(error))
        yield replace(row, seconds=_seconds() - start)
        start = _seconds()


def _machine_code(
    asm: Mapping[str, Any], assembler: Assembler, capability: int, options: dict[str, Any], said: str, is_read: bool
) -> sass.MachineCode:
    """Returns what `assembler` makes of a kernel, kept in Triton's cache under all that decides it.

    `said`: its words where it has just made the kernel; "" where it has not, or Triton had the kernel from its cache.
    `is_read`: whether its instructions are told too, which takes longer than to assemble them.
    """
    import triton
    from triton.runtime.cache import get_cache_manager

    readers = b"".join(Path(str(module.__file__)).read_bytes() for module in (assemblers, hazards, sass))
    key = repr((str(assembler), capability, triton.__version__, sorted(options.items()), asm["ptx"], is_read))
    stored = get_cache_manager(hashlib.sha256(readers + key.encode()).hexdigest())
    file = stored.get_file("machine_code.json")
    if file is not None:
        return sass.MachineCode(**json.loads(Path(file).read_text()))
    if said:
        assembled = assemblers.Assembled(asm["cubin"], *assemblers.what_it_said(said))
    else:
        assembled = assemblers.assemble(asm["ptx"], assembler, capability, options)
    code = sass.read(assembled) if is_read else sass.unread(assembled)
    stored.put(json.dumps(asdict(code)), "machine_code.json", binary=False)
    return code


def _seconds() -> float:
    """Returns the processor time of this process and of its children, the assemblers and the disassembler."""
    return sum(os.times()[:4])
