"""Describes what is measured: an operation beside its peers, at each size, direction and mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from benchmarks import device

FORWARD, BOTH = "forward", "forward and backward"
OURS = "ours"  # and "ours, ..." where there are two ways

# About what a GPU of today and one core reach. They decide what bounds a case where no ceiling was measured.
NOMINAL = {"copy": 4000.0, "matmul": 700.0} if device.AS_GPU else {"copy": 10.0, "matmul": 0.1}
# A case of less work takes as long as Python takes to launch some ten kernels.
LAUNCH_BOUND_SECONDS = 100e-6


@dataclass(frozen=True)
class Work:
    """Counts what a perfect kernel does: the bytes it moves, each tensor once, and its floating-point operations."""

    bytes: int = 0
    flops: int = 0

    def seconds(self, ceilings: dict[str, Any]) -> dict[str, float]:
        """Returns the least time under each ceiling: "copy" in GB/s, "matmul" in TFLOP/s.

        Instead of "copy" it is "cache" where ceilings["caches"], (bytes, GB/s) by size, holds as many bytes.
        """
        name, rate = "copy", ceilings["copy"]
        for size, cached in reversed(ceilings.get("caches", ())):
            if self.bytes <= size:
                name, rate = "cache", cached
        return {name: self.bytes / (1e9 * rate), "matmul": self.flops / (1e12 * ceilings["matmul"])}

    def ceiling(self, ceilings: dict[str, Any]) -> str:
        """Names the ceiling that bounds it."""
        seconds = self.seconds(ceilings)
        return max(seconds, key=lambda name: seconds[name])

    @property
    def is_launch_bound(self) -> bool:
        """Says whether launches would outlast it on a GPU; only a graph's replay then shows what the kernels take."""
        return max(self.seconds(NOMINAL).values()) < LAUNCH_BOUND_SECONDS


@dataclass(frozen=True)
class Peer:
    """One way to run an operation.

    Attributes:
        function: takes what `inputs`, or else the suite's, builds.
        compiled: the mode in which torch.compile takes it; None runs it as it is.
        context: entered around everything that is measured, so that its own cost is not.
        inputs: of a size, where the peer takes others than the suite's.
        gpu: only GPUs run it.
        where: the sizes and directions at which it is measured.
        missing: why it cannot run here, in words; "" where it can.
    """

    function: Callable[..., Any]
    compiled: str | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    inputs: Callable[[Any], tuple[Any, ...]] | None = None
    gpu: bool = False
    where: Callable[[Any, str], bool] = lambda size, direction: True
    missing: Callable[[], str] = str


@dataclass(frozen=True)
class Suite:
    """An operation, named as its file in tfm/ops, beside its peers.

    Attributes:
        inputs: of a size: the arguments of each function, random, on the device.
        work: of a size and a direction.
    """

    operation: str
    sizes: Sequence[Any]
    peers: dict[str, Peer]
    inputs: Callable[[Any], tuple[Any, ...]]
    work: Callable[[Any, str], Work]

    def cases(self) -> list[Case]:
        """Returns every case, those that differ only in the peer side by side; with graphs where launches weigh."""
        return list(self._cases())

    def _cases(self) -> Iterator[Case]:
        for size, direction in product(self.sizes, (FORWARD, BOTH)):
            replayed = device.AS_GPU and self.work(size, direction).is_launch_bound
            for mode in ("eager", "graph") if replayed else ("eager",):
                for name, peer in self.peers.items():
                    if peer.where(size, direction) and (device.AS_GPU or not peer.gpu):
                        yield Case(self, size, direction, mode, name)


@dataclass(frozen=True)
class Case:
    """One peer of a suite at one size."""

    suite: Suite = field(repr=False)
    size: Any
    direction: str
    mode: str
    name: str

    def __str__(self) -> str:
        return f"{self.size} {self.direction} {self.mode} {self.name}"

    @property
    def peer(self) -> Peer:
        return self.suite.peers[self.name]

    @property
    def work(self) -> Work:
        return self.suite.work(self.size, self.direction)

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)

    def inputs(self) -> tuple[Any, ...]:
        """Makes one set of arguments."""
        return (self.peer.inputs or self.suite.inputs)(self.size)

    def info(self) -> dict[str, Any]:
        """Returns what an entry of the record says of the case, apart from the numbers."""
        return {
            "suite": self.suite.operation,
            "direction": self.direction,
            "size": str(self.size),
            "peer": self.name,
            "mode": self.mode,
            "device": str(device.DEVICE),
            "dtype": str(device.DTYPE).removeprefix("torch."),
            "launch_bound": self.work.is_launch_bound,
        }
