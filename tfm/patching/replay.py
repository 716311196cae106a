"""graphed(): modules whose forward and backward are replayed as CUDA graphs, one pair for each kind of call.

torch.cuda.make_graphed_callables hands out its own memory as results and gradients, which the next call fills anew, and
a second forward takes from the first what its backward needs. Here results and gradients are the caller's own, and
while a backward is to come no graph of the module is replayed.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from tfm.graphs import Capture, CudaGraphs, Recordings
from tfm.operators.watching import is_intercepted
from tfm.ops import backends
from tfm.patching.recording import Call, Pool, Recording
from tfm.patching.snapshot import Snapshot
from tfm.tracing import tracing
from tfm.transforms import beyond_one_backward

M = TypeVar("M", bound=Module)

MOST_GRAPHS = 64
# Training, evaluation, and either with some weights frozen; a module that changes more often starts over.
MOST_STATES = 4
CALLS = "_graphed_by_tfm"


def graphed(module: M, *, most_graphs: int = MOST_GRAPHS, capture: Capture | None = None) -> M:
    """Has calls of `module` on a GPU replay CUDA graphs of its forward and backward, and returns it, changed in place.

    Shapes are exact: nothing is filled up. A kind of call (shapes, strides and dtypes of the tensors, which of them
    need gradients, other arguments, training or evaluation, autocast) runs as it is when it comes first, and is
    captured when it comes again; with gradients, it counts from its first backward on. Outputs and gradients are those
    of the module; dropout is drawn anew at each replay, as `torch.manual_seed` rules it, and a backward repeats the
    mask of its own forward. Stacks of `tfm.nn` do not pack their batches then, and lengths are not checked.

    Calls run kernel by kernel, as before, wherever a replay could not be right: on CPUs, while the backward of an
    earlier call is to come, with hooks inside the module, under tracing, torch.compile, transforms, activation
    checkpointing or another capture, on another stream than at first, with arguments other than tensors of the GPU,
    None, bool, int and str. Where weights are replaced or moved, or attributes of modules set, kinds of call are
    captured anew. Not noticed is what changes inside a list or an object that modules hold, and Python code that would
    do something else at each call.

    Args:
        module: any module that is the same work each time. Its results are a tensor, or a tuple of tensors and None.
        most_graphs: how many kinds of call are captured; they share one pool of memory, in which the largest needs what
            it needs eagerly, and each keeps its inputs and outputs.
        capture: records work in place of CUDA, on any device, as in `tfm.graphs.GraphedSteps`.

    Raises:
        TypeError: `module` is no torch.nn.Module that runs Python's forward of its class.
        ValueError: `most_graphs` is below 1.
        RuntimeError: in a backward: it is differentiated again (create_graph=True) or comes in batches, which no graph
            can; or weights have changed since the forward. `tfm.restore` undoes all.
    """
    if not isinstance(module, Module):
        raise TypeError(f"graphed: expected a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
        raise TypeError(f"graphed: expected a module that runs its class's forward, got {type(module).__name__}")
    if most_graphs < 1:
        raise ValueError(f"most_graphs: expected at least 1, got {most_graphs}")
    if not is_graphed(module):
        kind: Any = type(module)
        module.__class__ = _graphed_class(kind)
    vars(module)[CALLS] = GraphedCalls(module, most_graphs, capture)
    return module


def is_graphed(module: Module) -> bool:
    """Tells whether graphed() changed the class of `module`."""
    return "_graphed_kind" in vars(type(module))


def plain_class(module: Module) -> type[Module]:
    """Returns the class of `module` as it was before graphed()."""
    kind: Any = type(module)
    return kind._graphed_kind if is_graphed(module) else kind


def ungraph(module: Module) -> None:
    """Undoes graphed(); the graphs and their memory go."""
    module.__class__ = plain_class(module)
    del vars(module)[CALLS]


@functools.cache
def _graphed_class(kind: Any) -> Any:
    """Returns a subclass of `kind` whose forward goes by the graphs of its module."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **named: Any) -> Any:
        if not _is_intercepted():
            calls = vars(self)[CALLS]
            # torch.nn.DataParallel's replicas share it.
            if calls.module is self:
                return calls(args, named)
        return kind.forward(self, *args, **named)

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return (_blank, (kind,), *kind.__reduce_ex__(self, protocol)[2:])

    attributes = {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__, "_graphed_kind": kind}
    return type(f"Graphed{kind.__name__}", (kind,), attributes)


def _blank(kind: Any) -> Any:
    """Returns what copies and pickles of a graphed module start from."""
    graphed_kind = _graphed_class(kind)
    return graphed_kind.__new__(graphed_kind)


class GraphedCalls:
    """The graphs of one module, and what decides between them and the module's own forward."""

    def __init__(self, module: Module, most_graphs: int, given: Capture | None) -> None:
        self.module, self.most_graphs, self.given = module, most_graphs, given
        self._start_anew(given)

    def __getstate__(self) -> tuple[Module, int, Capture | None]:
        # A copy has weights of its own, and captures its own graphs.
        return self.module, self.most_graphs, self.given

    def __setstate__(self, state: tuple[Module, int, Capture | None]) -> None:
        self.module, self.most_graphs, self.given = state
        self._start_anew(self.given)

    def _start_anew(self, capture: Capture | None) -> None:
        self.pool = Pool(capture)
        self.states: list[Snapshot] = []
        self.recordings: Recordings[Recording] = Recordings(self.most_graphs)
        self.refused: set[Hashable] = set()

    def __call__(self, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Replays the call, or runs it."""
        call = Call(self.module, args, named)
        if not call.is_plain or not self._may_replay(call.device):
            return call.run()
        if self.pool.is_held():
            return call.rehearse()
        state = self._state()
        if state.why_eager or not state.is_on(call.device):
            return call.run()
        key = (state, *call.traits, *_settings(call.device))
        if not self.recordings.serves(key):
            return self._met(key, call.rehearse())
        if key in self.refused:
            return call.rehearse()
        try:
            recording = self.recordings.get(key, lambda: Recording(self.pool, state, call))
        except RuntimeError as error:
            self.refused.add(key)
            name = plain_class(self.module).__name__
            warnings.warn(f"graphed: {name} runs kernel by kernel for inputs like these: {error}", stacklevel=5)
            return call.rehearse()
        return recording(call.tensors)

    def _may_replay(self, device: torch.device) -> bool:
        if self.given is not None:
            return True
        if device.type != "cuda":
            return False
        capture = self.pool.capture
        if not isinstance(capture, CudaGraphs) or capture.device != device:
            capture = CudaGraphs(device)
            self._start_anew(capture)
        return capture.may_replay()

    def _state(self) -> Snapshot:
        for state in self.states:
            if state.holds():
                return state
        if len(self.states) == MOST_STATES:
            self._start_anew(self.pool.capture)
        self.states.append(Snapshot(self.module))
        return self.states[-1]

    def _met(self, key: Hashable, output: Any) -> Any:
        """Returns the output of a call that ran as it is, and counts it now, or after its backward if it has one."""
        results = output if isinstance(output, tuple) else (output,)
        nodes = [x.grad_fn for x in results if isinstance(x, Tensor) and x.grad_fn is not None]
        if not nodes:
            self.recordings.meet(key)
            return output

        def meet(grads: Sequence[Tensor | None]) -> None:
            if beyond_one_backward(*grads):
                self.refused.add(key)
            self.recordings.meet(key)

        nodes[0].register_prehook(meet)
        return output


def _is_intercepted() -> bool:
    """Tells whether something looks at each operation that runs."""
    return (
        is_intercepted()
        or tracing()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or _has_any_global_hook()
        or not all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    )


def _settings(device: torch.device) -> tuple[Hashable, ...]:
    """Returns the settings of the process that decide what a call computes."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.fp32_precision,
        backends.forced(),
    )
