"""The loss of a model's logits: ours in the place of torch's cross-entropy, which takes four tensors of their size.

A model's forward makes a `CrossEntropyLoss`, by that name or as `nn.CrossEntropyLoss`, or it calls its property
`loss_function`, which gives a function of transformers.loss that ends in `fixed_cross_entropy`. A model of transformers
runs a copy of its own forward, or of that function, that finds ours under these names.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from tfm import ops
from tfm.patching.fusion import Change, Fused, fusing, global_names, plain_kind, rebound, why_no_kernel

MODULE, FUNCTION, PROPERTY = "CrossEntropyLoss", "fixed_cross_entropy", "loss_function"


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes torch's cross_entropy: by ours of plain logits [N, V] and classes [N]."""
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    is_plain = type(input) is Tensor and input.dim() == 2 and target.dtype == torch.int64 and target.dim() == 1
    if not is_plain or weight is not None or why_no_kernel("cross_entropy", input):
        return F.cross_entropy(input, target, weight, **options)
    loss = ops.cross_entropy(input, target, **options)
    if not torch.is_autocast_enabled(input.device.type):
        loss = loss.to(input.dtype)
    if reduction == "mean":
        # Torch's mean of nothing is no number, ours is 0.
        loss = loss.masked_fill((target == ignore_index).all(), float("nan"))
    return loss


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, by ours."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of logits [N, V]."""
        return cross_entropy(input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing)


def fixed_cross_entropy(
    source: Tensor, target: Tensor, num_items_in_batch: Tensor | int | None = None, ignore_index: int = -100, **_: Any
) -> Tensor:
    """Computes the mean over a batch, or over those that it is a part of, as transformers' own of this name does."""
    if num_items_in_batch is None:
        return cross_entropy(source, target, ignore_index=ignore_index)
    loss = cross_entropy(source, target, ignore_index=ignore_index, reduction="sum")
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


# torch.nn as a forward finds it.
NN = types.SimpleNamespace(**{**vars(torch.nn), MODULE: CrossEntropyLoss})


# Ours for each loss function of transformers' that ends so.
LOSS_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    theirs: rebound(theirs, {FUNCTION: fixed_cross_entropy})
    for theirs in cast("dict[str, Any]", LOSS_MAPPING).values()
    if FUNCTION in global_names(theirs)
}


class FusedLoss(Fused):
    """A model whose cross-entropy is one pass over its logits."""

    @classmethod
    def attributes(cls, kind: type[Module], **options: Any) -> dict[str, Any]:
        """Returns the forward, under the signature of the class's own, which trainers and `generate` look at."""
        copied = rebound(kind.forward, {MODULE: CrossEntropyLoss, "nn": NN})

        def forward(self: FusedLoss, *args: Any, **kwargs: Any) -> Any:
            output = copied(self, *args, **kwargs)
            loss = getattr(output, "loss", None)
            if loss is not None:
                reason = why_no_kernel("cross_entropy", loss)
                self.count(reason)
            return output

        found = {"forward": functools.update_wrapper(forward, kind.forward)}
        # The property's function: Dynamo follows no property by `super()`.
        return found | {"_plain_loss_function": vars(PreTrainedModel)[PROPERTY].fget}

    @property
    def loss_function(self) -> Callable[..., Any]:
        """The model's own, which ends in ours."""
        theirs = self._plain_loss_function()
        return LOSS_FUNCTIONS.get(theirs, theirs)

    @loss_function.setter
    def loss_function(self, value: Callable[..., Any]) -> None:
        self._loss_function = value


class FusedLossModule(Fused):
    """A torch.nn.CrossEntropyLoss that a model keeps."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of logits [N, V]."""
        self.count(why_no_kernel("cross_entropy", input))
        return CrossEntropyLoss.forward(self, input, target)  # type: ignore[arg-type]


def change_of(module: Module) -> Change | None:
    """Returns what a model that computes a cross-entropy, or its module for that, would become; None for any other."""
    kind = plain_kind(module)
    if kind is torch.nn.CrossEntropyLoss:
        return fusing("cross_entropy", FusedLossModule)
    if not isinstance(module, PreTrainedModel) or global_names(kind.forward).isdisjoint((MODULE, PROPERTY)):
        return None
    return fusing("cross_entropy", FusedLoss)
