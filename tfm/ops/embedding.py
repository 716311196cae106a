"""Token embedding with scale, positions and dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.autocast import cast
from tfm.errors import AssertedArgument, BadArgument
from tfm.operators.autograd import apply
from tfm.operators.embedding import DifferentiableEmbedding, LearntEmbedding
from tfm.ops.backends import choose
from tfm.ops.checks import broadcasts, check_floating, check_integers, check_numbers, check_same_device
from tfm.ops.dropout import seed_for
from tfm.ops.registry import namespace_of
from tfm.ops.routing import door
from tfm.reference import embedding as reference

sinusoid = reference.sinusoid


@door
def embedding(
    tokens: Tensor,
    weight: Tensor,
    positions: Tensor,
    *,
    position_weight: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    padding_idx: int | None = None,
    sparse: bool = False,
    seed: Tensor | int | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Computes dropout(weight[tokens] · scale + position) ("Attention Is All You Need", sections 3.4, 3.5 and 5.4).

    Args:
        tokens: int32 or int64, any shape.
        weight: [V, D], floating point.
        positions: integers broadcastable to the shape of `tokens`: where each token stands in its sequence.
        position_weight: [P, D], learned positions; None computes the paper's sinusoid.
        scale: of the token rows; sqrt(D) in the paper.
        dropout_p: dropout of the sum, in [0, 1]. Always applied: pass 0 in eval.
        padding_idx: the token whose row gets no gradient.
        sparse: the gradient of `weight` is a sparse tensor, as in torch. For a matrix that serves the final linear
            layer too: autograd adds these few rows to that layer's dense gradient, and the sum is dense, at half the
            traffic of two dense ones. Not under torch.compile, which has no sparse gradients.
        seed: an int or int64 scalar tensor; None draws one.
        site: which of the dropouts that share a seed this is.
        impl: the backend, "reference", "triton" or "native"; "auto" leaves the choice to tfm.ops.backends.

    Returns:
        [*tokens.shape, D] in the dtype of `weight`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a probability outside [0, 1], a backend that cannot run.
        IndexError: on CPU, a token or position outside its table. (On a GPU torch stops the process; the Triton kernel
            reads nothing and writes a row of NaN.)
    """
    if weight.dim() != 2:
        raise BadArgument(f"weight: expected [vocabulary, dim], got shape {tuple(weight.shape)}")
    check_floating(weight=weight, position_weight=position_weight)
    check_integers(tokens=tokens, positions=positions)
    check_numbers(scale=scale)
    check_same_device(tokens=tokens, weight=weight, positions=positions, position_weight=position_weight)
    if position_weight is not None and (position_weight.dim() != 2 or position_weight.shape[1] != weight.shape[1]):
        came = tuple(position_weight.shape)
        raise BadArgument(f"position_weight: expected [positions, {weight.shape[1]}], got shape {came}")
    if not broadcasts(positions.shape, tokens.shape):
        came = tuple(positions.shape)
        raise BadArgument(f"positions: expected a shape that broadcasts to tokens' {tuple(tokens.shape)}, got {came}")
    vocabulary = weight.shape[0]
    if padding_idx is not None and not -vocabulary <= padding_idx < vocabulary:
        raise AssertedArgument(f"padding_idx: expected one of the {vocabulary} tokens, got {padding_idx}")
    if sparse and torch.compiler.is_compiling():
        raise BadArgument("sparse: expected False under torch.compile, which has no sparse gradients, got True")
    backend = choose("embedding", impl, weight)
    drawn = seed_for(dropout_p, seed, weight.device)
    if backend == "reference":
        places = positions.expand(tokens.shape)
        options = (scale, dropout_p, padding_idx, sparse, drawn, site)
        return reference.embedding(tokens, weight, places, position_weight, *options)
    # A table of positions is read in the dtype of the tokens', or in fp32.
    if position_weight is not None and position_weight.dtype != weight.dtype:
        position_weight = cast(position_weight, torch.float32)
    call = LearntEmbedding(
        tokens, weight, positions, position_weight, drawn, scale, dropout_p, site, padding_idx, sparse
    )
    return apply(DifferentiableEmbedding, namespace_of(backend), call)[0]
