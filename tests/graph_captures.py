"""Stands in for CUDA graphs on a CPU, and compares a module that is graphed by it with its eager twin."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tfm
from tfm.graphs import rehearsal

DIM, HEADS = 8, 2


class Captures:
    """Records forwards and backwards, with what makes CUDA graphs dangerous: memory that is shared and filled anew.

    A replay runs its work again, and leaves the results where the first were. A backward needs what the last forward
    left, and that must have been its own.
    """

    def __init__(self) -> None:
        self.captured: list[str] = []
        self.replayed: list[str] = []
        self.last_forward = -1

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        index, name, learns = len(self.captured), work.__name__, torch.is_grad_enabled()
        self.captured.append(name)
        # A graph draws when it is replayed, and has the modes in which it was captured.
        with torch.random.fork_rng():
            held = work()

        def replay() -> None:
            self.replayed.append(name)
            if name == "forward":
                self.last_forward = index
            else:
                assert self.last_forward == index - 1, "a forward took the memory of another, whose backward came later"
            with torch.set_grad_enabled(learns):
                new = work()
            with torch.no_grad():
                for x, y in zip(held, new, strict=True):
                    if isinstance(x, Tensor):
                        x.copy_(y)

        return held, replay


class Pair:
    """A graphed module, its eager twin, and calls of both that are compared to the bit."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        self.captures = Captures()
        self.eager = copy.deepcopy(module)
        self.graphed = tfm.graphed(module, capture=self.captures, **options)

    def both(self, change: Callable[[nn.Module], object]) -> None:
        for module in (self.eager, self.graphed):
            change(module)

    def outputs(self, *args: Any, seed: int = 0, **named: Any) -> list[Tensor]:
        torch.manual_seed(seed)
        # On padded tensors, as in a graph: dropout masks of packed tensors are others.
        with rehearsal():
            expected = self.eager(*args, **named)
        torch.manual_seed(seed)
        return [expected, self.graphed(*args, **named)]

    def check(self, *args: Any, seed: int = 0, **named: Any) -> int:
        """Compares outputs and all gradients; returns how many replays that took."""
        before = len(self.captures.replayed)
        given = [x for x in (*args, *named.values()) if isinstance(x, Tensor) and x.requires_grad]
        outputs, gradients = self.outputs(*args, seed=seed, **named), []
        for module, output in zip((self.eager, self.graphed), outputs, strict=True):
            needing = [*given, *(p for p in module.parameters() if p.requires_grad)] if output.requires_grad else []
            weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
            gradients.append(torch.autograd.grad(output, needing, weight, allow_unused=True) if needing else [])
        same(outputs[0], outputs[1])
        assert outputs[0].stride() == outputs[1].stride()
        for expected, found in zip(*gradients, strict=True):
            same(expected, found)
        return len(self.captures.replayed) - before

    def settle(self, *args: Any, **named: Any) -> None:
        """Has a kind of call captured."""
        assert self.check(*args, **named) == 0
        self.check(*args, **named)


def same(one: Tensor | None, other: Tensor | None) -> None:
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one.dtype == other.dtype
        assert one.requires_grad == other.requires_grad
        assert torch.equal(one, other)


def encoder(dropout: float = 0.1, layers: int = 2) -> nn.Module:
    torch.manual_seed(1)
    layer = tfm.nn.TransformerEncoderLayer(DIM, HEADS, 16, dropout, batch_first=True)
    return tfm.nn.TransformerEncoder(layer, layers, tfm.nn.LayerNorm(DIM))


def x(*shape: int, needs_grad: bool = True) -> Tensor:
    return torch.randn(*(shape or (2, 5)), DIM, requires_grad=needs_grad)
