"""The machine code of a compiled kernel, as the disassemblers of triton's wheel print it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tools.check_kernels.assemblers import Assembled
from tools.check_kernels.hazards import hazards

# An address, a predicate, the instruction: "/*0130*/  @!P0 LDG.E.128 R4, ...".
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{ *)?(?:@!?U?P\w+ +)?([A-Z][\w.]*)", re.MULTILINE)
# Loads and stores of global memory, straight to shared memory too; they are counted by their width in bits.
BY_WIDTH = ("LDG", "STG", "LDGSTS")
# Special functions, the tensor copy engine's loads and stores, atomics, and what a spill does: local memory.
COUNTED = ("MUFU", "UTMALDG", "UTMASTG", "RED", "REDG", "ATOM", "ATOMG", "LDL", "STL")


@dataclass(frozen=True)
class MachineCode:
    """Registers and bytes of stack of a thread, and how many instructions of the kinds that speed depends on.

    `serialised` is the assembler's reason for waiting for each asynchronous product before the next, "" where it does
    not; `hazards` what tools.check_kernels.hazards finds.
    """

    registers: int
    stack: int
    instructions: dict[str, int]
    serialised: str
    hazards: list[str]


def read(assembled: Assembled) -> MachineCode:
    """Reads the machine code of one kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembled.cubin)
        file.flush()
        code = _output(knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)
    return MachineCode(
        assembled.registers, assembled.stack, count_instructions(code), assembled.serialised, hazards(code)
    )


def unread(assembled: Assembled) -> MachineCode:
    """Returns what the assembler said of one kernel, without its instructions."""
    return MachineCode(assembled.registers, assembled.stack, {}, assembled.serialised, [])


def disassemble(cubin: Path) -> dict[str, dict[str, int]]:
    """Runs `count_instructions` on each kernel in a file of several, by its mangled name."""
    from triton import knobs

    code = _output(knobs.nvidia.nvdisasm.path, "-c", "-ndf", str(cubin))
    _, *parts = re.split(r"^\.text\.(\w+):", code, flags=re.MULTILINE)
    return {name: count_instructions(part) for name, part in zip(parts[::2], parts[1::2], strict=True)}


def count_instructions(code: str) -> dict[str, int]:
    """Counts tensor-core instructions (HMMA, HGMMA, UTCHMMA, ...) and those of BY_WIDTH and COUNTED."""
    counts: Counter[str] = Counter()
    for opcode in INSTRUCTION.findall(code):
        name, *modifiers = opcode.split(".")
        if name in BY_WIDTH:
            counts[f"{name}.{_bits(modifiers)}"] += 1
        elif name in COUNTED or name.endswith("MMA"):
            counts[name] += 1
    return dict(sorted(counts.items()))


def _bits(modifiers: list[str]) -> int:
    """Returns the width of an access by its modifier, as in LDG.E.64 or LDG.E.U16; 32 without one."""
    widths = [int(found[1]) for found in map(re.compile(r"[US]?(8|16|64|128|256)").fullmatch, modifiers) if found]
    return widths[0] if widths else 32


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
