"""The operators of attention: which kernel serves which length, and what tfm.ops calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tfm.kernels.attention.backward_keys import attention_backward_keys
from tfm.kernels.attention.backward_queries import attention_backward_queries
from tfm.kernels.attention.bias_gradient import bias_gradient
from tfm.kernels.attention.call import Call
from tfm.kernels.attention.forward import attention_forward
from tfm.kernels.attention.mask_bits import aligned
from tfm.kernels.attention.short_backward import backward_tiles, short_attention_backward
from tfm.kernels.attention.short_forward import forward_tiles, short_attention_forward
from tfm.kernels.attention.weights import attention_weights
from tfm.kernels.library import NAMESPACE, register
from tfm.operators import attention as operators


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """One launch, of the kernel for sequences of this length."""
    call = Call(*arguments)
    tiles = forward_tiles(call)
    return attention_forward(call) if tiles is None else short_attention_forward(call, tiles)


def _backward(
    dout: Tensor, dlse: Tensor | None, output: Tensor, statistics: Tensor, wanted: list[bool], *arguments: Any
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value, bias and sinks, None where not wanted.

    One launch for short sequences, two for long ones; one or two more for the bias.
    """
    call = Call(*arguments)
    query, key, value, bias, sinks = wanted
    tiles = backward_tiles(call)
    dk = dv = None
    if tiles is not None:
        dq, dk, dv, dsinks, delta = short_attention_backward(
            call, tiles, dout, dlse, statistics, query, key, value, sinks, want_delta=bias
        )
    else:
        dq, dsinks, rows = attention_backward_queries(call, dout, dlse, output, statistics, query, sinks)
        delta = rows.delta
        if key or value:
            dk, dv = attention_backward_keys(call, dout, statistics, rows, key, value)
    return dq, dk, dv, bias_gradient(call, dout, statistics, delta) if bias else None, dsinks


register(operators.ATTENTION, _forward)
register(operators.ATTENTION_BACKWARD, _backward)
register(operators.ATTENTION_WEIGHTS, lambda statistics, *arguments: attention_weights(Call(*arguments), statistics))


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As tfm.operators.attention.attention."""
    return operators.attention(NAMESPACE, query, key, value, aligned(attn_mask, key.shape[2]), *options)


def varlen_attention(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """As tfm.operators.attention.varlen_attention."""
    return operators.varlen_attention(NAMESPACE, *arguments)
