"""The proof of each subject, a file a subject: `compiled` cases, small `PASSES`, and calls that are `timed`.

compiled(every)     the cases of its kernels that tools.check_kernels compiles, the hungriest or all
PASSES              by operation, a small pass of each of its kernels, for what watches memory (tools.sanitize)
timed(seed)         calls whose launches are counted and whose host time is told (tools.host)
"""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.check_kernels.case import Case

# What subjects share is none.
SHARED = ("inputs",)


def subjects() -> list[ModuleType]:
    """Returns the subjects' modules, in alphabetical order."""
    return [
        import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__) if module.name not in SHARED
    ]


def compiled(every: bool) -> Iterator["Case"]:
    """Yields the cases of all subjects, those that differ in nothing but their names once."""
    known = set()
    for subject in subjects():
        for case in subject.compiled(every):
            settings = repr(replace(case, name=""))
            if settings not in known:
                known.add(settings)
                yield case


# What tools.check_kernels compiles.
ALL = (compiled,)
