"""One compilation of a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from triton.runtime.jit import JITFunction

# The dtypes of a sublayer's output and of the residual stream: autocast makes the last pair.
DTYPES = (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32"))

# By the major number of the compute capability that launch settings ask about: Hopper, Blackwell for data centres, and
# the chips with less shared memory, whose tensor cores hold a product's first factor in registers.
CHIPS = {9: (90,), 10: (100,), 8: (80, 86, 89, 120)}


@dataclass(frozen=True)
class Case:
    """One compilation; `arguments` by the kernel's parameter names, written as in triton.tools.compile.

    A string is a type (":16" where the address or the number is a multiple of 16), a tuple one of those, anything else
    a constant, None an absent tensor. What the kernel itself calls a constexpr is a constant, strings and tuples too.
    """

    name: str
    kernel: JITFunction
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    # Whether it multiplies matrices, so that sm_90 must show HGMMA.
    matrix: bool = False
    # The most registers of a thread; None where the launch sets no limit.
    max_registers: int | None = None
    # The chips that the launch gives these settings; None for all.
    capabilities: tuple[int, ...] | None = None
    # Tensors that it loads from and stores to, at places that never meet.
    apart: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError where the compiler would know more than a launch tells it."""
        # Triton's interpreter keeps no parameters.
        for parameter in getattr(self.kernel, "params", ()):
            argument = self.arguments.get(parameter.name)
            is_aligned = isinstance(argument, str) and argument.endswith(":16")
            is_known = is_aligned or not (argument is None or isinstance(argument, (str, tuple)))
            if (parameter.do_not_specialize and is_known) or (parameter.do_not_specialize_on_alignment and is_aligned):
                raise ValueError(f"{self.name}: {parameter.name} is not specialised on, got {argument!r}")

    @property
    def types(self) -> tuple[str, ...]:
        """The types of its tensors, each once."""
        texts = {argument for argument in self._fields if isinstance(argument, str)}
        return tuple(sorted(text for text in texts if text.startswith(("*", "tensordesc"))))

    @property
    def given(self) -> int:
        """The number of arguments that are not absent."""
        return sum(argument is not None for argument in self._fields)

    @property
    def _fields(self) -> Iterator[Any]:
        """The arguments; of tuples their fields."""
        for argument in self.arguments.values():
            yield from argument if isinstance(argument, tuple) else (argument,)


# The chip whose code differs most between assemblers and settings: its cases stand for the other chips'.
FIRST = 90


def telling(cases: Sequence[Case]) -> list[tuple[int, ...] | None]:
    """Returns the chips that each case is compiled for where not every one is; None for all of its own.

    fp16 has bf16's settings and, but for a few, its registers: one of the two. What other chips share with FIRST is
    compiled there, and for them only the hungriest of each kernel: of the most arguments, the last, which is the
    widest. Of the settings that other chips have to themselves, the hungriest of each tile or width. fp32 alone, whose
    instructions every chip has, is left out there.
    """
    settings = [repr(replace(case, name="")) for case in cases]
    twins = [text.replace("*fp16", "*bf16").replace("<fp16", "<bf16") for text in settings]
    known = set(settings)
    is_spared = [text != twin and twin in known for text, twin in zip(settings, twins, strict=True)]
    with_halves = {case.name.split()[0] for case in cases if _halves(case)}
    hungriest: dict[tuple[object, ...], int] = {}
    for place, case in enumerate(cases):
        if not is_spared[place] and (_halves(case) or case.name.split()[0] not in with_halves):
            before = hungriest.setdefault(_group(case), place)
            if case.given >= cases[before].given:
                hungriest[_group(case)] = place
    chips: list[tuple[int, ...] | None] = []
    for place, case in enumerate(cases):
        if is_spared[place]:
            chips.append(())
        elif hungriest.get(_group(case)) != place:
            chips.append((FIRST,) if _is_of_first(case) else ())
        else:
            chips.append(case.capabilities)
    return chips


def _is_of_first(case: Case) -> bool:
    return case.capabilities is None or FIRST in case.capabilities


def _halves(case: Case) -> tuple[str, ...]:
    # fp32 beside data of 16 bits is statistics, weights or sums.
    return tuple(kind for kind in case.types if "bf16" in kind or "fp16" in kind)


def _group(case: Case) -> tuple[object, ...]:
    # A name is the kernel's and what it is compiled for, the tile or the width of a head first.
    kernel, *rest = case.name.split()
    return kernel, case.capabilities, _halves(case), () if _is_of_first(case) else rest[0]


def merged(cases: Iterable[Case]) -> Iterator[Case]:
    """Yields the cases, with those that differ only in their chips as one for all of these.

    Raises:
        ValueError: two that differ in more than chips and warps have one name.
    """
    found: dict[str, Case] = {}
    for case in cases:
        before = found.get(case.name)
        if before is not None and before.num_warps != case.num_warps:
            case = replace(case, name=f"{case.name} {case.num_warps} warps")
        before = found.setdefault(case.name, case)
        if replace(before, capabilities=None) != replace(case, capabilities=None):
            raise ValueError(f"{case.name}: the name of two cases that differ in more than their chips")
        if before.capabilities is not None and case.capabilities is not None:
            chips = tuple(sorted({*before.capabilities, *case.capabilities}))
            found[case.name] = replace(before, capabilities=chips)
    yield from found.values()
