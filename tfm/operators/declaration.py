"""An operator is stated once, as a NamedTuple: its fields are the arguments, its `outputs` makes the empty results.

    @operator("scale")
    class ScaleRows(NamedTuple):
        x: Tensor
        factor: float

        def outputs(self) -> Tensor:
            return torch.empty_like(self.x)

From that follow the schema of `scale_rows`, which `define` gives every namespace that computes it, its fake, which is
`outputs`, and the struct that csrc takes (tfm.native.header). The argument is the subject: the module of tfm.kernels
whose function `scale_rows` computes it, given the NamedTuple whole.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# The dtypes that csrc computes in on CPUs.
CPU_FLOATS = (torch.float32, torch.bfloat16)
# Stands for no limit on the columns.
MANY = 1 << 30

# A number that torch.compile may keep symbolic.
Length = Annotated[int, "SymInt"]
# A tensor that the operator writes into, and one that may be absent.
Changed = Annotated[Tensor, "Tensor(!)"]
MaybeChanged = Annotated[Tensor | None, "Tensor(!)?"]
# The types of fields as schemas write them.
KINDS = {
    Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str", torch.dtype: "ScalarType",
    list[bool]: "bool[]", list[Tensor]: "Tensor[]", type(None): "()",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """`backend` serves these `operations` on tensors of these dtypes with at most `max_columns` in the last dimension.

    `device`: the type of device that it serves so; a row of Triton says itself what other devices lack.
    """

    operations: tuple[str, ...]
    backend: str
    dtypes: tuple[torch.dtype, ...]
    max_columns: int
    device: str = ""


@dataclass(frozen=True)
class Operator:
    """An operator of torch, whoever computes it.

    Attributes:
        name: in torch.ops, behind the namespace of each backend.
        subject: the module of tfm.kernels that computes it, and csrc's file or folder.
        arguments: the NamedTuple that states it.
        is_native_only: whether Triton has none of it.
    """

    name: str
    subject: str
    arguments: Any
    is_native_only: bool

    @cached_property
    def kinds(self) -> dict[str, str]:
        """The types of the arguments as schemas write them, by name and in order."""
        hints = typing.get_type_hints(self.arguments, include_extras=True)
        return {name: _kind(hints[name]) for name in self.arguments._fields}

    @cached_property
    def changes(self) -> tuple[int, ...]:
        """The places of the arguments that it writes into."""
        return tuple(place for place, kind in enumerate(self.kinds.values()) if "(!)" in kind)

    @cached_property
    def schema(self) -> str:
        """The schema as torch.library reads it."""
        letters = iter("abcdefgh")
        words = []
        for name, kind in self.kinds.items():
            words.append(f"{kind.replace('(!)', f'({next(letters)}!)') if '(!)' in kind else kind} {name}")
        result = _kind(typing.get_type_hints(self.arguments.outputs)["return"])
        return f"{self.name}({', '.join(words)}) -> {result}"

    def fake(self, *arguments: Any) -> Any:
        """Returns the empty results, which are all that torch.compile needs."""
        return self.arguments(*arguments).outputs()


# Every operator by its name, filled by the modules of this folder.
OPERATORS: dict[str, Operator] = {}
T = TypeVar("T")


def operator(subject: str, is_native_only: bool = False) -> Callable[[type[T]], type[T]]:
    """Declares the operator that a NamedTuple states; its name is the class's in lower case, with underscores."""

    def declare(arguments: type[T]) -> type[T]:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", arguments.__name__).lower()
        OPERATORS[name] = Operator(name, subject, arguments, is_native_only)
        arguments.operator = name  # type: ignore[attr-defined]
        return arguments

    return declare


def joined(name: str, *parts: Any) -> Any:
    """Makes a NamedTuple with the fields of all `parts`, in order; NamedTuples inherit no fields."""
    hints = [typing.get_type_hints(part, include_extras=True) for part in parts]
    return NamedTuple(name, [field for part in hints for field in part.items()])


def define(namespace: str, *, native: bool) -> torch.library.Library:
    """Defines the operators in `namespace`, those that csrc alone has too where `native`; the library keeps them.

    A library that implements some must be loaded before: the other way round torch ends the process where it defines
    them itself.

    Raises:
        RuntimeError: one of them is defined there already.
    """
    library = torch.library.Library(namespace, "FRAGMENT")
    for item in OPERATORS.values():
        if native or not item.is_native_only:
            library.define(item.schema, tags=(torch.Tag.needs_exact_strides,))
            torch.library.register_fake(f"{namespace}::{item.name}", item.fake, lib=library)
    return library


def _kind(annotation: Any) -> str:
    if typing.get_origin(annotation) is Annotated:
        return typing.get_args(annotation)[1]
    if typing.get_origin(annotation) is tuple:
        return f"({', '.join(map(_kind, typing.get_args(annotation)))})"
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        (inner,) = (part for part in typing.get_args(annotation) if part is not type(None))
        return f"{_kind(inner)}?"
    return KINDS[annotation]
