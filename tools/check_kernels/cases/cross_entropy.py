"""Cross-entropy over stored logits, and over logits that are never stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tfm.kernels import launch
from tfm.kernels.cross_entropy import stored, streamed
from tools.check_kernels.cases.case import Case

SINGLE = "*fp32:16"
TARGET = {"target": "*i64:16", "ignore_index": "i32"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# With label smoothing, as a translation model is trained; and with everything else too.
USUAL = {"bias": None, "smoothing": "fp32", "z_loss": None, "softcap": None}
EVERYTHING = {"bias": SINGLE, "smoothing": "fp32", "z_loss": "fp32", "softcap": "fp32"}


def cross_entropy_cases(every: bool) -> Iterator[Case]:
    """Rows of one block, of several, and of more warps, each with its gradient; every tile of streamed logits."""
    powers = [1 << bits for bits in range(8, 19)]
    for dtype in DTYPES:
        for classes in powers if every else (4096, 32768, 65536):
            tiles = launch.cross_entropy(classes)
            for name, options in (("", USUAL), (" everything", EVERYTHING)):
                weighed = SINGLE if name else None
                arguments = {
                    **TARGET, **options, "logits": f"*{dtype}:16", "losses": SINGLE, "grad": weighed,
                    "largest": weighed, "classes": "i32", "width": "i32:16",
                    "GRADIENT": True, "BLOCK": tiles.block, "CHUNKS": tiles.chunks,
                }  # fmt: skip
                kernel = stored.cross_entropy_kernel
                yield Case(f"cross_entropy {classes} {dtype}{name}", kernel, arguments, tiles.num_warps)

    tiles = launch.mean_loss(8192)
    arguments = {
        **TARGET, "losses": SINGLE, "loss": SINGLE, "scale": SINGLE, "rows": "i32", "chunks": "i32",
        "MEAN": True, "BLOCK": tiles.block,
    }  # fmt: skip
    yield Case("mean_loss fp32", stored.mean_loss_kernel, arguments, tiles.num_warps)

    for dtype in ("bf16", "fp16"):
        yield from _streaming(dtype, 512)


def _streaming(dtype: str, dim: int) -> Iterator[Case]:
    folded = dict.fromkeys(streamed.PARTS, "*fp32")
    numbers = {"rows": "i32", "classes": "i32"}
    for name, options, major in (
        (" sm_90", USUAL, 9),
        (" sm_90 everything", EVERYTHING, 9),
        (" sm_100 everything", EVERYTHING, 10),
    ):
        tiles = launch.streaming_cross_entropy(dim, DTYPES[dtype], True, options is USUAL, major)
        assert tiles is not None
        arguments = {
            **folded, **numbers, "bias": options["bias"], "softcap": options["softcap"], "width": "i32:16",
            "input": f"tensordesc<{dtype}[{tiles.block_rows}, {tiles.block_dim}]>",
            "weight": f"tensordesc<{dtype}[{tiles.block_classes}, {tiles.block_dim}]>",
            "DIM_TILES": dim // tiles.block_dim, "TILES": tiles.tiles,
            "BLOCK_ROWS": tiles.block_rows, "BLOCK_CLASSES": tiles.block_classes, "BLOCK_DIM": tiles.block_dim,
        }  # fmt: skip
        kernel = streamed.streaming_statistics_kernel
        yield Case(
            f"streaming_statistics {dtype}{name}", kernel, arguments, tiles.num_warps, tiles.num_stages,
            matrix=True, capabilities=(10 * major,),
        )  # fmt: skip
    ends = launch.streaming_losses(8192, dim)
    arguments = {
        **TARGET, **folded, **numbers, **EVERYTHING, "input": f"*{dtype}:16", "weight": f"*{dtype}:16",
        "losses": SINGLE, "dim": "i32:16", "shares": "i32",
        "BLOCK_ROWS": ends.block_rows, "BLOCK_DIM": ends.block_columns,
    }  # fmt: skip
    yield Case(f"streaming_losses {dtype}", streamed.streaming_losses_kernel, arguments, ends.num_warps)
