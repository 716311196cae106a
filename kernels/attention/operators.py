"""The operators of attention, their autograd, and what tfm.ops calls."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tfm.kernels.attention.backward_keys import attention_backward_keys
from tfm.kernels.attention.backward_queries import attention_backward_queries
from tfm.kernels.attention.bias_gradient import bias_gradient
from tfm.kernels.attention.call import Call, rows_like
from tfm.kernels.attention.forward import attention_forward, forward_outputs
from tfm.kernels.attention.mask_bits import mask_to_bits
from tfm.kernels.attention.scores import start_of, window_of
from tfm.kernels.attention.short_backward import backward_tiles, short_attention_backward
from tfm.kernels.attention.short_forward import forward_tiles, short_attention_forward
from tfm.kernels.attention.weights import attention_weights, empty_weights
from tfm.kernels.library import register
from tfm.operators import Operator

# Call's attributes, in its order.
ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? words, Tensor? reach, Tensor? sinks,"
    " Tensor? cu_seq_q, Tensor? cu_seq_k, Tensor? key_lengths, Tensor? starts, Tensor? seed, SymInt max_q,"
    " SymInt max_k, SymInt start, int? left, int? right, float scale, float? softcap, float dropout_p, int site"
)
# The first so many of them are tensors, and these of the operator's results have gradients, in this order.
TENSORS = 12
LEARNABLE = (0, 1, 2, 3, 6)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """One launch, of the kernel for sequences of this length."""
    call = Call(*arguments)
    tiles = forward_tiles(call)
    return attention_forward(call) if tiles is None else short_attention_forward(call, tiles)


def _backward(
    dout: Tensor, dlse: Tensor | None, output: Tensor, lse: Tensor, wanted: list[bool], *arguments: Any
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
            call, tiles, dout, dlse, lse, query, key, value, sinks, want_delta=bias
        )
    else:
        dq, dsinks, delta = attention_backward_queries(call, dout, dlse, output, lse, query, sinks)
        if key or value:
            dk, dv = attention_backward_keys(call, dout, lse, delta, key, value)
    return dq, dk, dv, bias_gradient(call, dout, lse, delta) if bias else None, dsinks


def _empty_gradients(
    dout: Tensor, dlse: Tensor | None, output: Tensor, lse: Tensor, wanted: list[bool], *arguments: Any
) -> tuple[Tensor | None, ...]:
    call = Call(*arguments)
    inputs = (call.query, call.key, call.value, call.bias, call.sinks)
    return tuple(
        None if x is None or not is_wanted else rows_like(x, x.shape[-1]) if x.dim() > 2 else torch.empty_like(x)
        for x, is_wanted in zip(inputs, wanted, strict=True)
    )


register(
    Operator(
        f"attention({ARGUMENTS}) -> (Tensor output, Tensor lse)",
        lambda query, key, value, *_: forward_outputs(query, value),
    ),
    _forward,
)
register(
    Operator(
        f"attention_backward(Tensor dout, Tensor? dlse, Tensor output, Tensor lse, bool[] wanted, {ARGUMENTS})"
        " -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
        _empty_gradients,
    ),
    _backward,
)
register(
    Operator(
        f"attention_weights(Tensor lse, {ARGUMENTS}) -> Tensor", lambda lse, *arguments: empty_weights(Call(*arguments))
    ),
    lambda lse, *arguments: attention_weights(Call(*arguments), lse),
)


class Attention(torch.autograd.Function):
    """Autograd of the operator: output, and its lse twice: for the backward, and, where asked for, as natural log."""

    @staticmethod
    def forward(with_natural, *arguments):
        output, lse = torch.ops.tfm.attention(*arguments)
        return output, lse, lse * math.log(2) if with_natural else None

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1 : 1 + TENSORS], *output[:2])
        ctx.rules = inputs[1 + TENSORS :]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _, dlse):
        *tensors, output, lse = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[1 + place] for place in LEARNABLE]
        dout = torch.zeros_like(output) if dout is None else dout
        found = torch.ops.tfm.attention_backward(dout, dlse, output, lse, wanted, *tensors, *ctx.rules)
        gradients = dict(zip(LEARNABLE, found, strict=True))
        return None, *(gradients.get(place) for place in range(TENSORS + len(ctx.rules)))


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float, query_start: int | Tensor, window_size: tuple[int, int], softcap: float | None,
    sinks: Tensor | None, key_lengths: Tensor | None, return_lse: bool, return_weights: bool, seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(output, lse, weights) of tfm.ops.attention, None where not asked for; the weights have no gradient."""
    left, right = window_of(is_causal, window_size)
    starts, start = start_of(query_start)
    bias, words, reach = mask_to_bits(attn_mask, key.shape[2], starts, start, left, right)
    seed = None if seed is None else seed.to(query.device)
    arguments = (
        query, key, value, bias, words, reach, sinks, None, None, key_lengths, starts, seed,
        query.shape[2], key.shape[2], start, left, right, scale, softcap, dropout_p, site,
    )  # fmt: skip
    output, lse, natural = Attention.apply(return_lse, *_distinct(arguments))
    weights = None
    if return_weights:
        detached = (x.detach() if isinstance(x, Tensor) else x for x in (lse, *arguments))
        weights = torch.ops.tfm.attention_weights(*detached)
    return output, _with_sinks(natural, sinks), weights


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, scale: float, query_start: int | Tensor, window_size: tuple[int, int],
    softcap: float | None, sinks: Tensor | None, return_lse: bool, seed: Tensor | None, site: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(output, lse) of tfm.ops.varlen_attention; lse is None where not asked for."""
    left, right = window_of(is_causal, window_size)
    starts, start = start_of(query_start)
    seed = None if seed is None else seed.to(query.device)
    arguments = (
        query, key, value, None, None, None, sinks, cu_seq_q, cu_seq_k, None, starts, seed,
        max_q, max_k, start, left, right, scale, softcap, dropout_p, site,
    )  # fmt: skip
    output, _, natural = Attention.apply(return_lse, *_distinct(arguments))
    return output, _with_sinks(natural, sinks)


def _distinct(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Dynamo does not trace an autograd.Function that gets one tensor twice, as self-attention does."""
    if not torch.compiler.is_compiling():
        return arguments
    found: list[Any] = []
    for x in arguments:
        again = isinstance(x, Tensor) and any(x is other for other in found)
        found.append(x.view_as(x) if again else x)
    return tuple(found)


def _with_sinks(lse: Tensor | None, sinks: Tensor | None) -> Tensor | None:
    """The kernels' lse is -inf for a query without keys; its softmax is over the sink alone."""
    if lse is None or sinks is None:
        return lse
    sink = sinks.float() if lse.dim() == 2 else sinks.float()[:, None]
    return torch.where(lse == float("-inf"), sink, lse)
