"""What benchmarks.check_kernels lets pass, each with its reason; what is no longer needed fails there too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Allowed:
    """Each of these kernels, by its case's name, has this fault on each of these chips.

    `fault` is a key of benchmarks.compiled.Compiled.faults: "error", "spill", "shared", "tensor" or "barrier".
    """

    kernels: tuple[str, ...]
    capabilities: tuple[int, ...]
    fault: str
    reason: str


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
        (
            "attention_backward_keys 64 padded uncapped bf16 narrow", "attention_backward_queries 64 padded fp32 exact",
            "attention_forward 64 bias dropout fp32 exact",
        ), (80,), "spill",
        reason="8 bytes under the cap of registers.",
    ),
    Allowed(
        (
            "attention_weights 64x64 of 128 bias bf16", "attention_weights 64x64 of 256 bias bf16",
            "bias_gradient 64x64 of 128 bf16", "short_attention_backward 16x256 of 64 mask dq dk bf16",
            "short_attention_backward 16x64 of 64 bias fp32",
        ), (100,), "spill",
        reason="16 to 96 bytes; the tiles are sm_90's, and no record of an sm_100 says which others to take.",
    ),
)  # fmt: skip
