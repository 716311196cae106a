"""Cases from launch functions: each runs on tensors without memory, and what it would launch is recorded.

Triton specialises on the same things here as at a launch: absent tensors and constants, numbers that are 1 and those
that are multiples of 16, where the kernel does not forbid it. Addresses count as aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from tfm.kernels.launch.device import Chip
from tfm.kernels.tape import Tape
from tools.check_kernels.case import Case

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip
# Multiprocessors of the chips whose settings ask for their number.
MULTIPROCESSORS = {8: 108, 9: 132, 10: 148}


def chip(major: int) -> Chip:
    """Returns a chip of this generation for settings."""
    return Chip(major, MULTIPROCESSORS[major])


def meta(*shape: int, dtype: str = "bf16") -> Tensor:
    """Returns a tensor of this shape without memory; its dtype by Triton's name."""
    types = {name: dtype for dtype, name in TYPES.items()}
    return torch.empty(shape, dtype=types[dtype], device="meta")


class DescribingTape(Tape):
    """A tape that records what would be launched on a chip."""

    def __init__(self, on: Chip) -> None:
        self.on = on
        self.launches: list[tuple[JITFunction, dict[str, Any], dict[str, Any]]] = []

    def chip(self, device: torch.device) -> Chip:
        """Returns the chip that settings are for."""
        return self.on

    def launch(self, kernel: Any, grid: tuple[int, ...], options: dict[str, Any], **arguments: Any) -> None:
        """Keeps the kernel, its options and its arguments."""
        self.launches.append((kernel, options, arguments))


def described(
    label: str, launch: Callable[..., Any], call: Any, on: Chip, *, matrix: Sequence[str] = (),
    capabilities: tuple[int, ...] | None = None, apart: tuple[str, ...] = (),
) -> Iterator[Case]:  # fmt: skip
    """Yields a case for each launch of `launch(tape, call)`, named by the kernel and `label`.

    Args:
        label: what the case's name has behind the kernel's.
        launch: a launch function of tfm.kernels.
        call: the operator's arguments, on meta tensors.
        on: the chip that its settings are for.
        matrix: the kernels, by the beginnings of their names, that multiply matrices.
        capabilities: the chips that are given these settings; None for all.
        apart: the tensors that a kernel loads from and stores to, at places that never meet.
    """
    tape = DescribingTape(on)
    launch(tape, call)
    for kernel, options, arguments in tape.launches:
        name = kernel.fn.__name__.removesuffix("_kernel")
        if isinstance(kernel, InterpretedFunction):
            # It keeps no parameters, and nothing is compiled of its cases.
            written = {name: _of_types(argument) for name, argument in arguments.items()}
        else:
            written = {parameter.name: _written(parameter, arguments[parameter.name]) for parameter in kernel.params}
        case = Case(f"{name} {label}", kernel, written, options["num_warps"], matrix=name.startswith(tuple(matrix)))
        if "num_stages" in options:
            case = replace(case, num_stages=options["num_stages"])
        both = tuple(name for name in apart if name in written)
        yield replace(case, max_registers=options.get("maxnreg"), capabilities=capabilities, apart=both)


def _of_types(argument: Any) -> Any:
    """Returns an argument with the types of tensors in their place."""
    if isinstance(argument, tuple):
        return tuple(_of_types(field) for field in argument)
    return f"*{TYPES[argument.dtype]}" if isinstance(argument, Tensor) else argument


def _written(parameter: Any, argument: Any) -> Any:
    """Returns an argument as Case writes it."""
    if parameter.is_constexpr or argument is None:
        return argument
    if isinstance(argument, tuple):
        # Triton forgets none of its fields, whatever the kernel says.
        fields = [_value(field, forgets=False, aligns=True) for field in argument]
        return type(argument)(*fields) if hasattr(argument, "_fields") else tuple(fields)
    forgets = parameter.do_not_specialize
    return _value(argument, forgets, aligns=not (forgets or parameter.do_not_specialize_on_alignment))


def _value(argument: Any, forgets: bool, aligns: bool) -> Any:
    """Returns a type, or 1 where Triton specialises on it; `forgets` and `aligns` say on which numbers it does."""
    if argument is None:
        return None
    aligned = ":16" if aligns else ""
    if isinstance(argument, Tensor):
        return f"*{TYPES[argument.dtype]}{aligned}"
    if isinstance(argument, TensorDescriptor):
        return f"tensordesc<{TYPES[argument.base.dtype]}{list(argument.block_shape)}>"
    if isinstance(argument, bool):
        return "i1"
    if isinstance(argument, float):
        return "fp32"
    if argument == 1 and not forgets:
        return 1
    kind = "i32" if -(2**31) <= argument < 2**31 else "i64"
    return kind + aligned if argument % 16 == 0 else kind
