"""Training steps as CUDA graphs: a small model's step is hundreds of kernels that take the host longer than the GPU.

A step of a batch is captured once for each shape of batch, whole: forward, backward, clipping and the update. Replaying
it is one launch. It reads the batch from tensors of its own, into which each batch is copied before. Shapes are few
where batches are filled up (`Batch.rounded`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tfm.data import Batch

# The most graphs that are kept, some megabytes of launches each; shapes that come later run kernel by kernel.
MOST_GRAPHS = 128

Replay = Callable[[], object]
Capture = Callable[[Callable[[], object]], Replay]


class GraphedSteps:
    """`step` of a batch on `device`, replayed from the second time on that a batch of its shape comes.

    Args:
        step: takes a batch on the device. It must read nothing back from there, keep no tensor that it makes, change
            what it changes in place, and be the same work for all batches of a shape.
        device: where it computes.
        capture: makes a function that repeats what it is given; None where nothing is captured, and each step is run.
    """

    def __init__(self, step: Callable[[Batch], object], device: torch.device, capture: Capture | None) -> None:
        self.step, self.device, self.capture = step, device, capture
        self.met: set[tuple[int, ...]] = set()
        self.graphs: dict[tuple[int, ...], tuple[Batch, Replay]] = {}

    def __call__(self, batch: Batch) -> None:
        """Runs the step of `batch`, one way or the other; from pinned memory the host does not wait."""
        shape = batch.shape
        if shape not in self.graphs:
            # The first time it runs as it is: kernels are compiled and state is made, which no graph can hold.
            if self.capture is None or shape not in self.met or len(self.graphs) == MOST_GRAPHS:
                self.met.add(shape)
                self.step(batch.to(self.device, non_blocking=True))
                return
            held = batch.to(self.device).clone()
            self.graphs[shape] = held, self.capture(lambda: self.step(held))
        held, replay = self.graphs[shape]
        held.copy_(batch)
        replay()


class CudaGraphs:
    """Captures CUDA graphs of one device that share their memory: they are replayed one at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], object]) -> Replay:
        """Records what `step` launches, without running it; the result launches it all at once.

        Raises:
            RuntimeError: the step waits for the device, or does what no graph can hold.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool):
            step()
        return graph.replay
