"""Triton's kernels or csrc's CUDA: which serves an operation on a GPU, at which sizes.

The predictions are those of csrc/cuda/*.cu. Called one by one (EAGER), what the host does counts where kernels are
short: an operator of csrc costs it 13 µs with its results, a plan of Triton's launches 4 to 8 and 2 more a launch;
replayed from a graph (GRAPH) the kernels alone count, 1.3 µs each at least. An answer is a row of TABLE in
tfm/ops/backends.py, so an operation goes to csrc where it wins eagerly and is within its spread in a graph.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import bench_attention, bench_feed_forward, bench_norm
from benchmarks.shapes import FeedForward, Norm, Sentences
from benchmarks.shapes import Sequences as Shape
from benchmarks.suite import BOTH, FORWARD
from tools.tune.candidates.sweep import EAGER, Arguments, BackendSweep


def named(current: str, arguments: Arguments, backend: str) -> Iterator[str]:
    yield backend


def native(share: float) -> tuple[tuple[str, float], ...]:
    """Returns csrc, and the share of Triton's time that it is expected to take."""
    return (("native", share),)


SENTENCES = [Sentences(256, 8, 64), Sentences(256, 8, 64, "causal"), Sentences(256, 8, 64, "cross")]
LONGER = [Sentences(512, 16, 64, longest=64)]
BERT = [Shape(256, 128, 12, 64, "lengths"), Shape(128, 256, 12, 64, "lengths")]
FEW_SENTENCES = Sentences(2, 1, 16, "cross")

SWEEPS = (
    BackendSweep(
        "residual_layer_norm", bench_norm.LAYER, BOTH,
        question="Outside a graph, up to how many rows does what a call costs the host rule?",
        prediction="26 µs for csrc's two operators and 20 for Triton's plans of three launches, beside 40 of autograd"
        " for both: 1.09 at 1,024 x 512; at 8192 x 1024 the kernels' 38 µs hide behind either.",
        sizes=[Norm(1024, 512, 0.1), Norm(8192, 1024, 0.1)], rehearsal=Norm(6, 32, 0.1),
        table=native(1.09), settings=named, mode=EAGER,
    ),
    BackendSweep(
        "residual_layer_norm", bench_norm.LAYER, BOTH,
        question="In a graph, where the kernels alone count, is either LayerNorm faster?",
        prediction="Both move the same bytes: 41 µs at 8192 x 1024, within 3 %; at 16384 x 4096 Triton's tiles, which"
        " are two rows deep, are as fast.",
        sizes=[Norm(4096, 512, 0.1), Norm(8192, 1024, 0.1), Norm(16384, 4096)], rehearsal=Norm(6, 32, 0.1),
        table=native(1.00), settings=named,
    ),
    BackendSweep(
        "residual_rms_norm", bench_norm.RMS, BOTH,
        question="Outside a graph, is RMSNorm as LayerNorm?",
        prediction="1.09 of Triton's time at 1,024 x 512.",
        sizes=[Norm(1024, 512, 0.1)], rehearsal=Norm(6, 32, 0.1), table=native(1.09), settings=named, mode=EAGER,
    ),
    BackendSweep(
        "varlen_attention", bench_attention.PACKED, FORWARD,
        question="Sentences of some 14 tokens: a warp a pair and steps of 16 keys, or Triton's tile of 64 keys?",
        prediction="4.5 µs for 7: 0.64.",
        sizes=SENTENCES, rehearsal=FEW_SENTENCES, table=native(0.64), settings=named,
    ),
    BackendSweep(
        "varlen_attention", bench_attention.PACKED, BOTH,
        question="And with the backward, of which a multiprocessor holds 5 pairs by csrc and 3 by Triton?",
        prediction="12.5 µs for 20: 0.62.",
        sizes=SENTENCES, rehearsal=FEW_SENTENCES, table=native(0.62), settings=named,
    ),
    BackendSweep(
        "varlen_attention", bench_attention.PACKED, BOTH,
        question="Sentences of up to 64 tokens, which fill half of Triton's tile: is csrc still faster?",
        prediction="Memory takes 105 µs of either (453 MB); csrc's skipped steps gain 10 %.",
        sizes=LONGER, rehearsal=FEW_SENTENCES, table=native(0.90), settings=named,
    ),
    BackendSweep(
        "attention", bench_attention.PADDED, BOTH,
        question="From which length on do Triton's tiles of 64 rows, which HGMMA takes, beat csrc's of 16?",
        prediction="At 128 keys memory's 35 µs forward hide either's products; at 256 mma.sync's 350 TFLOP/s lose 5 %.",
        sizes=BERT, rehearsal=Shape(1, 70, 1, 16, "lengths"), table=native(1.05), settings=named,
    ),
    BackendSweep(
        "feed_forward", bench_feed_forward.PLAIN, BOTH,
        question="Of few rows outside a graph: does the host's time of csrc's two operators, 19 µs for 16 of Triton's"
        " plans, show beside four products by cuBLAS?",
        prediction="256 rows: 80 µs for 77, 1.04.",
        sizes=[FeedForward(256, 512, 2048, 0.1)], rehearsal=FeedForward(6, 32, 48, 0.1),
        table=native(1.04), settings=named, mode=EAGER,
    ),
    BackendSweep(
        "feed_forward", bench_feed_forward.PLAIN, BOTH,
        question="Of many rows in a graph: is cuBLAS with csrc's pass slower than Triton's epilogue?",
        prediction="1.08 at a depth of 512, two passes of 16 and 23 µs for 12 and 12 more of products; equal at 1,024.",
        sizes=[FeedForward(8192, 512, 2048, 0.1), FeedForward(8192, 1024, 4096, 0.1)],
        rehearsal=FeedForward(6, 32, 48, 0.1), table=native(1.05), settings=named,
    ),
)  # fmt: skip
