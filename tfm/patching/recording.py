"""One kind of call of a module as graphs: its forward and its backward, over memory of their own."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from tfm.autocast import without_autocast
from tfm.graphs import Capture, rehearsal
from tfm.patching.snapshot import Snapshot
from tfm.transforms import beyond_one_backward


class Call:
    """One call: its tensors, each once, and by what a recording of it must be like it."""

    def __init__(self, module: Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.module, self.args, self.named = module, args, named
        self.tensors: list[Tensor] = []
        self.places: dict[int, int] = {}
        self.is_plain = True
        traits: list[Hashable] = [*named]
        for x in (*args, *named.values()):
            if type(x) in (Tensor, torch.nn.Parameter):
                if id(x) not in self.places:
                    self.places[id(x)] = len(self.tensors)
                    self.tensors.append(x)
                    self.is_plain &= x.layout == torch.strided and not x.is_nested and x.numel() > 0
                traits.append(self.places[id(x)])
            else:
                self.is_plain &= type(x) in (type(None), bool, int, str)
                traits.append((type(x), x))
        self.is_plain &= len({x.device for x in self.tensors}) == 1
        if self.is_plain:
            self.device = self.tensors[0].device
            traits += [(x.shape, x.stride(), x.dtype, x.requires_grad) for x in self.tensors]
        self.traits = traits

    def run(self, tensors: Sequence[Tensor] | None = None) -> Any:
        """Runs the forward of the module's own class, on other tensors where they are given."""
        kind: Any = type(self.module)
        if tensors is None:
            return kind._graphed_kind.forward(self.module, *self.args, **self.named)
        args, named = (
            [tensors[self.places[id(x)]] if id(x) in self.places else x for x in values]
            for values in (self.args, self.named.values())
        )
        return kind._graphed_kind.forward(self.module, *args, **dict(zip(self.named, named, strict=True)))

    def rehearse(self) -> Any:
        """Runs the same as it is captured, so that it draws the same dropout masks as a replay would."""
        with rehearsal():
            return self.run()


class Awaited:
    """Stands for a backward that is still to come; it goes with the last that could ask for it."""


class Pool:
    """The memory that the graphs of a module share, which holds one forward until its backward is done.

    Args:
        capture: records graphs in this memory; None until the device is known.
    """

    def __init__(self, capture: Capture | None) -> None:
        self.capture = capture
        self._awaited: weakref.ref[Awaited] | None = None

    def is_held(self) -> bool:
        """Tells whether a backward is to come: a replay would take from it what it needs, its dropout mask included."""
        return self._awaited is not None and self._awaited() is not None

    def hold(self) -> Awaited:
        """Holds the memory for as long as the result is kept."""
        awaited = Awaited()
        self._awaited = weakref.ref(awaited)
        return awaited


class Recording:
    """The graphs of one kind of call, with the memory that they read and fill."""

    def __init__(self, pool: Pool, state: Snapshot, call: Call) -> None:
        capture = pool.capture
        assert capture is not None
        self.pool = pool
        learns = torch.is_grad_enabled()
        # Tensors of inference mode could not be filled anew outside of it.
        with torch.inference_mode(False):
            self.inputs = [x.detach().clone().requires_grad_(learns and x.requires_grad) for x in call.tensors]
        self.weights = [x for x in state.tensors if learns and x.requires_grad]
        # Without the weights' own hooks, and without nodes that an earlier backward left on the caller's stream.
        aliases = {x: x.detach().requires_grad_() for x in self.weights}
        leaves = [*(x for x in self.inputs if x.requires_grad), *aliases.values()]
        self.places = [place for place, x in enumerate(self.inputs) if x.requires_grad]
        results: list[Tensor | None] = []

        def forward() -> list[Tensor | None]:
            nonlocal results
            with rehearsal(), state.replaced(aliases), _without_autocast_cache():
                output = call.run(self.inputs)
            self.is_tuple = type(output) is tuple
            results = list(output) if self.is_tuple else [output]
            return [x.detach() if isinstance(x, Tensor) else x for x in results]

        versions = [x._version for x in self.inputs]
        self.outputs, self.replay_forward = capture(forward)
        if not all(x is None or type(x) is Tensor for x in results):
            raise RuntimeError("expected a tensor, or a tuple of tensors and None, as its result")
        if [x._version for x in self.inputs] != versions:
            raise RuntimeError("it changes its inputs in place")
        self.learns = [x is not None and x.requires_grad for x in results]
        if not any(self.learns):
            return
        _check_leaves(results, leaves)
        self.output_gradients = [torch.zeros_like(x) if x is not None and x.requires_grad else None for x in results]
        self.gradients = [
            *(torch.empty_like(self.inputs[place], requires_grad=False) for place in self.places),
            *map(state.gradient_of, self.weights),
        ]

        def backward() -> list[bool]:
            pairs = [(x, grad) for x, grad in zip(results, self.output_gradients, strict=True) if grad is not None]
            roots, grads = zip(*pairs, strict=True)
            # Kept, as the caller may want the backward again; the memory is free for other graphs once all is captured.
            with without_autocast(call.device):
                found = torch.autograd.grad(roots, leaves, grads, retain_graph=True, allow_unused=True)
            _copy(self.gradients, found)
            return [x is not None for x in found]

        self.is_used, self.replay_backward = capture(backward)

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """Replays the forward on `tensors`, as a node of autograd where gradients are needed."""
        if any(self.learns):
            needing = [*(tensors[place] for place in self.places), *self.weights]
            found = Replayed.apply(self, tensors, *needing)
        else:
            found = self.forward(tensors)
        return found if self.is_tuple else found[0]

    @torch.no_grad()
    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Replays the forward; the results are the caller's own."""
        _copy(self.inputs, tensors)
        self.replay_forward()
        return tuple(x if x is None else x.clone() for x in self.outputs)

    def backward(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Replays the backward of the last forward; the gradients are the caller's own."""
        _copy(self.output_gradients, grads)
        self.replay_backward()
        used = [x for x, is_used in zip(self.gradients, self.is_used, strict=True) if is_used]
        own = [torch.empty_like(x) for x in used]
        _copy(own, used)
        each = iter(own)
        return [next(each) if is_used else None for is_used in self.is_used]


class Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, tensors: Sequence[Tensor], *needing: Tensor) -> Any:
        ctx.recording, ctx.awaited = recording, recording.pool.hold()
        # Not used, but torch refuses to give them, and so the backward, where they have changed or it has been.
        ctx.save_for_backward(*recording.weights)
        found = recording.forward(tensors)
        ctx.mark_non_differentiable(
            *(x for x, learns in zip(found, recording.learns, strict=True) if x is not None and not learns)
        )
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if beyond_one_backward(*grads):
            raise RuntimeError(
                "graphed: expected a backward that is not differentiated again (create_graph=False) and no batch of "
                "them; tfm.restore(model) has the module run as it is"
            )
        _ = ctx.saved_tensors
        found = ctx.recording.backward(grads)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.awaited = None
        return None, None, *found


def _copy(held: Sequence[Tensor | None], new: Sequence[Tensor | None]) -> None:
    """Copies the new tensors into those held, in few launches, where there are both."""
    pairs = [(x, y) for x, y in zip(held, new, strict=True) if x is not None and y is not None]
    if pairs:
        torch._foreach_copy_([x for x, _ in pairs], [y for _, y in pairs])


def _check_leaves(results: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> None:
    """Refuses results whose gradients go to tensors that are neither arguments nor held by the module."""
    known = {id(x) for x in leaves}
    found = [x for x in results if x is not None and x.requires_grad]
    strangers = [x for x in found if x.is_leaf and id(x) not in known]
    nodes: list[Any] = [x.grad_fn for x in found if x.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::AccumulateGrad" and id(node.variable) not in known:
            strangers.append(node.variable)
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        nodes += new
    if strangers:
        raise RuntimeError("it needs gradients of tensors that are neither its arguments nor its modules' own")


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Has casts of weights recorded: one that autocast made before would be read for ever."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
