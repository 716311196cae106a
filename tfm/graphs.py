"""CUDA graphs: what is captured by what, when, and how much of it is kept; and training steps as such graphs.

Replaying a graph is one launch, where a small model's step is hundreds that take the host longer than the GPU. It reads
from memory of its own, into which what is new is copied before. Shapes are few where batches are filled up
(`Batch.rounded`); `tfm.graphed` does the same for a module's forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch

# The most graphs of steps that are kept, some megabytes of launches each; shapes that come later run kernel by kernel.
MOST_GRAPHS = 128
# Keys that came once are remembered up to this many.
MOST_MET = 4096

T = TypeVar("T")
Replay = Callable[[], object]


class Capture(Protocol):
    """Records what `work` launches; returns its result, whose memory each replay fills anew, and the replay."""

    def __call__(self, work: Callable[[], T], /) -> tuple[T, Replay]: ...


class Recordings(Generic[T]):
    """The recordings by key: a key is met once, recorded the second time, and at most `most` recordings are kept.

    The first time work runs as it is: kernels are compiled and state is made, which no graph can hold.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.met: set[Hashable] = set()
        self.kept: dict[Hashable, T] = {}

    def has_room(self) -> bool:
        """Tells whether one more may be recorded."""
        return len(self.kept) < self.most

    def serves(self, key: Hashable) -> bool:
        """Tells whether `get` has a recording for `key`, or may make one."""
        return key in self.kept or (key in self.met and self.has_room())

    def meet(self, key: Hashable) -> None:
        """Notes that work of this key has run as it is."""
        if len(self.met) >= MOST_MET:
            self.met.clear()
        self.met.add(key)

    def get(self, key: Hashable, record: Callable[[], T]) -> T:
        """Returns the recording for `key`, made by `record` where there is none yet."""
        if key not in self.kept:
            self.kept[key] = record()
        return self.kept[key]


class StepBatch(Protocol):
    """What `GraphedSteps` asks of a batch: to come to the device, and to be copied into one that a graph reads."""

    @property
    def shape(self) -> Hashable: ...
    def to(self, device: torch.device, non_blocking: bool = False) -> Any: ...
    def clone(self) -> Any: ...
    def copy_(self, other: Any) -> object: ...


class GraphedSteps:
    """`step` of a batch on `device`, whole: forward, backward, clipping and the update, replayed as one graph.

    Args:
        step: takes a batch on the device. It must read nothing back from there, keep no tensor that it makes, change
            what it changes in place, and be the same work for all batches of a shape.
        device: where it computes.
        capture: records what it is given; None where nothing is captured, and each step is run.
    """

    def __init__(self, step: Callable[[Any], object], device: torch.device, capture: Capture | None) -> None:
        self.step, self.device, self.capture = step, device, capture
        self.recordings: Recordings[tuple[Any, Replay]] = Recordings(MOST_GRAPHS)

    def __call__(self, batch: StepBatch) -> None:
        """Runs the step of `batch`, one way or the other; from pinned memory the host does not wait."""
        capture = self.capture
        if capture is None or not self.recordings.serves(batch.shape):
            self.recordings.meet(batch.shape)
            self.step(batch.to(self.device, non_blocking=True))
            return

        def record() -> tuple[Any, Replay]:
            held = batch.to(self.device).clone()
            return held, capture(lambda: self.step(held))[1]

        held, replay = self.recordings.get(batch.shape, record)
        held.copy_(batch)
        replay()


class CudaGraphs:
    """Captures CUDA graphs of one device that share their memory: they are replayed one at a time, on one stream."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.replaying_stream = torch.cuda.current_stream(device)
        self.capturing_stream = torch.cuda.Stream(device)

    def may_replay(self) -> bool:
        """Tells whether this is the stream on which replays follow each other, and no capture of the caller's."""
        here = torch.cuda.current_stream(self.device)
        return here == self.replaying_stream and not torch.cuda.is_current_stream_capturing()

    def __call__(self, work: Callable[[], T], /) -> tuple[T, Replay]:
        """Records what `work` launches, without running it; the replay launches it all at once.

        Raises:
            RuntimeError: the work waits for the device, or does what no graph can hold.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads may do what they like meanwhile: those of a data loader pin memory.
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, pool=self.pool, stream=self.capturing_stream, capture_error_mode="thread_local"),
        ):
            result = work()
        return result, graph.replay


_rehearsing = False


@contextmanager
def rehearsal() -> Iterator[None]:
    """Has everything inside the block run as it will be captured: nothing is read from the device."""
    global _rehearsing
    before, _rehearsing = _rehearsing, True
    try:
        yield
    finally:
        _rehearsing = before


def rehearsing() -> bool:
    """Tells whether work runs as it will be captured."""
    return _rehearsing
