"""The faults that tools.check_kernels allows, each with its reason; one that is no longer needed fails there too."""

from __future__ import annotations

from dataclasses import dataclass

from tools.check_kernels.assemblers import NAMES

NEWER = ("ptxas-blackwell",)


@dataclass(frozen=True)
class Allowed:
    """A fault that each of these kernels, by its case's name, may have on each of these chips.

    `fault` is a key of tools.check_kernels.compiled.Compiled.faults: "error", "spill", "shared", "tensor", "barrier",
    "serialised" or "hazard"; by each of these `assemblers` that makes the chip's kernels, nvcc those of csrc. Where not
    every supported triton makes it so, `since` is the first that does and `until` the last: another's run neither
    excuses the fault nor misses it.
    """

    kernels: tuple[str, ...]
    capabilities: tuple[int, ...]
    fault: str
    reason: str
    assemblers: tuple[str, ...] = (*NAMES, "nvcc")
    since: tuple[int, int] = (0, 0)
    until: tuple[int, int] | None = None

    def is_for(self, triton: str) -> bool:
        """Tells whether it is about kernels as this version of triton makes them, "3.7.1"."""
        version = tuple(map(int, triton.split(".")[:2]))
        return self.since <= version and (self.until is None or version <= self.until)


ALLOWED: tuple[Allowed, ...] = (
    Allowed(
        ("attention_backward_keys 256 bias dropout bf16 wide no dv",), (90,), "spill",
        reason="24 to 152 bytes at the widest heads, with a bias and dropout at once; smaller tiles have no HGMMA.",
    ),
    Allowed(
        ("attention_backward_keys 256 bias dropout bf16 wide no dk",), (90,), "spill", assemblers=NEWER, since=(3, 7),
        until=(3, 7), reason="16 bytes at the widest heads; one stage instead of two spills five times that.",
    ),
    Allowed(
        (
            "attention_backward_keys 256 mask dropout bf16 wide no dv",
            "attention_backward_keys 256 mask dropout bf16 wide uncapped no dv",
        ),
        (90,), "spill", assemblers=NEWER, since=(3, 7), until=(3, 8),
        reason="16 to 112 bytes at the widest heads; one stage instead of two spills five times that.",
    ),
    Allowed(
        ("attention_forward 128 distance dropout bf16 wide",), (90,), "spill", assemblers=NEWER, since=(3, 7),
        until=(3, 7), reason="8 bytes; every key of a tile has its own place among the distances.",
    ),
    Allowed(
        ("attention_backward_queries 128 bias dropout fp32 exact",), (90,), "spill", assemblers=("ptxas",),
        since=(3, 7), until=(3, 7), reason="8 bytes, one load, of dropout's words beside a bias.",
    ),
    Allowed(
        ("attention_backward_queries 64 bias dropout fp32 exact",), (90,), "spill", assemblers=NEWER, since=(3, 7),
        until=(3, 7), reason="8 bytes, never loaded again.",
    ),
    Allowed(
        ("attention_forward 464 bias dropout bf16 shared",), (90, 100), "spill", assemblers=NEWER, since=(3, 7),
        until=(3, 7), reason="16 to 24 bytes of programs that share keys at the widest heads, where bytes count.",
    ),
    Allowed(
        ("relative_bias_gradient 16x16 of 256 for sm_90 bf16",), (90,), "spill", assemblers=("ptxas",), since=(3, 7),
        until=(3, 7), reason="8 bytes, one load, at the least tile.",
    ),
    Allowed(
        ("relative_bias_gradient 16x16 of 464 for sm_90 bf16",), (90,), "spill", assemblers=NEWER, since=(3, 7),
        until=(3, 7), reason="32 bytes at heads of slices and the least tile.",
    ),
    Allowed(
        ("relative_bias_gradient 16x16 of 464 for sm_100 bf16",), (100,), "spill", assemblers=NEWER, since=(3, 7),
        until=(3, 7), reason="40 bytes at heads of slices and the least tile.",
    ),
    *(
        Allowed(
            ("linear_activation_backward 8192/sm_90 gelu bf16",), (90,), "spill", assemblers=NEWER,
            since=one, until=one, reason="8 bytes, as its gated one's.",
        )
        for one in ((3, 7), (3, 9))
    ),
    Allowed(
        ("short_attention_forward 64x256 of 64 packed bf16",), (90,), "spill",
        reason="8 and 120 bytes where a program holds a row of 256 scores; tiles of 32 queries have no HGMMA.",
    ),
    Allowed(
        ("short_attention_backward 16x256 of 64 packed dq dk bf16",), (90,), "spill", assemblers=NEWER, since=(3, 7),
        until=(3, 8),
        reason="24 to 40 bytes at the longest row, which is in two passes, of the fewest queries, as it is.",
    ),
    Allowed(
        ("attention_forward 256 bias dropout fp32 exact",), (80,), "spill", since=(3, 7),
        reason="8 bytes at the widest heads, which fp32 holds in registers, with a bias and dropout at once.",
    ),
    Allowed(
        ("attention_backward_queries 464 bias dropout bf16 narrow",), (80, 86, 89), "spill",
        reason="16 bytes at heads that are slices, with a bias and dropout at once; tiles of a quarter spill as much.",
    ),
    Allowed(
        ("decode_attention grouped 128 fp32 without k v parents",), (86, 89), "spill",
        reason="8 bytes under the cap of registers, without which wider calls spill on other chips.",
    ),
    Allowed(
        ("attention_forward 128 mask dropout bf16 narrow",), (86, 89, 120), "spill", until=(3, 6),
        reason="16 to 48 bytes at the cap of registers; newer tritons need none.",
    ),
    Allowed(
        (
            "attention_backward_queries 128 mask dropout bf16 narrow",
            "attention_backward_queries 64 bias dropout bf16 narrow",
            "attention_backward_keys 64 mask dropout bf16 narrow",
            "attention_backward_keys 64 mask dropout bf16 narrow uncapped",
            "attention_backward_keys 64 padded bf16 narrow uncapped",
        ),
        (80, 86, 89), "spill", until=(3, 6),
        reason="8 to 24 bytes at the cap of registers; newer tritons need none.",
    ),
    Allowed(
        ("attention_backward_queries 64 mask dropout fp32 exact",), (80, 86, 89, 90, 100, 120), "spill", until=(3, 6),
        reason="8 to 16 bytes at the cap of registers; newer tritons need none.",
    ),
    Allowed(
        ("cross_entropy 32768 bf16 everything",), (90,), "spill", assemblers=("ptxas",), until=(3, 6),
        reason="8 bytes of a row with a bias, a softcap and z-loss at once; newer tritons need none.",
    ),
    Allowed(
        ("attention_backward_queries 64 bias bf16 wide",), (90,), "spill", until=(3, 6),
        reason="8 bytes at the cap of registers; newer tritons need none.",
    ),
    Allowed(
        ("attention_backward_queries 256 bias dropout bf16 wide",), (100,), "spill", until=(3, 6),
        reason="8 bytes at the widest heads; newer tritons need none.",
    ),
    Allowed(
        ("linear_activation 1024/sm_90 gelu gated bf16", "linear_activation 8192/sm_90 gelu gated bf16"), (90,),
        "spill", since=(3, 8),
        reason="128 to 304 bytes under the 128 registers of two programs: older tritons need none.",
    ),
    Allowed(
        ("linear_activation 8192/sm_80 gelu gated bf16", "linear_activation_backward 8192/sm_80 gelu bf16"), (80,),
        "spill", since=(3, 8), reason="32 and 128 bytes under the registers of two programs: older tritons need none.",
    ),
    Allowed(
        (
            "attention_backward_queries 64 mask dropout fp32 exact",
            "attention_weights 32x32 of 128 bias fp32",
            "short_attention_backward 16x64 of 64 bias fp32",
        ),
        (90,), "spill", assemblers=NEWER, since=(3, 8),
        reason="8 to 24 bytes in fp32, at the cap of registers; older tritons need none.",
    ),
    Allowed(
        ("attention_weights 64x64 of 256 bias bf16 8 warps",), (100,), "spill", since=(3, 8),
        reason="40 and 48 bytes at the widest heads; older tritons need none.",
    ),
    Allowed(
        (
            "activation_dropout_backward 511 gelu bf16",
            "attention_backward_keys 128 dropout bf16 wide uncapped",
            "attention_backward_keys 192 dropout bf16 wide uncapped",
            "attention_backward_keys 64 bias dropout fp32 exact",
            "short_attention_backward 16x256 of 64 mask dq dk bf16",
        ),
        (90,), "spill", assemblers=NEWER, since=(3, 8), until=(3, 8),
        reason="8 to 24 bytes at the cap of registers; triton 3.7 and 3.9 need none.",
    ),
    Allowed(
        ("cross_entropy 32768 fp32",), (90,), "spill", assemblers=NEWER, since=(3, 8),
        reason="8 bytes of a row of 32,768 logits; triton 3.7 needs none.",
    ),
    Allowed(
        ("cross_entropy 32768 bf16",), (90,), "spill", assemblers=NEWER, since=(3, 8), until=(3, 8),
        reason="8 bytes, as that of fp32.",
    ),
    Allowed(
        ("attention_backward_queries 256 bias dropout bf16 wide",), (100,), "spill", since=(3, 8), until=(3, 8),
        reason="16 bytes at the widest heads; triton 3.7 and 3.9 need none.",
    ),
    Allowed(
        ("attention_backward_keys 192 bias dropout fp32 exact",), (90,), "spill", since=(3, 9),
        reason="8 and 24 bytes in fp32, at the cap of registers; older tritons need none.",
    ),
    Allowed(
        (
            "attention_backward_keys 192 bias dropout bf16 wide no dv",
            "attention_backward_queries 64 bias dropout fp32 exact",
        ),
        (90,), "spill", assemblers=NEWER, since=(3, 9),
        reason="8 to 32 bytes at the cap of registers; older tritons need none.",
    ),
)  # fmt: skip
