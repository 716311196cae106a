"""Says what of the compiled kernels must not ship, and how each assembler did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version

from tools.check_kernels.allowed import Allowed
from tools.check_kernels.compiled import OF_ASSEMBLERS, Compiled


def by_assembler(rows: Sequence[Compiled]) -> list[str]:
    """Returns a line for each assembler: its kernels, and how many have which of its faults."""
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
    """Returns what must not ship, a line each: faults that are not allowed, and exceptions that are not needed.

    `whole`: every case was compiled, so that an exception that no row takes is one for nothing. Exceptions for other
    versions of triton than the installed one, which compiled the rows, do not count.
    """
    triton = version("triton")
    excused = {
        (name, chip, tool, exception.fault)
        for exception in allowed
        if exception.is_for(triton)
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
