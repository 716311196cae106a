"""What benchmarks.check_kernels lets pass, each with its reason; what is no longer needed fails there too."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.assemblers import NAMES


@dataclass(frozen=True)
class Allowed:
    """Each of these kernels, by its case's name, has this fault on each of these chips.

    `fault` is a key of benchmarks.compiled.Compiled.faults: "error", "spill", "shared", "tensor", "barrier",
    "serialised" or "hazard"; by each of these `assemblers` that makes the chip's kernels, nvcc those of csrc.
    """

    kernels: tuple[str, ...]
    capabilities: tuple[int, ...]
    fault: str
    reason: str
    assemblers: tuple[str, ...] = (*NAMES, "nvcc")


ALLOWED: tuple[Allowed, ...] = (
    Allowed(
        ("layer_norm_backward x_bias 128 fp32",), (120,), "spill",
        reason="One address of 8 bytes, stored before the loop over the rows and read after it.",
    ),
    Allowed(
        ("attention_backward_keys 256 bias dropout no dv bf16 wide",), (90,), "spill",
        reason="48 bytes at the widest heads, with a bias and dropout at once; smaller tiles have no HGMMA.",
    ),
    Allowed(
        ("decode_attention 16 of 128 grouped fp32 without k v parents",), (86, 89), "spill",
        reason="8 bytes under the cap of registers, without which wider calls spill on other chips.",
    ),
    Allowed(
        ("attention_forward 64 bias dropout fp32 exact",), (80,), "spill",
        reason="8 bytes for a fourth program on a multiprocessor; rows without them have fewer warps there.",
    ),
)  # fmt: skip
