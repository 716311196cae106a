"""Cross-entropy: of logits, and of a linear layer's output without the whole logits."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from tfm.autocast import under_autocast, without_autocast
from tfm.errors import BadArgument
from tfm.operators.autograd import apply
from tfm.operators.cross_entropy import CrossEntropy, LinearCrossEntropy, Loss, LossOfLogits
from tfm.ops.backends import choose
from tfm.ops.checks import check_floating, check_numbers, check_same_device, check_softcap, check_vector
from tfm.ops.registry import namespace_of
from tfm.ops.routing import door
from tfm.reference import cross_entropy as reference
from tfm.taping import checked, computed, dense
from tfm.transforms import is_differentiated, is_readable

REDUCTIONS = ("mean", "sum", "none")


@door
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Computes cross_entropy(input linear_weightᵀ + linear_bias, target), a chunk of rows at a time.

    Equals `torch.nn.functional.cross_entropy` of the linear layer's output in every argument, but never holds the
    [N, V] logits; gradients are formed in the forward. Where every target is ignored the mean is 0, not NaN. Obeys
    autocast.

    Args:
        input: [..., D], floating point.
        linear_weight: [V, D]; may be fp32 under a narrower `input`.
        target: class indices [...] int64, or probabilities [..., V], without gradient.
        linear_bias: [V] or None.
        weight: [V], a weight per class, without gradient.
        reduction: "mean" (over the targets' weights), "sum" or "none".
        ignore_index: the class index whose rows count for nothing.
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016, section 7).
        z_loss: weight of the squared log-partition added to each row's loss (PaLM, section 5).
        softcap: logits become softcap · tanh(logits / softcap) (Gemma 2).
        impl: the backend, "reference", "triton" or "native"; "auto" leaves the choice to tfm.ops.backends.

    Returns:
        fp32 or wider: a scalar, or the leading shape of `input` for reduction "none".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown reduction, or a backend that cannot run.
        IndexError: a target that is neither a class nor `ignore_index`; on a GPU, where looking costs a wait, only
            under CUDA_LAUNCH_BLOCKING=1. Without it the kernels make that row's loss NaN, and read nothing for it.
    """
    check_floating(input=input, linear_weight=linear_weight, linear_bias=linear_bias, weight=weight)
    if linear_weight.dim() != 2 or input.dim() == 0 or linear_weight.shape[1] != input.shape[-1]:
        wanted, came = input.shape[-1] if input.dim() else "dim", tuple(linear_weight.shape)
        raise BadArgument(f"linear_weight: expected [classes, {wanted}], got shape {came}")
    classes = linear_weight.shape[0]
    check_vector("linear_bias", linear_bias, classes)
    check_vector("weight", weight, classes)
    if classes == 0:
        raise BadArgument(f"linear_weight: expected at least one class, got shape {tuple(linear_weight.shape)}")
    _check_options(reduction, label_smoothing, z_loss, softcap)
    check_same_device(input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias, weight=weight)
    rows = input.shape[:-1]
    _check_target(target, weight, rows, classes, ignore_index)
    backend = choose("linear_cross_entropy", impl, input, _reference_only(target, weight))
    (input,) = under_autocast(input)
    # Rows in one dimension are the operator's as they come; Dynamo traces no Function that is given a tensor twice.
    is_flat = len(rows) == 1 and not torch.compiler.is_compiling()
    flat_input = input if is_flat else input.reshape(math.prod(rows), input.shape[-1])
    flat = target
    if not is_flat:
        flat = target.reshape(-1, classes) if target.is_floating_point() else target.reshape(-1)
    options = reference.Options(ignore_index, label_smoothing, z_loss, softcap)
    with without_autocast(input.device):
        if backend == "reference":
            losses = reference.linear_cross_entropy(
                flat_input, linear_weight, flat, linear_bias, weight, reduction, options
            )
        else:
            # Only where gradients are recorded is it known which are needed.
            call = LinearCrossEntropy(flat_input, linear_weight, linear_bias, flat, reduction, *options, needs=[])
            (losses,) = apply(Loss, namespace_of(backend), call)
    return losses.view(rows) if reduction == "none" and not is_flat else losses


@door
def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Computes the cross-entropy of logits that are there, in one pass over them, which forms their gradient too.

    Equals `torch.nn.functional.cross_entropy` with the classes in the last dimension, in fp32 at least whatever the
    logits' dtype. Where every target is ignored the mean is 0, not NaN. Where the logits are not needed themselves,
    `linear_cross_entropy` never makes them.

    Args:
        input: logits [..., V], floating point.
        target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap, impl: as of `linear_cross_entropy`.

    Returns:
        fp32 or wider: a scalar, or the leading shape of `input` for reduction "none".

    Raises:
        ValueError, IndexError: as `linear_cross_entropy`.
    """
    check_floating(input=input, weight=weight)
    if input.dim() == 0 or input.shape[-1] == 0:
        raise BadArgument(f"input: expected logits of at least one class, got shape {tuple(input.shape)}")
    rows, classes = input.shape[:-1], input.shape[-1]
    check_vector("weight", weight, classes)
    _check_options(reduction, label_smoothing, z_loss, softcap)
    check_same_device(input=input, target=target, weight=weight)
    _check_target(target, weight, rows, classes, ignore_index)
    backend = choose("cross_entropy", impl, input, _reference_only(target, weight))
    flat_input = input.reshape(math.prod(rows), classes)
    flat = target.reshape(-1, classes) if target.is_floating_point() else target.reshape(-1)
    options = reference.Options(ignore_index, label_smoothing, z_loss, softcap)
    with without_autocast(input.device):
        if backend == "reference":
            losses = reference.of_logits(flat_input, flat, weight, reduction, options)
        else:
            divisor = None if reduction == "none" else computed(_divisor, flat, ignore_index, reduction == "mean")
            call = CrossEntropy(
                dense(flat_input), dense(flat), *options, want_gradient=False, grad=None, divisor=divisor
            )  # fmt: skip
            (losses,) = apply(LossOfLogits, namespace_of(backend), call)
    return losses.view(rows) if reduction == "none" else losses


def _divisor(target: Tensor, ignore_index: int, is_mean: bool) -> Tensor:
    """Returns what the sum of the losses is divided by, an fp32 scalar on the device."""
    if not is_mean:
        return torch.ones((), device=target.device)
    return (target != ignore_index).sum().clamp(min=1).float()


def _check_options(reduction: str, label_smoothing: float, z_loss: float, softcap: float | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    check_numbers(label_smoothing=label_smoothing, z_loss=z_loss)
    if not 0.0 <= label_smoothing <= 1.0:
        raise BadArgument(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    check_softcap(softcap)


def _check_target(target: Tensor, weight: Tensor | None, rows: torch.Size, classes: int, ignore_index: int) -> None:
    expected = (*rows, classes) if target.is_floating_point() else rows
    if target.shape != expected:
        raise BadArgument(f"target: expected shape {tuple(expected)}, got {tuple(target.shape)}")
    if not target.is_floating_point():
        if target.dtype != torch.int64:
            raise BadArgument(f"target: expected int64 classes or probabilities, got {target.dtype}")
        checked(_check_range, target, classes, ignore_index)
    for name, tensor in (("target", target), ("weight", weight)):
        if is_differentiated(tensor):
            raise BadArgument(f"{name}: expected no gradient, got a {name} that requires one: detach it")


def _reference_only(target: Tensor, weight: Tensor | None) -> str:
    special = weight is not None or target.is_floating_point()
    return "class weights and probability targets run on the reference alone" if special else ""


def _check_range(target: Tensor, classes: int, ignore_index: int) -> bool:
    """Raises IndexError for a target that is no class, where reading it costs nothing; tells whether it looked.

    That is on CPUs, and where the user already waits for every kernel.
    """
    waiting = os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
    waited = target.is_cuda and waiting and not torch.cuda.is_current_stream_capturing()
    if not (is_readable(target) or (waited and not torch.compiler.is_compiling())):
        return False
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        raise IndexError(f"target: expected classes in [0, {classes}) or {ignore_index}, got {target[wrong][0].item()}")
    return True
