"""The options that rows of launch settings have for the compiler."""

from __future__ import annotations

from functools import cached_property

# Triton's names of what a row says to the compiler.
OPTIONS = {"num_warps": "num_warps", "num_stages": "num_stages", "max_registers": "maxnreg"}


class Settings:
    """A row of launch settings, a frozen dataclass: tiles, and those of OPTIONS that the kernel is compiled with."""

    @cached_property
    def options(self) -> dict[str, int | None]:
        """The options that the kernel is compiled with."""
        return {option: getattr(self, name) for name, option in OPTIONS.items() if hasattr(self, name)}
