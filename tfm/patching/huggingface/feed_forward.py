"""Feed-forward networks of the families: gated ones whole, plain ones by their first half.

What a gated network is, is found by its attributes and then by a trial on a small twin. Plain networks often lie open
in a layer's forward, between much else: there, only for the time of the forward, the first linear layer is one that
does its activation too, and the activation does nothing.
"""

from __future__ import annotations

import dis
import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Dropout, Linear, Module
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from tfm import ops
from tfm.patching.fusion import Change, Fused, fusing, plain_kind, why_altered, why_no_kernel
from tfm.patching.huggingface.trial import twin_of
from tfm.reference.feed_forward import ACTIVATIONS

# Linear layers: torch's, GPT-2's with its weight [in, out], Falcon's.
LINEARS = (Linear, Conv1D, FalconLinear)


class Gated(NamedTuple):
    """Names of a gated network's parts; `up` is empty where gate holds both."""

    gate: str
    up: str
    down: str
    activation: str
    dropout: str = ""

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of the linear layers."""
        return tuple(name for name in (self.gate, self.up, self.down) if name)


GATED = (
    Gated("gate_proj", "up_proj", "down_proj", "act_fn"),
    Gated("wi_0", "wi_1", "wo", "act", "dropout"),
    Gated("gate_up_proj", "", "down_proj", "activation_fn"),
)


class FusedGatedFeedForward(Fused):
    """dropout(activation(gate(x)) * up(x)) through down, in one operation."""

    parts: Gated

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the shape of `hidden_states` [..., D]."""
        reason = _why_not_gated(self, self.parts, hidden_states)
        if reason:
            return self.plainly(reason, hidden_states)
        self.fusedly()
        gate, down = getattr(self, self.parts.gate), getattr(self, self.parts.down)
        up = getattr(self, self.parts.up) if self.parts.up else None
        dropout_p = getattr(self, self.parts.dropout).p if self.parts.dropout and self.training else 0.0
        return ops.gated_feed_forward(
            hidden_states, gate.weight, None if up is None else up.weight, down.weight,
            activation_of(getattr(self, self.parts.activation)) or "", dropout_p,
            gate_bias=gate.bias, up_bias=None if up is None else up.bias, down_bias=down.bias,
        )  # fmt: skip


def change_of(module: Module) -> Change | None:
    """Returns what a module that is a feed-forward network, or holds one, would become; None for any other."""
    parts = gated_parts(module)
    if parts is not None:
        return fusing("feed_forward", FusedGatedFeedForward, parts=parts)
    plain = plain_half(module)
    return plain and fusing("feed_forward", FusedFirstHalf, plain=plain)


def _why_not_gated(module: Module, parts: Gated, x: Tensor) -> str:
    for name in parts.linears:
        reason = why_altered(name, module._modules.get(name), (Linear,))
        if reason:
            return reason
    dtypes = {getattr(module, name).weight.dtype for name in parts.linears}
    if dtypes != {x.dtype} and not torch.is_autocast_enabled(x.device.type):
        return f"weights of {', '.join(sorted(map(str, dtypes)))} for {x.dtype}"
    activation = module._modules.get(parts.activation)
    if activation is None or activation._forward_hooks or activation_of(activation) is None:
        return f"{parts.activation} is none of ours"
    return why_no_kernel("gated_feed_forward", x)


def gated_parts(module: Module) -> Gated | None:
    """Returns the names of the parts of a gated network, by a trial on a small twin; None where it is none."""
    for parts in GATED:
        children = [module._modules.get(name) for name in (*parts.linears, parts.activation)]
        if all(child is not None for child in children) and _is_gated(module, parts):
            return parts
    return None


def _is_gated(module: Module, parts: Gated) -> bool:
    linears: list[Any] = [module._modules[name] for name in parts.linears]
    activation: Any = module._modules[parts.activation]
    name = activation_of(activation)
    if name is None or any(type(x) is not Linear for x in linears):
        return False
    generator = torch.Generator().manual_seed(0)
    small: dict[str, Any] = {}
    for part, linear, rows in zip(parts.linears, linears, (6, 6, 4) if parts.up else (12, 4), strict=True):
        small[part] = Linear(6 if part == parts.down else 4, rows, linear.bias is not None)
        for parameter in small[part].parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    children = small | {parts.activation: activation} | ({parts.dropout: Dropout(0.0)} if parts.dropout else {})
    x = torch.randn(3, 4, generator=generator)
    try:
        with torch.no_grad():
            theirs = plain_kind(module).forward(twin_of(module, {}, children), x)
    except Exception:
        return False
    first = small[parts.gate](x)
    gate, up = (first, small[parts.up](x)) if parts.up else first.chunk(2, -1)
    ours = small[parts.down](ACTIVATIONS[name](gate) * up)
    return isinstance(theirs, Tensor) and torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5)


def activation_of(module: Any) -> str | None:
    """Returns the name of the activation of ours that a module without parameters is; None where it is none."""
    if not isinstance(module, Module) or module._parameters or module._buffers or module._modules:
        return None
    settings = tuple(sorted((name, x) for name, x in vars(module).items() if isinstance(x, (str, float, int))))
    key = plain_kind(module), tuple(x for x in settings if x[0] != "training")
    if key not in _KNOWN:
        _KNOWN[key] = _tried(module)
    return _KNOWN[key]


# Modules of one class with the same settings are alike.
_KNOWN: dict[Any, str | None] = {}


def _tried(module: Module) -> str | None:
    x = torch.linspace(-6, 6, 97)
    try:
        with torch.no_grad():
            theirs = module.forward(x.clone())
    except Exception:
        return None
    if not isinstance(theirs, Tensor) or theirs.shape != x.shape:
        return None
    return next((name for name, ours in ACTIVATIONS.items() if torch.allclose(theirs, ours(x), atol=3e-6)), None)


# The first linear layer and its activation, of networks that lie open in a forward.
PAIRS = (
    ("c_fc", "act"),
    ("fc_in", "act"),
    ("dense_h_to_4h", "act"),
    ("fc1", "activation_fn"),
    ("fc1", "act"),
    ("lin1", "activation"),
    ("lin1", "act"),
    ("wi", "act"),
    ("layer_1", "activation_function"),
    ("ffn", "activation"),
    ("dense", "intermediate_act_fn"),
)


# The name of transformers' wrapper that checkpoints a layer.
CHECKPOINTING = "forward_with_checkpointing"


class Plain(NamedTuple):
    """Where a plain network's first half is: the method of the module that calls them, and their names there."""

    method: str
    linear: str
    activation: str


class FusedFirstHalf(Fused):
    """A module whose method `plain.method` does linear layer and activation in one operation."""

    plain: Plain

    @classmethod
    def attributes(cls, kind: type[Module], **options: Any) -> dict[str, Any]:
        """Returns the method, under its own name."""
        plain: Plain = options["plain"]
        theirs = _uncheckpointed(getattr(kind, plain.method))

        # transformers asks some of them for their arguments.
        @functools.wraps(theirs)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            x = _first_tensor(args, kwargs)
            reason = _why_not_plain(self, plain, x)
            fusion = self._fusion_by_tfm
            fusion.count(reason)
            return theirs(self if reason else Folded(self, plain), *args, **kwargs)

        return {"plain": plain, plain.method: method}


class Folded:
    """A module as its own method sees it, whose first linear layer activates, and whose activation does nothing."""

    def __init__(self, module: Module, plain: Plain) -> None:
        linear: Any = module._modules[plain.linear]
        name = activation_of(module._modules[plain.activation])
        vars(self).update({"_module": module, "_linear": linear, "_name": name})
        vars(self)[plain.linear] = self._activated
        vars(self)[plain.activation] = _as_it_is

    def _activated(self, x: Tensor) -> Tensor:
        linear, transposed = self._linear, not isinstance(self._linear, Linear)
        weight = linear.weight.t() if transposed else linear.weight
        return ops.linear_activation(x, weight, linear.bias, self._name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))


def _why_not_plain(module: Module, plain: Plain, x: Tensor) -> str:
    reason = why_altered(plain.linear, module._modules.get(plain.linear), LINEARS)
    if reason:
        return reason
    linear: Any = module._modules[plain.linear]
    if linear.weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"a weight of {linear.weight.dtype} for {x.dtype}"
    activation = module._modules.get(plain.activation)
    if activation is None or activation._forward_hooks or activation_of(activation) is None:
        return f"{plain.activation} is none of ours"
    return why_no_kernel("linear_activation", x)


def plain_half(module: Module) -> Plain | None:
    """Returns where a module calls its first linear layer and then its activation, each once; None where nowhere."""
    kind = plain_kind(module)
    for linear, activation in PAIRS:
        both: Any = (module._modules.get(linear), module._modules.get(activation))
        if None in both or plain_kind(both[0]) not in LINEARS or activation_of(both[1]) is None:
            continue
        methods = [name for name, code in _methods(kind) if {linear, activation} & set(code.co_names)]
        if len(methods) == 1 and _in_order(kind, methods[0], linear, activation):
            return Plain(methods[0], linear, activation)
    return None


def _methods(kind: type) -> list[tuple[str, Any]]:
    """Returns the methods that a class and its bases in transformers define, with their code, __init__ left out."""
    found = {}
    for base in reversed(kind.__mro__):
        if base.__module__.split(".")[0] == "torch":
            continue
        for name, method in vars(base).items():
            function = inspect.unwrap(method) if callable(method) else None
            if inspect.isfunction(function) and name != "__init__":
                found[name] = function.__code__
    return list(found.items())


def _in_order(kind: type, method: str, linear: str, activation: str) -> bool:
    """Tells whether a method looks up the linear layer and the activation once each, and makes no closure of self."""
    function = inspect.unwrap(getattr(kind, method))
    if function.__code__.co_freevars or function.__code__.co_cellvars:
        return False
    names = [x.argval for x in dis.get_instructions(function) if x.argval in (linear, activation)]
    return sorted(names) == sorted((linear, activation))


def _uncheckpointed(method: Any) -> Any:
    """Returns a method without the wrapper that transformers puts around a layer's forward to checkpoint it.

    A subclass has one of its own; this one would look for itself in the class of whatever it is given.
    """
    is_wrapper = getattr(method, "__code__", None) is not None and method.__code__.co_name == CHECKPOINTING
    return method.__wrapped__ if is_wrapper else method
