"""What tools.check_kernels lets pass, each with its reason; what is no longer needed fails there too."""

from __future__ import annotations

from dataclasses import dataclass

from tools.check_kernels.assemblers import NAMES

NEWER = ("ptxas-blackwell",)


@dataclass(frozen=True)
class Allowed:
    """Each of these kernels, by its case's name, has this fault on each of these chips.

    `fault` is a key of tools.check_kernels.compiled.Compiled.faults: "error", "spill", "shared", "tensor", "barrier",
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
        ("attention_backward_keys 256 bias dropout bf16 wide no dv",), (90,), "spill",
        reason="24 and 144 bytes at the widest heads, with a bias and dropout at once; smaller tiles have no HGMMA.",
    ),
    Allowed(
        (
            "attention_backward_keys 256 bias dropout bf16 wide no dk",
            "attention_backward_keys 256 mask dropout bf16 wide no dv",
            "attention_backward_keys 256 mask dropout bf16 wide uncapped no dv",
        ),
        (90,), "spill", assemblers=NEWER,
        reason="16 to 112 bytes at the widest heads; one stage instead of two spills five times that.",
    ),
    Allowed(
        (
            "attention_backward_keys 128 dropout bf16 wide uncapped",
            "attention_backward_keys 192 dropout bf16 wide uncapped",
        ),
        (90,), "spill", assemblers=NEWER,
        reason="16 bytes; with a softcap none, and dk and dv one after the other would form all scores twice.",
    ),
    Allowed(
        ("linear_activation_backward 8192/sm_90 gelu bf16", "linear_activation_backward 8192/sm_90 gelu gated bf16"),
        (90,), "spill", assemblers=NEWER,
        reason="8 bytes under the 128 registers of two programs; slices of 8 columns would store halves of sectors.",
    ),
    Allowed(
        ("short_attention_forward 64x256 of 64 packed bf16",), (90,), "spill",
        reason="8 and 120 bytes where a program holds a row of 256 scores; tiles of 32 queries have no HGMMA.",
    ),
    Allowed(
        (
            "short_attention_backward 16x256 of 64 mask dq dk bf16",
            "short_attention_backward 16x256 of 64 packed dq dk bf16",
        ),
        (90,), "spill", assemblers=NEWER,
        reason="24 to 40 bytes at the longest row, which is in two passes, of the fewest queries, as it is.",
    ),
    Allowed(
        ("short_attention_forward 16x128 of 64 bias fp32",), (90,), "spill", assemblers=NEWER,
        reason="16 bytes for a third program on a multiprocessor.",
    ),
    Allowed(
        ("decode_attention 16 of 128 grouped fp32 without k v parents",), (86, 89), "spill",
        reason="8 bytes under the cap of registers, without which wider calls spill on other chips.",
    ),
)  # fmt: skip
