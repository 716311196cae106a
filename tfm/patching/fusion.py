"""How one module of somebody else's gets a fused forward, in place, and its own one back.

The module's `__class__` becomes a subclass of its class, under the same name, whose `forward` is ours; the class's own
forward is `super().forward`. So nothing of the object changes but its class and one attribute, `FUSION`: parameters,
hooks, state_dict, isinstance and whatever points at it stay, copies and pickles work, and other modules of the class do
not notice.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from tfm.nn.fusible import PLAIN_PARAMETERS, own_calls
from tfm.ops import backends

# Where a module keeps what was done to it.
FUSION = "_fusion_by_tfm"
# The kind of work of a model that is changed only for what its attention finds: its config, or the masks that it makes.
MODEL = "model"
# The kind of work of a last linear layer, which fuse_loss=True asks for.
LOSS = "loss"


class Change(NamedTuple):
    """What a module can become.

    Attributes:
        what: the kind of work, one of `tfm.patching.KINDS`, or "loss".
        becomes: what a report calls it.
        make: changes the module.
        why_left: why it stays as it is nevertheless; empty where it does not.
    """

    what: str
    becomes: str
    make: Callable[[Module], None]
    why_left: str = ""


@dataclass
class Fusion:
    """What accelerate() did to one module, and how its calls went since.

    Attributes:
        what: the kind of work, one of `tfm.patching.KINDS`.
        before: what restore() puts back besides the class; nothing where None.
        always_plain: why no call of the module may run fused; empty where calls may.
        parts: the modules that must run fused for this one to.
        calls: how many calls ran fused, under "", and how many as before, under the reason.
    """

    what: str
    before: Any = None
    always_plain: str = ""
    parts: tuple[Module, ...] = ()
    calls: Counter[str] = field(default_factory=Counter)

    def count(self, reason: str = "") -> None:
        """Counts a call that ran fused, or the reason why it did not; compiled calls are not counted."""
        if not torch.compiler.is_compiling():
            self.calls[reason] += 1


class Fused(Module):
    """Base of the forwards that accelerate() puts before those of other people's classes.

    A subclass defines `forward`, which asks for every reason not to run fused and then calls `plainly`.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    _plain_kind: ClassVar[type[Module]]
    _made_of: ClassVar[tuple[Any, ...]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes a module of the class's own: nobody has asked for another fused one, as `type(model)(config)`."""
        return cls._plain_kind(*args, **kwargs)

    @classmethod
    def attributes(cls, kind: type[Module], **options: Any) -> dict[str, Any]:
        """Returns further attributes of the class that is made for `kind`."""
        return options

    def plainly(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward of the module's own class, and counts why."""
        self.count(reason)
        return self._plain_kind.forward(self, *args, **kwargs)

    def fusedly(self) -> None:
        """Counts a call that runs fused."""
        self.count()

    def count(self, reason: str = "") -> None:
        """Counts a call that ran fused, or why it did not."""
        getattr(self, FUSION).count(reason)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no name of its own that a pickle could hold.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_blank, self._made_of, *reduced[2:])


def fusing(what: str, forward: type[Fused], **options: Any) -> Change:
    """Returns the change that gives a module the forward of `forward`, with these options."""
    return Change(what, what, functools.partial(fuse, what=what, forward=forward, **options))


def fuse(module: Module, what: str, forward: type[Fused], before: Any = None, **options: Any) -> None:
    """Gives one module the forward of `forward`; `options` become attributes of its class, as `attributes` has them."""
    module.__class__ = _fused_class(forward, type(module), tuple(sorted(options.items())))
    setattr(module, FUSION, Fusion(what, before))


def unfuse(module: Module) -> None:
    """Gives one module its own class back."""
    module.__class__ = plain_kind(module)
    delattr(module, FUSION)


def plain_kind(module: Module) -> type[Module]:
    """Returns the class that a module had before it was fused."""
    kind: Any = type(module)
    return kind._plain_kind if "_plain_kind" in vars(kind) else kind


def fusion_of(module: Module) -> Fusion | None:
    """Returns what was done to a module; None where nothing was."""
    return vars(module).get(FUSION)


def fusions(model: Module) -> Iterator[tuple[str, Module, Fusion]]:
    """Yields each fused module of `model` once: its name, itself and what was done to it."""
    for name, module in model.named_modules():
        found = fusion_of(module)
        if found is not None:
            yield name, module, found


# By forward, class and options; the classes themselves are few, and live as long as the process.
_CLASSES: dict[tuple[Any, ...], type[Module]] = {}


def _fused_class(forward: type[Fused], kind: type[Module], options: tuple[tuple[str, Any], ...]) -> type[Module]:
    made_of = forward, kind, options
    if made_of not in _CLASSES:
        _CLASSES[made_of] = _made(*made_of)
    return _CLASSES[made_of]


def _made(forward: type[Fused], kind: type[Module], options: tuple[tuple[str, Any], ...]) -> type[Module]:
    own = {
        **forward.attributes(kind, **dict(options)),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "_plain_kind": kind,
        "_made_of": (forward, kind, options),
    }
    return type(kind.__name__, (forward, kind), own)


def _blank(forward: type[Fused], kind: type[Module], options: tuple[tuple[str, Any], ...]) -> Module:
    """Returns a module without any state, which a copy or a pickle fills."""
    return object.__new__(_fused_class(forward, kind, options))


def why_no_kernel(operation: str, *tensors: Tensor) -> str:
    """Says why no kernel serves an operation on tensors like these, so that torch's own code is as good."""
    first = tensors[0]
    if backends.forced() is None and backends.choose(operation, "auto", first) == "reference":
        return f"no kernel of {operation} for {str(first.dtype).removeprefix('torch.')} on {first.device.type}"
    return ""


def why_altered(name: str, module: Module | None, kinds: tuple[type, ...]) -> str:
    """Says why the parameters of a child may not be used without calling it; empty where they may."""
    if module is None or plain_kind(module) not in kinds:
        return f"{name} is a {type(module).__name__}"
    for key, parameter in module._parameters.items():
        if type(parameter) not in PLAIN_PARAMETERS:
            return f"{name} holds its {key} as a {type(parameter).__name__}"
    reason = own_calls(module)
    return f"{name} {reason}" if reason else ""


def rebound(function: Callable[..., Any], names: Mapping[str, Any]) -> Callable[..., Any]:
    """Returns a copy of a function, and of those that it wraps, that finds other things under these global names.

    What is found must be functions or classes of a module, without closures: Dynamo guards them by name.
    """
    inner = getattr(function, "__wrapped__", None)
    closure = function.__closure__
    if inner is not None:
        copied = rebound(inner, names)
        closure = tuple(
            types.CellType(copied if cell.cell_contents is inner else cell.cell_contents) for cell in closure or ()
        )
    found: Any = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, None, closure
    )
    functools.update_wrapper(found, function)
    found.__defaults__, found.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    if inner is not None:
        found.__wrapped__ = copied
    return found


def global_names(function: Any) -> frozenset[str]:
    """Returns the names that a function, or one that it wraps, takes from its module or from objects."""
    found: set[str] = set()
    while function is not None:
        code = getattr(function, "__code__", None)
        found.update(code.co_names if code is not None else ())
        function = getattr(function, "__wrapped__", None)
    return frozenset(found)
