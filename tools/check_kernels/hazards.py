"""Finds registers that pass between a warp group and its own asynchronous products without a wait, in machine code.

Hopper's HGMMA returns at once: until `WARPGROUP.DEPBAR` has waited for its group, it reads the registers of its first
factor and writes those of its sums. Whatever overwrites the former, or touches the latter, gives other numbers on some
runs and not on others. The assembler is to see to that; some of its versions did not.

All paths through the code are followed: at each place, each register in use is known with how many groups have been
closed (`gsb0`) since, at least. A wait for all but the last n groups sets free what is older than n.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# "/*0130*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;" and ".L_x_3:".
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{ *)?(@!?U?P\w+ +)?([A-Z][\w.]*)\s*([^;]*)", re.MULTILINE)
LABEL = re.compile(r"^\s*(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")
REGISTER = re.compile(r"\bR(\d+)\b")
SHAPE = re.compile(r"64x(\d+)x\d+")
# Products of 64 rows by a warp group: 16 bytes of the first factor a thread, whatever the type.
ASYNCHRONOUS, FACTOR_REGISTERS = ("HGMMA", "QGMMA", "IGMMA"), 4
# What names registers first, but writes none.
WITHOUT_RESULT = (
    "BAR", "BRA", "BRX", "BSSY", "BSYNC", "CALL", "CCTL", "DEPBAR", "ERRBAR", "EXIT", "FENCE", "LDGDEPBAR", "LDGSTS",
    "MEMBAR", "NANOSLEEP", "NOP", "R2UR", "RED", "REDG", "RET", "ST", "STG", "STL", "STS", "STSM", "SYNCS", "UTMALDG",
    "UTMASTG", "WARPGROUP", "WARPSYNC",
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly; `is_always` without a predicate."""

    address: int
    opcode: str
    operands: tuple[str, ...]
    is_always: bool

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def targets(self) -> list[str]:
        """The labels that it may go to."""
        return TARGET.findall(self.operands[-1]) if self.name == "BRA" and self.operands else []

    @property
    def goes_on(self) -> bool:
        """True where the next instruction in the code may come next."""
        if self.name == "BRA":
            return not self.is_always or len(self.operands) > 1
        return self.name not in ("EXIT", "RET", "KILL") or not self.is_always

    @property
    def written(self) -> range:
        """The registers of its result."""
        if self.name in WITHOUT_RESULT or not self.operands:
            return range(0)
        # A result may stand behind one predicate; where two come first, they are it.
        result = next((part for part in self.operands[:2] if not re.fullmatch(r"!?U?P[T\d]", part)), "")
        found = re.fullmatch(r"R(\d+)(?:\.\w+)*", result)
        return _registers(found, _width(self.opcode)) if found else range(0)

    @property
    def read(self) -> list[int]:
        """The registers that it reads, the first of several."""
        first = 1 if self.written else 0
        return [int(number) for part in self.operands[first:] for number in REGISTER.findall(part)]


# By register and whether it is written: groups closed since its product began, at least; that product's address.
Pending = dict[tuple[int, bool], tuple[int, int]]


def hazards(code: str) -> list[str]:
    """Lists the hazards in one kernel's disassembly, a line each, by address."""
    instructions, labels = _parsed(code)
    places = {0, *labels.values()}
    known: dict[int, Pending] = {}
    found: dict[int, str] = {}
    waiting: list[tuple[int, Pending]] = [(0, {})]
    while waiting:
        place, pending = waiting.pop()
        while place < len(instructions):
            if place in places:
                merged = _joined(known.get(place), pending)
                if merged is None:
                    break
                known[place], pending = merged, dict(merged)
            instruction = instructions[place]
            found.update((instruction.address, text) for text in _step(instruction, pending))
            waiting += [(labels[label], dict(pending)) for label in instruction.targets if label in labels]
            if not instruction.goes_on:
                break
            place += 1
    return [found[address] for address in sorted(found)]


def _step(instruction: Instruction, pending: Pending) -> Iterator[str]:
    """Yields what one instruction touches too early, and updates `pending`."""
    if instruction.name in ASYNCHRONOUS:
        sums, factor, *_ = instruction.operands
        wide = ".F32" in instruction.opcode or instruction.name == "IGMMA"
        width = int(SHAPE.findall(instruction.opcode)[0]) // (2 if wide else 4)
        reads = _registers(re.match(r"R(\d+)", factor), FACTOR_REGISTERS)
        yield from _touched(instruction, reads, (True,), pending)
        pending |= {(number, False): (0, instruction.address) for number in reads}
        pending |= {(number, True): (0, instruction.address) for number in _registers(re.match(r"R(\d+)", sums), width)}
        if "gsb0" in instruction.operands:
            for key, (age, address) in pending.items():
                pending[key] = (age + 1, address)
    elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        allowed = int(instruction.operands[-1], 16)
        for key in [key for key, (age, _) in pending.items() if age > allowed]:
            del pending[key]
    elif pending:
        yield from _touched(instruction, instruction.written, (False, True), pending)
        yield from _touched(instruction, instruction.read, (True,), pending)


def _touched(
    instruction: Instruction, registers: Iterable[int], uses: tuple[bool, ...], pending: Pending
) -> Iterator[str]:
    for number in registers:
        for is_written in uses:
            if (number, is_written) in pending:
                _, address = pending[number, is_written]
                use = "writes" if is_written else "reads"
                yield f"R{number} in {instruction.opcode} at {instruction.address:#x}, which {address:#x} still {use}"


def _joined(before: Pending | None, pending: Pending) -> Pending | None:
    """Merges two paths at one place, the worse for each register; None where the second adds nothing to the first."""
    if before is None:
        return dict(pending)
    worse = {key: now for key, now in pending.items() if key not in before or now[0] < before[key][0]}
    return before | worse if worse else None


def _parsed(code: str) -> tuple[list[Instruction], dict[str, int]]:
    """Returns the instructions, and for each label the number of the first one after it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := LINE.match(line):
            address, predicate, opcode, rest = found.groups()
            operands = tuple(part.strip(" {}") for part in rest.split(",") if part.strip(" {}"))
            instructions.append(Instruction(int(address, 16), opcode, operands, predicate is None))
    return instructions, labels


def _registers(first: re.Match[str] | None, width: int) -> range:
    return range(int(first[1]), int(first[1]) + width) if first else range(0)


def _width(opcode: str) -> int:
    """Returns the number of registers of a result."""
    name, *modifiers = opcode.split(".")
    if "128" in modifiers or name == "HMMA" or (name == "LDSM" and "4" in modifiers):
        return 4
    is_pair = "64" in modifiers or "WIDE" in modifiers or (name == "LDSM" and "2" in modifiers)
    return 2 if is_pair or (name == "CS2R" and "32" not in modifiers) else 1
