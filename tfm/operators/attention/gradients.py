"""The gradients of attention and of its weights, and the same attention in torch's own operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tfm.operators.attention.calls import TENSORS, Attention, AttentionBackward, AttentionBackwardJoined
from tfm.operators.attention.heads import joined_parts
from tfm.operators.attention.mask_bits import mask_of_bits
from tfm.operators.autograd import Differentiable, Forward
from tfm.operators.calling import run
from tfm.reference import attention as reference
from tfm.transforms import gradients


def has_every_rule(namespace: str, device: torch.device) -> bool:
    """Tells whether kernels of `namespace` have all that is stated of attention, which csrc's for GPUs have not."""
    return namespace == "tfm" or (namespace == "tfm_native" and device.type == "cpu")


class Attended(Differentiable):
    """(output, statistics), the latter without gradients."""

    arguments = Attention
    learns = ("query", "key", "value", "bias", "sinks", "relative_bias")

    @staticmethod
    def forward(namespace, call, wanted):
        output, statistics = run(namespace, call)
        saved = (*call[:TENSORS], output, statistics)
        return Forward((output, statistics), saved, call[TENSORS:], constant=(statistics,))

    @staticmethod
    def backward(namespace, saved, options, grads, wanted):
        *tensors, output, statistics = saved
        dout, _, *dlse = grads
        dout = torch.zeros_like(output) if dout is None else dout
        incoming = (dout, dlse[0] if dlse else None, output, statistics, list(wanted))
        parts = joined_parts(tensors[:3], wanted) if has_every_rule(namespace, dout.device) else 0
        if not parts:
            return run(namespace, AttentionBackward(*incoming, *tensors, *options))
        dquery, joined, *others = run(namespace, AttentionBackwardJoined(*incoming, parts, *tensors, *options))
        return *[dquery] * (3 - parts), *joined.unbind(), *others

    @staticmethod
    def again(saved, options, grads):
        call = Attention(*saved[:TENSORS], *options)

        def outputs(*learning):
            output, lse = in_torch(call._replace(**dict(zip(Attended.learns, learning, strict=True))))
            return output, None, lse

        return outputs, [call[place] for place in Attended.places]


class AttendedWithLse(Attended):
    """(output, statistics, lse), the last the natural log of the softmax denominators."""

    @staticmethod
    def forward(namespace, call, wanted):
        (output, statistics), *rest = Attended.forward(namespace, call, wanted)
        return Forward((output, statistics, statistics[0] + statistics[1] * math.log(2)), *rest)


def in_torch(call: Attention) -> tuple[Tensor, Tensor]:
    """Computes (output, natural lse) in torch's own operations; without keys the lse is that of the sink alone."""
    window = tuple(-1 if side is None else side for side in (call.left, call.right))
    start = call.start if call.starts is None else call.starts
    heads = call.query, call.key, call.value
    rules = (call.dropout_p, False, call.scale, start, window, call.softcap, call.sinks, call.relative_bias)
    mask = mask_of_bits(call.bias, call.words, call.reach, call.max_k)
    arguments: list[Any]
    if call.cu_seq_q is not None:
        packing = call.cu_seq_q, call.cu_seq_k, call.max_q, call.max_k
        arguments = [*heads, *packing, mask, *rules, True, call.seed, call.site]
        return reference.varlen_attention(*arguments)
    arguments = [*heads, mask, *rules, call.key_lengths, call.key_mask, True, False, call.seed, call.site]
    return reference.attention(*arguments)


class RecomputedWeights(torch.autograd.Function):
    """The softmax weights of a kernel; the reference computes them again where someone wants their gradient."""

    @staticmethod
    def forward(
        ctx: Any, computed: tuple[Tensor], recompute: Callable[..., Tensor], *carriers: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*carriers)
        ctx.recompute = recompute
        # As part of a tuple it is a result to autograd, not a view of an argument: it can be changed in place.
        return computed[0]

    @staticmethod
    def backward(ctx: Any, dweights: Tensor) -> tuple[Tensor | None, ...]:
        carriers, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        return None, None, *gradients(lambda *given: (ctx.recompute(*given),), carriers, needed, (dweights,))
