"""The launch functions of the operators, which choose kernels by the lengths of the sequences."""

from __future__ import annotations

from torch import Tensor

from tfm.kernels.attention.arguments import short_problem
from tfm.kernels.attention.backward_keys import attention_backward_keys
from tfm.kernels.attention.backward_queries import attention_backward_queries
from tfm.kernels.attention.bias_gradient import bias_gradient
from tfm.kernels.attention.forward import attention_forward
from tfm.kernels.attention.relative_bias_gradient import relative_bias_gradient
from tfm.kernels.attention.short_backward import short_attention_backward
from tfm.kernels.attention.short_forward import short_attention_forward
from tfm.kernels.launch.attention import short as launch
from tfm.kernels.tape import Tape
from tfm.operators.attention import Attention, AttentionBackward, AttentionBackwardJoined, Gradients


def attention(tape: Tape, call: Attention) -> tuple[Tensor, Tensor]:
    """Computes (output, statistics) of the operator. One launch, two where programs share keys."""
    output, statistics = tape.outputs(call)
    tiles = launch.short_attention_forward(**short_problem(tape, call))
    if tiles is None:
        attention_forward(tape, call, output, statistics)
    else:
        short_attention_forward(tape, call, tiles, output, statistics)
    return output, statistics


def attention_backward(tape: Tape, call: AttentionBackward) -> Gradients:
    """Computes the gradients of the operator.

    One launch for short sequences, two for long ones; one or two more for a bias, two for one by distance.
    """
    gradients = tape.outputs(call)
    _fill(tape, call, gradients)
    return gradients


def attention_backward_joined(
    tape: Tape, call: AttentionBackwardJoined
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Computes the same, the gradients of heads that lie side by side in one tensor as these lie."""
    dquery, joined, *others = outputs = tape.outputs(call)
    *queries, dkey, dvalue = joined.unbind()
    _fill(tape, call.plain, Gradients(queries[0] if queries else dquery, dkey, dvalue, *others))
    return outputs


def _fill(tape: Tape, call: AttentionBackward, gradients: Gradients) -> None:
    tiles = launch.short_attention_backward(**short_problem(tape, call.attention))
    if tiles is not None:
        delta = short_attention_backward(tape, call, tiles, gradients)
    else:
        rows = attention_backward_queries(tape, call, gradients)
        delta = rows.delta
        attention_backward_keys(tape, call, rows, gradients)
    if gradients.bias is not None:
        bias_gradient(tape, call, delta, gradients.bias)
    if gradients.relative_bias is not None:
        relative_bias_gradient(tape, call, delta, gradients.relative_bias)
