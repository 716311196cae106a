"""One small pass of every kernel, forward and backward, with what takes most of their paths: dropout, masks, odd sizes.

    compute-sanitizer --tool racecheck python -m benchmarks.sanitized_pass [OPERATION ...]

Under the sanitizer a kernel takes a hundred times as long, so the sizes are a few tiles and a rest. Without a GPU the
kernels run in Triton's interpreter. What passed is a line of the journal that TFM_JOURNAL names, if any.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.child import JOURNAL, append
from tfm import ops
from tfm.ops.backends import TABLE

DROPOUT_P = 0.1
# No multiples of tiles; COLUMNS and WIDTH are of 16, as matmuls want. Rows of WIDE columns do not fit the registers.
ROWS, COLUMNS, WIDTH, CLASSES, WIDE = 35, 80, 144, 1031, 8193
SHAPES = ((ROWS, COLUMNS), (3, WIDE))
LENGTHS = (1, 19, 66)
# Keys that are too many for the kernels of short sequences.
LONG = 300
HEADS, KEY_HEADS, HEAD_DIM = 2, 1, 40

Outputs = Tensor | tuple[Tensor, ...]


class Tensors:
    """Random tensors of one dtype on one device; each remembers to be differentiated."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.leaves: list[Tensor] = []

    def __call__(self, *shape: int) -> Tensor:
        leaf = torch.randn(shape, device=self.device).to(self.dtype).requires_grad_()
        self.leaves.append(leaf)
        return leaf

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, device=self.device)


def attention(new: Tensors) -> Iterator[Outputs]:
    batch, longest, lengths = len(LENGTHS), max(LENGTHS), new.integers(*LENGTHS)
    padding = {"key_lengths": lengths, "dropout_p": DROPOUT_P}
    bias = {"attn_mask": new(1, HEADS, longest, longest), "sinks": new(HEADS)}
    mask = {"attn_mask": new.below(2, batch, 1, 3, LONG).bool()}
    for queries, keys, options in (
        (longest, longest, {"is_causal": True} | padding),
        (longest, longest, {"window_size": (33, -1), "return_weights": True} | bias),
        (3, LONG, mask),
    ):
        query = new(batch, HEADS, queries, HEAD_DIM)
        key, value = (new(batch, KEY_HEADS, keys, HEAD_DIM) for _ in range(2))
        yield ops.attention(query, key, value, enable_gqa=True, impl="triton", **options)


def varlen_attention(new: Tensors) -> Iterator[Outputs]:
    total, longest = sum(LENGTHS), max(LENGTHS)
    starts = new.integers(0, *torch.tensor(LENGTHS).cumsum(0).tolist())
    for is_causal in (False, True):
        query, key, value = (new(total, HEADS, HEAD_DIM) for _ in range(3))
        yield ops.varlen_attention(
            query, key, value, starts, starts, longest, longest, DROPOUT_P, is_causal, impl="triton"
        )


def layer_norm(new: Tensors) -> Iterator[Outputs]:
    yield ops.layer_norm(new(ROWS, COLUMNS - 1), new(COLUMNS - 1), new(COLUMNS - 1), impl="triton")


def residual_layer_norm(new: Tensors) -> Iterator[Outputs]:
    for shape in SHAPES:
        weights = new(shape[1]), new(shape[1])
        yield ops.residual_layer_norm(new(*shape), new(*shape), *weights, dropout_p=DROPOUT_P, impl="triton")


def rms_norm(new: Tensors) -> Iterator[Outputs]:
    yield ops.rms_norm(new(ROWS, COLUMNS - 1), new(COLUMNS - 1), impl="triton")


def residual_rms_norm(new: Tensors) -> Iterator[Outputs]:
    x, residual = new(ROWS, COLUMNS), new(ROWS, COLUMNS)
    yield ops.residual_rms_norm(x, residual, new(COLUMNS), dropout_p=DROPOUT_P, impl="triton")


def feed_forward(new: Tensors) -> Iterator[Outputs]:
    for columns, activation in ((COLUMNS, "relu"), (COLUMNS, "gelu"), (COLUMNS - 1, "gelu")):
        first, second = (new(WIDTH, columns), new(WIDTH)), (new(columns, WIDTH), new(columns))
        yield ops.feed_forward(new(ROWS, columns), *first, *second, activation, DROPOUT_P, impl="triton")


def gated_feed_forward(new: Tensors) -> Iterator[Outputs]:
    for columns in (COLUMNS, COLUMNS - 1):
        gate, up, down = new(WIDTH, columns), new(WIDTH, columns), new(columns, WIDTH)
        yield ops.gated_feed_forward(new(ROWS, columns), gate, up, down, "silu", DROPOUT_P, impl="triton")


def linear_cross_entropy(new: Tensors) -> Iterator[Outputs]:
    target = new.below(CLASSES, ROWS)
    target[::5] = -100
    weight, bias = new(CLASSES, COLUMNS), new(CLASSES)
    for x in (new(ROWS, COLUMNS), new(ROWS, COLUMNS).detach()):
        with torch.set_grad_enabled(x.requires_grad):
            yield ops.linear_cross_entropy(
                x, weight, target, linear_bias=bias, label_smoothing=0.1, z_loss=1e-4, impl="triton"
            )


def embedding(new: Tensors) -> Iterator[Outputs]:
    tokens, positions = new.below(CLASSES, ROWS), new.below(WIDTH, ROWS)
    weight, learned = new(CLASSES, COLUMNS), new(WIDTH, COLUMNS)
    for table in (None, learned):
        yield ops.embedding(
            tokens, weight, positions, position_weight=table, dropout_p=DROPOUT_P, padding_idx=0, impl="triton"
        )


def rotary(new: Tensors) -> Iterator[Outputs]:
    tables = ops.rotary_table(LONG, HEAD_DIM // 2)
    cos, sin = (table.to(new.device) for table in tables)
    query, key = new(2, HEADS, LONG, HEAD_DIM), new(2, KEY_HEADS, LONG, HEAD_DIM)
    yield tuple(turned for turned in ops.rotary(query, key, cos, sin, impl="triton") if turned is not None)


def rotary_(new: Tensors) -> Iterator[Outputs]:
    cos, sin = (table.to(new.device) for table in ops.rotary_table(ROWS, HEAD_DIM))
    fused = new(ROWS, HEADS + 2 * KEY_HEADS, HEAD_DIM)
    yield ops.rotary_(2 * fused, HEADS + KEY_HEADS, cos, sin, interleaved=True, impl="triton")


PASSES: dict[str, Callable[[Tensors], Iterator[Outputs]]] = {
    function.__name__: function
    for function in (
        attention, varlen_attention, layer_norm, residual_layer_norm, rms_norm, residual_rms_norm, feed_forward,
        gated_feed_forward, linear_cross_entropy, embedding, rotary, rotary_,
    )
}  # fmt: skip


def run(operation: str, device: torch.device, dtype: torch.dtype) -> None:
    """One operation's kernels, forward and backward; the GPU is done when this returns."""
    new = Tensors(device, dtype)
    for outputs in PASSES[operation](new):
        given = [output for output in (outputs if isinstance(outputs, tuple) else (outputs,)) if output.requires_grad]
        if given:
            torch.autograd.grad(given, new.leaves, [torch.ones_like(output) for output in given], allow_unused=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def operations() -> list[str]:
    """Those that a kernel serves."""
    return list(dict.fromkeys(row.operation for row in TABLE if row.backend == "triton"))


def main(only: Sequence[str]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The interpreter's products of bf16 matrices are wrong, and some kernels are for halves alone.
    dtypes = [torch.float32, torch.float16, torch.bfloat16] if device.type == "cuda" else [torch.float16]
    for operation in operations():
        if only and not any(name in operation for name in only):
            continue
        for dtype in dtypes:
            run(operation, device, dtype)
            passed = f"{operation} {str(dtype).removeprefix('torch.')}"
            print(passed, flush=True)
            if JOURNAL in os.environ:
                append(Path(os.environ[JOURNAL]), {"passed": passed})


if __name__ == "__main__":
    main(sys.argv[1:])
