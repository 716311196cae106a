"""The limits of a multiprocessor of each compute capability, and how many blocks of a kernel fit on it at once.

CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; how registers and shared memory are
dealt out is from the occupancy calculator that came with CUDA 11.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
# On all chips below: registers of each of the multiprocessor's four parts, and in what numbers a warp is given them.
PARTS, PART_REGISTERS, REGISTER_UNIT = 4, 16384, 256
# Shared memory that the driver takes of each block, and in what numbers a block is given it; bytes.
RESERVED_SHARED, SHARED_UNIT = KIB, 128
# Columns of tensor memory on the chips that have one.
TENSOR_MEMORY = 512


@dataclass(frozen=True)
class Chip:
    """Most warps and blocks that a multiprocessor holds, and bytes of shared memory: in all, and for one block."""

    warps: int
    blocks: int
    shared: int
    block_shared: int


CHIPS = {
    80: Chip(64, 32, 164 * KIB, 163 * KIB),
    86: Chip(48, 16, 100 * KIB, 99 * KIB),
    89: Chip(48, 24, 100 * KIB, 99 * KIB),
    90: Chip(64, 32, 228 * KIB, 227 * KIB),
    100: Chip(64, 32, 228 * KIB, 227 * KIB),
    103: Chip(64, 32, 228 * KIB, 227 * KIB),
    120: Chip(48, 24, 100 * KIB, 99 * KIB),
}


def resident_blocks(capability: int, num_warps: int, registers: int, shared: int) -> int:
    """Returns how many blocks of `num_warps` warps a multiprocessor holds at once; 0 where not even one fits.

    Args:
        capability: of CHIPS.
        num_warps: of a block.
        registers: of a thread.
        shared: bytes of shared memory of a block.
    """
    chip = CHIPS[capability]
    warp_registers = _round_up(max(registers, 1) * 32, REGISTER_UNIT)
    by_registers = PARTS * (PART_REGISTERS // warp_registers) // _round_up(num_warps, PARTS)
    by_shared = chip.shared // _round_up(shared + RESERVED_SHARED, SHARED_UNIT)
    return min(chip.blocks, chip.warps // num_warps, by_registers, by_shared)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
