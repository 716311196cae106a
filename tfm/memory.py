"""The memory that is left, so that what cannot fit is refused with a message and not killed by the system."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Returns the bytes that this process may still take: of the machine, of its container and of `ulimit -v`."""
    return int(min(_of_machine(), _of_container(), _of_process()))


def readable(size: int) -> str:
    """Formats bytes with the unit that suits them."""
    value, units = float(min(size, 10**30)), ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:,.0f} {units[0]}" if units[0] == "bytes" else f"{value:,.1f} {units[0]}"


def _of_machine() -> int:
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    # All there is, where Linux gives no estimate.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_container() -> float:
    """Returns the container's limit less what it uses (control groups, version 2); file cache counts as free."""
    with suppress(OSError, ValueError):
        largest = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(largest - used + int(counts.get("inactive_file", 0)), 0)
    return float("inf")


def _of_process() -> float:
    with suppress(OSError, ValueError, ImportError):
        import resource

        largest, _ = resource.getrlimit(resource.RLIMIT_AS)
        if largest != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            return max(largest - pages * resource.getpagesize(), 0)
    return float("inf")
