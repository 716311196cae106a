"""The open questions about launch settings and backends that tools.tune tries, with candidates and predictions.

One file for each family. A new one adds its SWEEPS to FAMILIES. A question about settings is worth a GPU's time where
an answer is expected to gain 2 %, or where the choice is between a kernel and doing without it; a question that a run
has answered goes. The numbers that predictions rest on are an H200's: 4.3 TB/s of copying, 790 TFLOP/s of bf16
products, 1.3 µs a kernel inside a graph.

What no function chooses today is settled by the record of `make gpu` instead:

loads by the tensor memory accelerator or by pointers    The streamed cross-entropy takes descriptors, all other kernels
    pointers. Where `linear_activation` stays below 500 TFLOP/s, or attention below 390 at a head dim of 64, and ncu's
    first reason to stall is the long scoreboard, descriptors are worth writing there.
dq, dk and dv in one pass over tiles    Seven products in two passes for five in one, which would add dq by atomics, so
    that sums had no order. Two passes should reach 71 % of cuDNN's backward; below 60 % the tiles are at fault.
norms beyond 32,768 columns    Triton's loop over chunks has no end; TABLE in tfm/ops/backends.py stops where the tests
    do. No model in use is as wide.
"""

from tools.tune.candidates import (
    attention,
    backends,
    cross_entropy,
    decode_attention,
    feed_forward,
    norm,
    short_attention,
)
from tools.tune.candidates.sweep import Sweep

FAMILIES: dict[str, tuple[Sweep, ...]] = {
    "norm": norm.SWEEPS,
    "attention": attention.SWEEPS,
    "short_attention": short_attention.SWEEPS,
    "decode_attention": decode_attention.SWEEPS,
    "feed_forward": feed_forward.SWEEPS,
    "cross_entropy": cross_entropy.SWEEPS,
    "backends": backends.SWEEPS,
}
