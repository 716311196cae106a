"""Logits that are not there: fuse_loss=True has the loss computed from what would make them.

A model's last linear layer gives `DeferredLogits` while it trains: a tensor of the logits' shape that holds rows and
weight instead. Scaling, soft capping, shifting and flattening are noted; F.cross_entropy of them is
`tfm.ops.linear_cross_entropy`, which never holds more than a chunk of logits. Any other use computes them, as if they
had been there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, Module
from transformers import PreTrainedModel

from tfm import ops
from tfm.nn.fusible import PLAIN_PARAMETERS
from tfm.patching.fusion import LOSS, Change, Fused, fusing, why_no_kernel
from tfm.transforms import is_readable


class Product(NamedTuple):
    """What would make logits: cap · tanh(x weightᵀ + bias / cap), in `dtype`; without `cap` just the product.

    Attributes:
        x: [..., D].
        weight: [V, D].
        bias: [V] or None.
        version: of the weight when the model ran.
        dtype: of the logits.
        tanh: whether they are between tanh and what multiplies it.
        cap: of the soft cap; None where there is none.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    version: int
    dtype: torch.dtype
    tanh: bool = False
    cap: float | None = None

    def scaled(self, factor: float) -> Product:
        """Returns the same times a number."""
        if self.tanh:
            # factor · tanh(z) is a cap of `factor` on logits of factor · z.
            return self._replace(tanh=False)._times(factor)._replace(cap=factor)
        return self._times(factor)

    def _times(self, factor: float) -> Product:
        return self._replace(x=self.x * factor, bias=None if self.bias is None else self.bias * factor)

    def logits(self) -> Tensor:
        """Computes them.

        Raises:
            RuntimeError: the weight has changed since the model ran.
        """
        if self.weight._version != self.version:
            raise RuntimeError(
                "logits: under fuse_loss=True they are computed when asked for, and the weight has changed since the "
                "model ran; ask before optimizer.step(), or accelerate with fuse_loss=False"
            )
        z = torch.nn.functional.linear(self.x, self.weight, self.bias).to(self.dtype)
        if self.cap is not None:
            return torch.tanh(z / self.cap) * self.cap
        return torch.tanh(z) if self.tanh else z


class DeferredLogits(Tensor):
    """Logits [..., V] that are computed only if something but a cross-entropy asks for their values."""

    product: Product

    @staticmethod
    def __new__(cls, product: Product) -> DeferredLogits:
        """Returns a tensor of the logits' shape without memory."""
        shape = (*product.x.shape[:-1], product.weight.shape[0])
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=product.dtype, device=product.x.device)
        made.product = product
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Notes what can be noted, takes cross-entropies over, and computes the logits for all else."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" or func in _OF_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(args[0] if args else None, DeferredLogits) and name in _NOTED:
            found = _NOTED[name](args[0].product, *args[1:], **kwargs)
            if found is not None:
                return found if isinstance(found, Tensor) else DeferredLogits(found)
        if func is torch.nn.functional.cross_entropy:
            found = _cross_entropy(*args, **kwargs)
            if found is not None:
                return found
        made = [_computed(x) for x in args]
        return func(*made, **{key: _computed(x) for key, x in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Computes the logits for what asks below torch's functions, as autograd and detach do."""
        return func(*(_computed(x) for x in args), **{key: _computed(x) for key, x in (kwargs or {}).items()})


def _computed(x: Any) -> Any:
    if isinstance(x, DeferredLogits):
        return x.product.logits()
    return type(x)(map(_computed, x)) if type(x) in (list, tuple) else x


def _to(product: Product, *args: Any, **kwargs: Any) -> Product | None:
    """Notes a wider dtype; another device, and what is narrower, are for the logits themselves."""
    asked = [x for x in (*args, *kwargs.values()) if not isinstance(x, bool)]
    dtypes = [x for x in asked if isinstance(x, torch.dtype)]
    devices = [x for x in asked if isinstance(x, (torch.device, str, int))]
    others = len(asked) - len(dtypes) - len(devices)
    if others or any(torch.device(x) != product.x.device for x in devices):
        return None
    return _widened(product, dtypes[0]) if dtypes else product


def _widened(product: Product, dtype: torch.dtype = torch.float32) -> Product | None:
    wider = dtype.is_floating_point and dtype.itemsize >= product.dtype.itemsize
    return product._replace(dtype=dtype) if wider else None


def _view(product: Product, *shape: Any) -> Product | None:
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    classes, columns = product.weight.shape
    if not sizes or sizes[-1] not in (classes, -1) or sizes.count(-1) > 1:
        return None
    if sizes[-1] == -1:
        rows = product.x.shape[:-1].numel()
        if torch.Size(sizes[:-1]).numel() != rows:
            return None
    return product._replace(x=product.x.reshape(*sizes[:-1], columns))


def _part(product: Product, index: Any) -> Product | None:
    """Notes a part of the rows; of the columns there are all or none."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(x, (slice, int)) or x is Ellipsis for x in parts):
        return None
    of_rows = len(parts) < product.x.dim() and Ellipsis not in parts
    if not of_rows and (parts[-1] != slice(None) or len(parts) == 1):
        return None
    return product._replace(x=product.x[index])


def _times(product: Product, factor: Any) -> Product | None:
    return product.scaled(float(factor)) if isinstance(factor, (int, float)) and product.cap is None else None


def _over(product: Product, divisor: Any, **named: Any) -> Product | None:
    return None if named or not isinstance(divisor, (int, float)) else _times(product, 1 / divisor)


def _tanh(product: Product) -> Product | None:
    return None if product.tanh or product.cap is not None else product._replace(tanh=True)


def _plus(product: Product, other: Any, **named: Any) -> Product | None:
    """Notes a bias of the classes, as BART adds one."""
    classes = product.weight.shape[0]
    is_bias = type(other) in PLAIN_PARAMETERS and other is not None and other.numel() == classes == other.shape[-1]
    if named or not is_bias or product.tanh or product.cap is not None:
        return None
    bias = other.reshape(-1)
    return product._replace(bias=bias if product.bias is None else product.bias + bias)


def _same(product: Product, *args: Any, **named: Any) -> Product | None:
    return None if args or named else product


_NOTED: dict[str, Callable[..., Product | Tensor | None]] = {
    "float": _widened,
    "to": _to,
    "view": _view,
    "reshape": _view,
    "contiguous": _same,
    "__getitem__": _part,
    "mul": _times,
    "__mul__": _times,
    "__rmul__": _times,
    "div": _over,
    "truediv": _over,
    "__truediv__": _over,
    "tanh": _tanh,
    "add": _plus,
    "__add__": _plus,
}
_OF_SHAPE = (Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, Tensor.stride)


def _cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Computes the loss without the logits; None where it takes them."""
    if not isinstance(input, DeferredLogits) or isinstance(target, DeferredLogits):
        return None
    product = input.product
    is_plain = size_average is None and reduce is None and not product.tanh
    if not is_plain or product.x.dim() != 2 or target.dim() != 1 or target.is_floating_point():
        return None
    x = product.x
    if reduction != "none" and is_readable(target):
        # Rows that do not count cost nothing on a CPU, where looking at them does not either.
        rows = (target != ignore_index).nonzero().squeeze(1)
        if 0 < len(rows) < len(target):
            x, target = x[rows], target[rows]
    loss = ops.linear_cross_entropy(
        x, product.weight, target, linear_bias=product.bias, weight=weight, reduction=reduction,
        ignore_index=ignore_index, label_smoothing=label_smoothing, softcap=product.cap,
    )  # fmt: skip
    return loss.to(product.dtype)


class FusedHead(Fused):
    """A model's last linear layer, which while it trains gives logits that are not there."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns [..., V] of [..., D]."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        reason = _why_not(self, input)
        if reason:
            return self.plainly(reason, input)
        assert weight is not None
        self.fusedly()
        return DeferredLogits(Product(input, weight, bias, weight._version, input.dtype))


def _why_not(module: Module, x: Tensor) -> str:
    weight = module._parameters["weight"]
    if not (module.training and torch.is_grad_enabled()):
        return "not in training"
    if torch.compiler.is_compiling():
        return "compiled"
    if type(weight) not in PLAIN_PARAMETERS or weight is None or weight.dtype != x.dtype:
        return "its weight is of another kind than its rows"
    if torch.is_autocast_enabled(x.device.type):
        return "under autocast"
    return why_no_kernel("linear_cross_entropy", x)


def heads_of(model: Module) -> Callable[[Module], Change | None]:
    """Returns a finder of the linear layers that give the logits of the models of transformers inside `model`."""
    models = [one for one in model.modules() if isinstance(one, PreTrainedModel)]
    heads = {head for head in (one.get_output_embeddings() for one in models) if type(head) is Linear}

    def change_of(module: Module) -> Change | None:
        return fusing(LOSS, FusedHead) if module in heads else None

    return change_of
