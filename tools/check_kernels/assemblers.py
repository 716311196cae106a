"""The assemblers that triton's wheel brings, and what each makes of a kernel's PTX.

Triton takes "ptxas" up to sm_90 and "ptxas-blackwell", which is newer, from sm_100 on; from triton 3.9 on the newer one
for sm_90 too. So sm_90's kernels are made by both: what fits the registers by one may spill by the other. Every other
chip has one assembler in all versions.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from typing import Any

NAMES = ("ptxas", "ptxas-blackwell")
# Chips whose kernels every assembler makes.
BY_EVERY = (90,)
PTX_VERSION = re.compile(r"(?<=\.version )(\d+)\.(\d+)")
# In the assembler's words (-v): why it waits for each asynchronous product before the next.
SERIALISED = re.compile(r"\(C7515\).*?wgmma\S* instructions are serialized due to (.*?) in (?:the )?function")


@dataclass(frozen=True)
class Assembler:
    """One of NAMES, and the release that this wheel has of it."""

    name: str
    release: str
    path: str

    def __str__(self) -> str:
        return f"{self.name} {self.release}"


@dataclass(frozen=True)
class Assembled:
    """A kernel's machine code, and what the assembler said: registers and stack of a thread, why it serialised."""

    cubin: bytes
    registers: int
    stack: int
    serialised: str


@cache
def found() -> dict[str, Assembler]:
    """Returns those of NAMES that this triton has, by name."""
    from triton import knobs

    tools = {}
    for name in NAMES:
        try:
            tool = getattr(knobs.nvidia, name.replace("-", "_"))
        except (AttributeError, RuntimeError):  # triton knows no such assembler, or its wheel lacks it
            continue
        tools[name] = Assembler(name, tool.version, tool.path)
    return tools


def missing() -> list[str]:
    """Returns a line for each of NAMES that this triton lacks."""
    import triton

    return [f"triton {triton.__version__} has no {name}: not checked with it" for name in NAMES if name not in found()]


def own(capability: int) -> Assembler:
    """Returns the assembler that Triton takes for this chip."""
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(capability)
    return next(assembler for assembler in found().values() if assembler.path == tool.path)


def of(capability: int, every: bool) -> list[Assembler]:
    """Returns Triton's own for this chip first; with `every` the others that may make its kernels, too."""
    first = own(capability)
    return [first, *(other for other in found().values() if every and capability in BY_EVERY and other != first)]


@contextmanager
def heard(assembler: Assembler | None = None) -> Iterator[io.StringIO]:
    """Yields what the assembler says to whatever is compiled meanwhile; by this assembler instead of Triton's own."""
    from triton import knobs

    with knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as said:
        knobs.nvidia.dump_ptxas_log = True
        if assembler is not None:
            knobs.nvidia.ptxas = knobs.nvidia.ptxas_blackwell = assembler.path
        yield said


def assemble(ptx: str, assembler: Assembler, capability: int, options: dict[str, Any]) -> Assembled:
    """Assembles as Triton's backend would with this assembler: its flags, and the kernel's `options`.

    Raises:
        PTXASError: it does not take this PTX.
    """
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend, ptx_get_version

    backend = CUDABackend(GPUTarget("cuda", capability, 32))
    # PTX written for a newer assembler names a version that an older one would refuse unread.
    newest = divmod(ptx_get_version(assembler.release), 10)
    ptx = PTX_VERSION.sub(lambda known: "{}.{}".format(*min(newest, (int(known[1]), int(known[2])))), ptx, count=1)
    with heard(assembler) as said:
        cubin = backend.make_cubin(ptx, {}, backend.parse_options(dict(options)), capability)
    return Assembled(cubin, *what_it_said(said.getvalue()))


def what_it_said(log: str) -> tuple[int, int, str]:
    """Returns registers, bytes of stack, and why it serialised asynchronous products; "" where it did not.

    Raises:
        RuntimeError: the log is another's.
    """
    usage = re.search(r"(\d+) bytes stack frame.*?Used (\d+) registers", log, re.DOTALL)
    if usage is None:
        raise RuntimeError(f"expected stack frame and registers in the assembler's log, got {log!r}")
    serialised = SERIALISED.search(log)
    return int(usage[2]), int(usage[1]), serialised[1] if serialised else ""
