"""A mixture of feed-forward experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tfm.autocast import cast, under_autocast, without_autocast
from tfm.errors import BadArgument
from tfm.operators.autograd import apply
from tfm.operators.experts import Mixture, MixtureOfExperts
from tfm.operators.watching import is_intercepted
from tfm.ops.backends import choose
from tfm.ops.checks import check_floating, check_integers, check_same_device
from tfm.ops.feed_forward import ACTIVATIONS
from tfm.ops.registry import namespace_of
from tfm.reference import experts as reference
from tfm.taping import dense
from tfm.transforms import wraps_tensors

# Kernels get as many addresses at once: those of GPUs' kernels lie in 4 KB beside the other arguments.
MOST_SEPARATE = 256

Weights = Tensor | Sequence[Tensor]


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    first_weight: Weights,
    second_weight: Weights,
    *,
    first_bias: Weights | None = None,
    second_bias: Weights | None = None,
    activation: str = "silu",
    gated: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Computes a mixture of feed-forward experts, of which each token has K.

    y[t] = Σ_k w[t, k] · second_e(f(first_e x[t])) with e = index[t, k] (Shazeer et al. 2017, "Outrageously Large Neural
    Networks", section 2, equation 1); gated, f(gate_e x[t]) · up_e x[t] goes through second_e (Shazeer 2020, "GLU
    Variants Improve Transformer", equation 6). Tokens are sorted by expert and multiplied in groups, whatever their
    sizes (Gale et al. 2022, "MegaBlocks", section 5): none is padded or dropped, and the host waits for no counts. A
    place whose index is outside [0, E) adds nothing: the sentinel of experts on other devices, or a token beyond an
    expert's capacity (Fedus et al. 2021, "Switch Transformers", section 2.2). The K results of a token are added in
    order, in fp32 at least: the same bits each time.

    Args:
        x: [T, H], floating point.
        top_k_index: [T, K], int32 or int64: the experts of each token. One that comes twice counts twice.
        top_k_weights: [T, K], floating point, as they are: nothing is normalised.
        first_weight: gated [E, 2 I, H], the rows of gate above those of up; else [E, I, H]. Or a sequence of E tensors,
            one for each expert, which are read where they lie; each then gets a gradient of its own. Taken in the dtype
            of `x`, whatever its own.
        second_weight: [E, H, I], or a sequence like the first.
        first_bias: [E, 2 I] or [E, I], or a sequence of vectors, or None for 0.
        second_bias: [E, H], or a sequence of vectors, or None for 0.
        activation: relu, gelu, gelu_tanh, silu, quick_gelu, relu_squared, sigmoid or tanh.
        gated: whether the activation of the first half multiplies the second.
        impl: the backend, "reference", "triton" or "native"; "auto" leaves the choice to tfm.ops.backends.

    Returns:
        The shape and dtype of `x`, or autocast's; 0 where a token has no expert.

    Raises:
        ValueError: an unknown activation, shapes, dtypes or devices that do not fit, or a backend that cannot run.
    """
    x, top_k_weights = under_autocast(x)[0], top_k_weights
    count = _check(x, top_k_index, top_k_weights, first_weight, second_weight, activation, gated)
    biases = [None if bias is None else _stacked(bias) for bias in (first_bias, second_bias)]
    _check_biases(biases, (_shape_of(first_weight)[0], x.shape[1]), count, x)
    reason = _reference_only(x, first_weight, second_weight)
    others = [top_k_weights.dtype, *(None if bias is None else bias.dtype for bias in biases)]
    backend = choose("experts", impl, x, reason, *others)
    with without_autocast(x.device):
        if backend == "reference":
            anything = is_intercepted() or x.is_meta or wraps_tensors(x)
            parts: list[Any] = [x, top_k_index, top_k_weights, first_weight, second_weight, *biases]
            return reference.experts(*parts, activation, gated, anything)  # type: ignore[call-arg]
        first, second = (_in_memory(weight, x.dtype) for weight in (first_weight, second_weight))
        rows = x if x.stride(1) == 1 else dense(x)
        call = Mixture(
            rows, dense(top_k_weights), dense(biases[0]), dense(biases[1]), first, second, top_k_index, count,
            activation, gated,
        )  # fmt: skip
        return apply(MixtureOfExperts, namespace_of(backend), call)[0]


def _stacked(bias: Weights) -> Tensor:
    return bias if isinstance(bias, Tensor) else torch.stack(tuple(bias))


def _in_memory(weight: Weights, dtype: torch.dtype) -> list[Tensor]:
    """Returns the weights as kernels read them: one tensor, or one for each expert."""
    return [dense(cast(x, dtype)) for x in ((weight,) if isinstance(weight, Tensor) else weight)]


def _shape_of(weight: Weights) -> Sequence[int]:
    """Returns the shape of one expert's weight."""
    return weight.shape[1:] if isinstance(weight, Tensor) else weight[0].shape


def _reference_only(x: Tensor, first: Weights, second: Weights) -> str:
    """Says why no kernel multiplies these; empty where one does."""
    for name, weight in (("first_weight", first), ("second_weight", second)):
        if 0 in _shape_of(weight):
            return f"expected a {name} with elements, got none"
        if isinstance(weight, Tensor):
            continue
        if len(weight) > MOST_SEPARATE:
            return f"expected at most {MOST_SEPARATE} separate tensors in {name}, got {len(weight)}"
        if len({part.dtype for part in weight}) > 1:
            return f"expected {name} of one dtype, got several"
        if not all(part.is_contiguous() for part in weight):
            return f"expected {name} of contiguous tensors, got others"
    return ""


def _check(
    x: Tensor, index: Tensor, weights: Tensor, first: Weights, second: Weights, activation: str, gated: bool
) -> int:
    """Returns the number of experts."""
    if x.dim() != 2:
        raise BadArgument(f"x: expected [T, H], got shape {tuple(x.shape)}")
    if index.dim() != 2 or index.shape[0] != x.shape[0]:
        raise BadArgument(f"top_k_index: expected [{x.shape[0]}, K], got shape {tuple(index.shape)}")
    if weights.shape != index.shape:
        raise BadArgument(f"top_k_weights: expected {tuple(index.shape)}, got shape {tuple(weights.shape)}")
    check_floating(x=x, top_k_weights=weights)
    check_integers(top_k_index=index)
    for name, weight in (("first_weight", first), ("second_weight", second)):
        separate = not isinstance(weight, Tensor)
        if len(weight) == 0:
            raise BadArgument(f"{name}: expected at least one expert, got none")
        parts: Any = weight if separate else (weight,)
        for part in parts:
            check_floating(**{name: part})
            check_same_device(x=x, **{name: part})
            if part.dim() != (2 if separate else 3) or (separate and part.shape != weight[0].shape):
                form = "matrices of one shape" if separate else "[E, rows, columns]"
                raise BadArgument(f"{name}: expected {form}, got shape {tuple(part.shape)}")
    (rows, columns), hidden = _shape_of(first), _shape_of(second)[1]
    if columns != x.shape[1]:
        raise BadArgument(f"first_weight: expected {x.shape[1]} columns, as x has, got {columns}")
    if rows != (2 * hidden if gated else hidden):
        raise BadArgument(f"first_weight: expected {2 * hidden if gated else hidden} rows an expert, got {rows}")
    if _shape_of(second)[0] != x.shape[1]:
        raise BadArgument(f"second_weight: expected {x.shape[1]} rows an expert, got {_shape_of(second)[0]}")
    if len(first) != len(second):
        raise BadArgument(f"second_weight: expected {len(first)} experts, got {len(second)}")
    if activation not in ACTIVATIONS:
        raise BadArgument(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    check_same_device(x=x, top_k_index=index, top_k_weights=weights)
    return len(first)


def _check_biases(biases: Sequence[Tensor | None], widths: Sequence[int], count: int, x: Tensor) -> None:
    for name, bias, width in zip(("first_bias", "second_bias"), biases, widths, strict=True):
        if bias is None:
            continue
        if tuple(bias.shape) != (count, width):
            raise BadArgument(f"{name}: expected ({count}, {width}), got {tuple(bias.shape)}")
        check_floating(**{name: bias})
        check_same_device(x=x, **{name: bias})
