"""The rules of attention: checks of the arguments that state them, and their form for the operators."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from tfm.autocast import cast
from tfm.errors import BadArgument
from tfm.operators.attention import FAR
from tfm.operators.attention.mask_bits import aligned
from tfm.operators.declaration import CPU_FLOATS, FLOATS
from tfm.ops.checks import broadcasts, check_floating, check_integers, check_same_device, check_softcap, check_vector
from tfm.taping import checked, computed, dense
from tfm.transforms import is_readable

# The dtypes in which csrc reads masks, sinks and biases.
READABLE = {"cpu": CPU_FLOATS, "cuda": FLOATS}


def check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Checks that the heads, [..., H, S, D] or [N, H, D], are of one dtype, head dim and ratio."""
    check_floating(query=query, key=key, value=value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise BadArgument(f"{name}: expected {query.dtype} like query, got {tensor.dtype}")
    if key.shape[-1] != query.shape[-1]:
        raise BadArgument(f"key: expected dim {query.shape[-1]} like query, got {key.shape[-1]}")
    if value.shape[1] != key.shape[1]:
        raise BadArgument(f"value: expected {key.shape[1]} heads like key, got {value.shape[1]}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise BadArgument(f"query: expected a multiple of key's {key.shape[1]} heads, got {query.shape[1]}")


def check_rules(
    query: Tensor, query_start: int | Tensor, batch: int, window_size: tuple[int, int], softcap: float | None,
    sinks: Tensor | None, relative_bias: Tensor | None,
) -> None:  # fmt: skip
    """Checks that the rules of padded and packed sequences fit `batch` sequences and the heads of `query`."""
    if isinstance(query_start, Tensor):
        check_vector("query_start", query_start, batch)
        check_integers(query_start=query_start)
        check_same_device(query=query, query_start=query_start)
    if len(window_size) != 2:
        raise ValueError(f"window_size: expected (left, right), got {window_size}")
    check_softcap(softcap)
    check_vector("sinks", sinks, query.shape[1])
    check_floating(sinks=sinks, relative_bias=relative_bias)
    heads = query.shape[1]
    if relative_bias is not None:
        shape = tuple(relative_bias.shape)
        if len(shape) != 2 or shape[0] != heads or shape[1] % 2 == 0:
            raise BadArgument(f"relative_bias: expected [{heads}, 2 R + 1], an odd number of distances, got {shape}")
    check_same_device(query=query, sinks=sinks, relative_bias=relative_bias)


def check_mask(mask: Tensor, full: tuple[int, ...]) -> None:
    """Checks that the mask is bool or floating point, and broadcasts to `full`."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise BadArgument(f"attn_mask: expected bool (True = attend) or floating point (added), got {mask.dtype}")
    if not broadcasts(mask.shape, full):
        raise BadArgument(f"attn_mask: expected a shape broadcastable to {full}, got {tuple(mask.shape)}")


def check_key_mask(mask: Tensor | None, shape: tuple[int, int]) -> None:
    """Checks that the mask of keys, where given, is bool and of `shape`, [B, Sk]."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise BadArgument(f"key_mask: expected bool (True = attend), got {mask.dtype}")
    if mask.shape != shape:
        raise BadArgument(f"key_mask: expected shape {shape}, got {tuple(mask.shape)}")


def check_offsets(name: str, cu_seq: Tensor, rows: int, max_name: str, max_length: int) -> None:
    """Checks that `cu_seq` is a vector of integers; where the host may read it, from 0 to `rows`, never falling."""
    if cu_seq.dim() != 1 or cu_seq.shape[0] == 0:
        raise BadArgument(f"{name}: expected [B + 1], got shape {tuple(cu_seq.shape)}")
    check_integers(**{name: cu_seq})
    checked(_check_offsets, name, cu_seq, rows, max_name, max_length)


def _check_offsets(name: str, cu_seq: Tensor, rows: int, max_name: str, max_length: int) -> bool:
    """Checks values where the host may read them; tells whether it did."""
    if not is_readable(cu_seq):
        return False
    values = cu_seq.tolist()
    lengths = [end - start for start, end in pairwise(values)]
    if values[0] != 0:
        raise BadArgument(f"{name}: expected offsets that start at 0, got {values[0]}")
    if min(lengths, default=0) < 0:
        raise BadArgument(f"{name}: expected offsets that never fall, got {values}")
    if values[-1] != rows:
        raise BadArgument(f"{name}: expected offsets that end at the {rows} rows given, got {values[-1]}")
    longest = max(lengths, default=0)
    if longest > max_length:
        raise BadArgument(f"{max_name}: expected at least the longest sequence, {longest}, got {max_length}")
    return True


def widest(query: Tensor, value: Tensor) -> Tensor:
    """Returns query or value, whichever has more columns: these limit what kernels serve."""
    return value if value.shape[-1] > query.shape[-1] else query


def why_cuda_unavailable(
    query: Tensor, value: Tensor, attn_mask: Tensor | None, key_mask: Tensor | None, relative_bias: Tensor | None,
    max_q: int, max_k: int, return_weights: bool,
) -> str:  # fmt: skip
    """Says why csrc/cuda/attention/short.cu cannot compute this; empty where it can, and for other devices."""
    if query.device.type != "cuda":
        return ""
    dims = query.shape[-1], value.shape[-1]
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"expected float16 or bfloat16 on a GPU, got {query.dtype}"
    if any(dim % 8 or not 0 < dim <= 64 for dim in dims):
        return f"expected head dims that are multiples of 8 up to 64 on a GPU, got {dims[0]} and {dims[1]}"
    if max_q > 256 or max_k > 256:
        return f"expected at most 256 queries and 256 keys on a GPU, got {max_q} and {max_k}"
    if attn_mask is not None and attn_mask.is_floating_point() and attn_mask.requires_grad:
        return "a bias that learns has its gradient from Triton on a GPU"
    if attn_mask is not None and key_mask is not None:
        return "a mask beside that of the keys is read by Triton on a GPU"
    if relative_bias is not None:
        return "a bias by distance is added by Triton on a GPU"
    return "the weights come from Triton on a GPU" if return_weights else ""


def scaled(query: Tensor, scale: float | Tensor | None) -> tuple[Tensor, float]:
    """Returns the query and the number its scores are scaled by: a tensor is multiplied in, so that it may learn."""
    if not isinstance(scale, Tensor):
        return query, 1 / math.sqrt(query.shape[-1] or 1) if scale is None else scale
    if scale.dim() != 0:
        raise BadArgument(f"scale: expected a number or a scalar tensor, got shape {tuple(scale.shape)}")
    return computed(torch.mul, query, scale), 1.0


def window_of(is_causal: bool, window_size: tuple[int, int]) -> tuple[int | None, int | None]:
    """Returns (left, right) of the operator; None where that side is open."""
    left, right = window_size[0], 0 if is_causal else window_size[1]
    return None if left < 0 else min(left, FAR), None if right < 0 else min(right, FAR)


def start_of(query_start: int | Tensor) -> tuple[Tensor | None, int]:
    """Returns `query_start` as (a start for each sequence or None, a start for all)."""
    if isinstance(query_start, int):
        return None, max(-FAR, min(query_start, FAR))
    return dense(query_start), 0


def mask_for(backend: str, attn_mask: Tensor | None, keys: int) -> Tensor | None:
    """Returns the mask in rows that Triton's kernels load well, or of a dtype that csrc reads."""
    if backend == "native":
        return readable(attn_mask)
    return None if attn_mask is None else computed(aligned, attn_mask, keys)


def as_row(key_mask: Tensor) -> Tensor:
    """Returns a mask of the keys as one of scores, [B, 1, 1, Sk]."""
    return key_mask.view(key_mask.shape[0], 1, 1, key_mask.shape[1])


def learnt_for(backend: str, x: Tensor | None) -> Tensor | None:
    """Returns sinks or a bias by distance, dense, and where csrc computes in a dtype that it reads."""
    x = readable(x) if backend == "native" else x
    return dense(x)


def readable(x: Tensor | None) -> Tensor | None:
    """Returns `x` in fp32 where csrc does not read its dtype."""
    if x is None or not x.is_floating_point() or x.dtype in READABLE[x.device.type]:
        return x
    return cast(x, torch.float32)


def lse_with_sinks(lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Returns the operators' lse with that of the sink alone where it is -inf, for a query without keys."""
    if sinks is None:
        return lse
    sink = sinks.float() if lse.dim() == 2 else sinks.float()[:, None]
    return torch.where(lse == float("-inf"), sink, lse)
