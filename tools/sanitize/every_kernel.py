"""One small pass of every kernel, Triton's and csrc's, with what takes most of their paths: dropout, masks, odd sizes.

    compute-sanitizer --tool racecheck python -m tools.sanitize.every_kernel [OPERATION ...]

Under the sanitizer a kernel takes a hundred times as long, so the sizes are a few tiles and a rest; forward and
backward both. Without a GPU Triton's kernels run in its interpreter, and csrc's are those for CPUs. What passed is a
line of the journal that TFM_JOURNAL names, if any, and so is a backend that is not there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tfm import native, ops
from tfm.ops import backends
from tools import interpreter
from tools.gpu.child import JOURNAL, append

DROPOUT_P = 0.1
# No multiples of tiles; COLUMNS and WIDTH are of 16, as matmuls want. Rows of WIDE columns do not fit the registers.
ROWS, COLUMNS, WIDTH, CLASSES, WIDE = 35, 80, 144, 1031, 8193
# Columns that matmuls' tiles divide.
EVEN = 128
SHAPES = ((ROWS, COLUMNS), (3, WIDE))
LENGTHS = (1, 19, 66)
# Keys that are too many for the kernels of short sequences, and as many as csrc's for GPUs take.
LONG, SHORT = 300, 256
# Keys and queries that fit the kernels of short sequences in every dtype.
FEW = 17
HEADS, KEY_HEADS, HEAD_DIM = 2, 1, 40

Outputs = Tensor | tuple[Tensor, ...]


class Tensors:
    """Random tensors of one dtype on one device; each remembers to be differentiated.

    `short`: attention is that of csrc on GPUs: few keys, no bias that learns, no weights.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, short: bool = False) -> None:
        self.device, self.dtype, self.short = device, dtype, short
        self.leaves: list[Tensor] = []

    def __call__(self, *shape: int) -> Tensor:
        leaf = torch.randn(shape, device=self.device).to(self.dtype).requires_grad_()
        self.leaves.append(leaf)
        return leaf

    def biases(self, *shape: int) -> Tensor:
        """They learn where attention's may."""
        return self(*shape).detach() if self.short else self(*shape)

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, device=self.device)


def attention(new: Tensors) -> Iterator[Outputs]:
    batch, longest, lengths = len(LENGTHS), max(LENGTHS), new.integers(*LENGTHS)
    padding = {"key_lengths": lengths, "dropout_p": DROPOUT_P}
    most = SHORT if new.short else LONG
    bias = {"attn_mask": new.biases(1, HEADS, longest, longest), "sinks": new(HEADS)}
    mask = {"attn_mask": new.below(2, batch, 1, 3, most).bool()}
    starts = {"query_start": new.integers(*range(batch)), "window_size": (-1, 60), "return_lse": True}
    for queries, keys, options in (
        (longest, longest, {"is_causal": True} | padding),
        (longest, longest, {"window_size": (33, -1), "return_weights": not new.short} | bias),
        (3, most, mask),
        (3, most, {"scale": 1000.0} | padding),
        (FEW, FEW, {"attn_mask": new.below(2, batch, 1, FEW, FEW).bool(), "return_weights": not new.short} | starts),
        (FEW, FEW, {"attn_mask": new.below(2, batch, 1, 1, FEW).bool()}),
        (FEW, FEW, {"attn_mask": new.biases(1, HEADS, 1, FEW)}),
        (3, most, bias | {"attn_mask": new.biases(HEADS, 3, most), "return_weights": not new.short} | padding | starts),
    ):
        query = new(batch, HEADS, queries, HEAD_DIM)
        key, value = (new(batch, KEY_HEADS, keys, HEAD_DIM) for _ in range(2))
        yield ops.attention(query, key, value, enable_gqa=True, **options)


def varlen_attention(new: Tensors) -> Iterator[Outputs]:
    total, longest = sum(LENGTHS), max(LENGTHS)
    starts = new.integers(0, *torch.tensor(LENGTHS).cumsum(0).tolist())
    for is_causal in (False, True):
        query, key, value = (new(total, HEADS, HEAD_DIM) for _ in range(3))
        yield ops.varlen_attention(query, key, value, starts, starts, longest, longest, DROPOUT_P, is_causal)
    most = SHORT if new.short else LONG
    query, (key, value) = new(7, HEADS, HEAD_DIM), (new(most + 4, HEADS, HEAD_DIM) for _ in range(2))
    starts, key_starts = new.integers(0, 1, 4, 7), new.integers(0, 3, most + 3, most + 4)
    yield ops.varlen_attention(query, key, value, starts, key_starts, 3, most)


def decode_attention(new: Tensors) -> Iterator[Outputs]:
    rows = len(LENGTHS)
    own = torch.arange(rows, dtype=torch.int32, device=new.device)[:, None]
    # One piece of the keys and several; a place that a row writes is its own in every ancestry.
    for capacity, key_heads, parents in ((max(LENGTHS), HEADS, None), (LONG, KEY_HEADS, own.flip(0).repeat(1, LONG))):
        lengths = new.integers(0, capacity - 1, capacity)
        if parents is not None:
            parents[:, capacity - 3 :] = own
        query, key, value = (new(rows, heads, HEAD_DIM).detach() for heads in (HEADS, key_heads, key_heads))
        key_cache, value_cache = (new(rows, capacity, key_heads, HEAD_DIM).detach() for _ in range(2))
        yield ops.decode_attention(query, key_cache, value_cache, lengths, parents, key=key, value=value)


def layer_norm(new: Tensors) -> Iterator[Outputs]:
    yield ops.layer_norm(new(ROWS, COLUMNS - 1), new(COLUMNS - 1), new(COLUMNS - 1))


def residual_layer_norm(new: Tensors) -> Iterator[Outputs]:
    for shape in SHAPES:
        weight, bias, x_bias = (new(shape[1]) for _ in range(3))
        yield ops.residual_layer_norm(new(*shape), new(*shape), weight, bias, dropout_p=DROPOUT_P, x_bias=x_bias)


def rms_norm(new: Tensors) -> Iterator[Outputs]:
    yield ops.rms_norm(new(ROWS, COLUMNS - 1), new(COLUMNS - 1))


def residual_rms_norm(new: Tensors) -> Iterator[Outputs]:
    x, residual = new(ROWS, COLUMNS), new(ROWS, COLUMNS)
    yield ops.residual_rms_norm(x, residual, new(COLUMNS), dropout_p=DROPOUT_P)


def feed_forward(new: Tensors) -> Iterator[Outputs]:
    for columns, activation in ((COLUMNS, "relu"), (COLUMNS, "gelu"), (COLUMNS - 1, "gelu"), (EVEN, "silu")):
        first, second = (new(WIDTH, columns), new(WIDTH)), (new(columns, WIDTH), new(columns))
        yield ops.feed_forward(new(ROWS, columns), *first, *second, activation, DROPOUT_P)


def gated_feed_forward(new: Tensors) -> Iterator[Outputs]:
    for columns in (COLUMNS, COLUMNS - 1):
        gate, up, down = new(WIDTH, columns), new(WIDTH, columns), new(columns, WIDTH)
        yield ops.gated_feed_forward(new(ROWS, columns), gate, up, down, "silu", DROPOUT_P)


def linear_cross_entropy(new: Tensors) -> Iterator[Outputs]:
    target = new.below(CLASSES, ROWS)
    target[::5] = -100
    weight, bias = new(CLASSES, COLUMNS), new(CLASSES)
    for x in (new(ROWS, COLUMNS), new(ROWS, COLUMNS).detach()):
        with torch.set_grad_enabled(x.requires_grad):
            yield ops.linear_cross_entropy(x, weight, target, linear_bias=bias, label_smoothing=0.1, z_loss=1e-4)
    yield ops.linear_cross_entropy(new(3, COLUMNS), new(WIDE, COLUMNS), new.below(WIDE, 3), reduction="none")


def embedding(new: Tensors) -> Iterator[Outputs]:
    tokens, positions = new.below(CLASSES, ROWS), new.below(WIDTH, ROWS)
    weight, learned = new(CLASSES, COLUMNS), new(WIDTH, COLUMNS)
    for table in (None, learned):
        yield ops.embedding(tokens, weight, positions, position_weight=table, dropout_p=DROPOUT_P, padding_idx=0)
    # So many of one token that they are added up in parts.
    often = new.below(WIDTH, 3 * ROWS)
    often[3:] = 5
    for sparse in (False, True):
        yield ops.embedding(often, learned, new.below(WIDTH, 3 * ROWS), dropout_p=DROPOUT_P, sparse=sparse)


def rotary(new: Tensors) -> Iterator[Outputs]:
    tables = ops.rotary_table(LONG, HEAD_DIM // 2)
    cos, sin = (table.to(new.device) for table in tables)
    query, key = new(2, HEADS, LONG, HEAD_DIM), new(2, KEY_HEADS, LONG, HEAD_DIM)
    yield tuple(turned for turned in ops.rotary(query, key, cos, sin) if turned is not None)


def rotary_(new: Tensors) -> Iterator[Outputs]:
    cos, sin = (table.to(new.device) for table in ops.rotary_table(ROWS, HEAD_DIM))
    fused = new(ROWS, HEADS + 2 * KEY_HEADS, HEAD_DIM)
    for positions in (None, new.below(ROWS, ROWS)):
        yield ops.rotary_(2 * fused, HEADS + KEY_HEADS, cos, sin, positions, interleaved=True)


PASSES: dict[str, Callable[[Tensors], Iterator[Outputs]]] = {
    function.__name__: function
    for function in (
        attention, varlen_attention, decode_attention, layer_norm, residual_layer_norm, rms_norm, residual_rms_norm,
        feed_forward, gated_feed_forward, linear_cross_entropy, embedding, rotary, rotary_,
    )
}  # fmt: skip


def run(backend: str, operation: str, device: torch.device, dtype: torch.dtype) -> None:
    """One operation's kernels, forward and backward; the GPU is done when this returns."""
    new = Tensors(device, dtype, short=backend == "native" and device.type == "cuda")
    with backends.use(backend):
        for outputs in PASSES[operation](new):
            given = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
            if given:
                torch.autograd.grad(given, new.leaves, [torch.ones_like(x) for x in given], allow_unused=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def served(backend: str, device: torch.device) -> dict[str, tuple[torch.dtype, ...]]:
    """The operations that the backend's kernels serve on such a device, with the dtypes that they are passed in."""
    rows = [row for row in backends.TABLE if row.backend == backend and row.device in ("", device.type)]
    halves = torch.float16, torch.bfloat16
    csrcs = backend == "native" and device.type == "cuda"
    return {
        operation: halves if csrcs and "attention" in operation else row.dtypes
        for row in rows
        for operation in row.operations
    }


def missing(backend: str, device: torch.device) -> str:
    """Why the backend's kernels cannot run here, in words; empty where they can."""
    if backend == "native":
        return native.obstacle(device)
    return backends.triton_obstacle(device, automatic=False)


def main(only: Sequence[str]) -> None:
    interpreter.mend()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for backend in ("triton", "native"):
        if reason := missing(backend, device):
            note("missing", f"{backend}: {reason}")
            continue
        for operation, dtypes in served(backend, device).items():
            if only and not any(name in operation for name in only):
                continue
            for dtype in dtypes:
                run(backend, operation, device, dtype)
                note("passed", f"{backend} {operation} {str(dtype).removeprefix('torch.')}")


def note(kind: str, what: str) -> None:
    print(f"{kind}: {what}", flush=True)
    if JOURNAL in os.environ:
        append(Path(os.environ[JOURNAL]), {kind: what})


if __name__ == "__main__":
    main(sys.argv[1:])
