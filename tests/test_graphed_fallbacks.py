"""What changes a graphed module, or what no graph can hold, is noticed: it is captured anew, or runs as it is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from graph_captures import DIM, Pair, encoder, same, x
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tfm
from tfm.patching.replay import CALLS, MOST_STATES


def new_weight(module: Any) -> None:
    torch.manual_seed(9)
    module.norm.weight = nn.Parameter(torch.randn(DIM))


def moved_weight(module: Any) -> None:
    module.norm.weight.data = module.norm.weight.data + 1


def new_child(module: Any) -> None:
    torch.manual_seed(9)
    module.layers[0].linear1 = nn.Linear(DIM, 16)


def more_dropout(module: Any) -> None:
    module.layers[1].dropout1.p = 0.5


def frozen(module: Any) -> None:
    module.layers[0].requires_grad_(False)


def in_double(module: Any) -> None:
    module.layers[0].linear1.double().float()


@pytest.mark.parametrize("change", [new_weight, moved_weight, new_child, more_dropout, frozen, in_double])
def test_a_changed_module_is_captured_anew(change):
    pair = Pair(encoder())
    pair.settle(given := x())
    pair.both(change)
    assert [pair.check(given) for _ in range(3)] == [0, 2, 2]


def test_a_module_that_always_changes_runs_as_it_is():
    pair = Pair(encoder(dropout=0.0))
    for step in range(2 * MOST_STATES):
        pair.both(lambda module, step=step: setattr(module, "step", 1000 + step))
        assert pair.check(x()) == 0
    assert len(vars(pair.graphed)[CALLS].states) <= MOST_STATES


def hooked_inside(pair: Pair) -> None:
    pair.both(lambda module: module.layers[0].register_forward_hook(lambda layer, given, output: 2 * output))


def test_hooks_inside_act_and_hooks_outside_are_no_hindrance():
    pair = Pair(encoder())
    pair.both(lambda module: module.register_forward_hook(lambda layer, given, output: 3 * output))
    pair.both(lambda module: module.norm.weight.register_hook(lambda gradient: 5 * gradient))
    pair.settle(given := x())
    assert pair.check(given) == 2
    hooked_inside(pair)
    assert [pair.check(given) for _ in range(3)] == [0, 0, 0]


def under_autocast(pair: Pair, given: Tensor) -> int:
    with torch.autocast("cpu", torch.bfloat16):
        return pair.check(given)


def under_a_backend(pair: Pair, given: Tensor) -> int:
    with tfm.use("reference"):
        return pair.check(given)


def with_another_dtype(pair: Pair, given: Tensor) -> int:
    return pair.check(given, mask=torch.zeros(5, 5, dtype=torch.float64))


@pytest.mark.parametrize("way", [under_autocast, under_a_backend, with_another_dtype])
def test_other_settings_are_another_kind_of_call(way):
    pair = Pair(encoder())
    pair.settle(given := x())
    assert [way(pair, given) for _ in range(3)] == [0, 2, 2]
    assert pair.check(given) == 2


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.answers: list[bool] = []

    def forward(self, given: Tensor) -> Tensor:
        self.answers.append(torch.is_autocast_cache_enabled())
        return 2 * given


def test_casts_of_weights_are_captured_too():
    pair = Pair(Asks())
    with torch.autocast("cpu", torch.bfloat16):
        pair.settle(x())
        assert pair.graphed.answers == [True, False, False]
        assert torch.is_autocast_cache_enabled()


def checkpointed(pair: Pair, given: Tensor) -> None:
    for module in (pair.eager, pair.graphed):
        given.grad = None
        torch.manual_seed(0)
        checkpoint(module, given, use_reentrant=False).sum().backward()
        pair.found.append(given.grad)


def traced(pair: Pair, given: Tensor) -> None:
    pair.both(nn.Module.eval)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair.found += [
            torch.jit.trace(module, given, check_trace=False)(given) for module in (pair.eager, pair.graphed)
        ]


def in_fx(pair: Pair, given: Tensor) -> None:
    pair.both(nn.Module.eval)
    pair.found += [torch.fx.symbolic_trace(nn.Sequential(m))(given) for m in (pair.eager, pair.graphed)]


def compiled(pair: Pair, given: Tensor) -> None:
    for module in (pair.eager, pair.graphed):
        torch.manual_seed(0)
        pair.found.append(torch.compile(module, backend="aot_eager", fullgraph=True)(given))


def under_vmap(pair: Pair, given: Tensor) -> None:
    pair.both(nn.Module.eval)
    pair.found += [torch.vmap(module)(given[None]) for module in (pair.eager, pair.graphed)]


def with_a_list(pair: Pair, given: Tensor) -> None:
    pair.both(nn.Module.eval)
    pair.found += [module(given, lengths=[5, 2]) for module in (pair.eager, pair.graphed)]


@pytest.mark.parametrize("way", [checkpointed, traced, in_fx, compiled, under_vmap, with_a_list])
def test_what_no_graph_can_hold_runs_as_it_is(way):
    pair = Pair(encoder())
    pair.settle(given := x())
    before = len(pair.captures.replayed)
    for _ in range(3):
        pair.found = []
        way(pair, given)
        torch.testing.assert_close(pair.found[0], pair.found[1])
    assert len(pair.captures.replayed) == before


def test_second_derivatives_are_right_or_refused():
    pair = Pair(encoder(dropout=0.0))
    for _ in range(3):
        # Never captured, as its first backward was differentiated.
        found = []
        for output in pair.outputs(given := x()):
            (gradient,) = torch.autograd.grad(output.square().sum(), given, create_graph=True)
            found.append(torch.autograd.grad(gradient.square().sum(), given)[0])
        assert torch.equal(*found)
    pair.settle(given := x(3, 4))
    with pytest.raises(RuntimeError, match="expected a backward that is not differentiated again"):
        torch.autograd.grad(pair.graphed(given).sum(), given, create_graph=True)
    output = pair.graphed(given)
    with pytest.raises(RuntimeError, match="no batch of them"):
        torch.autograd.grad(output, given, torch.ones(2, *output.shape), is_grads_batched=True)


class Writes(nn.Module):
    def forward(self, given: Tensor) -> Tensor:
        return given.mul_(2) + 1


class Elsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.held = [nn.Parameter(torch.ones(DIM))]

    def forward(self, given: Tensor) -> Tensor:
        return given * self.held[0]


class ReturnsMore(nn.Module):
    def forward(self, given: Tensor) -> dict[str, Tensor]:
        return {"double": 2 * given}


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Writes(), "changes its inputs in place"),
        (Elsewhere(), "gradients of tensors that are neither its arguments nor its modules' own"),
        (ReturnsMore(), "expected a tensor, or a tuple of tensors and None"),
    ],
    ids=["writes", "elsewhere", "more"],
)
def test_what_a_graph_would_get_wrong_is_said_and_runs_as_it_is(module, why):
    pair = Pair(module)
    given = x(needs_grad=False)
    output = pair.graphed(given.clone())
    if isinstance(output, Tensor) and output.requires_grad:
        output.sum().backward()
    with pytest.warns(UserWarning, match=f"graphed: {type(pair.eager).__name__} runs kernel by kernel .*{why}"):
        pair.graphed(given.clone())
    torch.testing.assert_close(pair.graphed(given.clone()), pair.eager(given.clone()))
    assert not pair.captures.replayed


def test_on_a_cpu_nothing_is_captured():
    module, eager = tfm.graphed(encoder(0.0)), encoder(0.0)
    for _ in range(3):
        same(module(given := x()), eager(given))
    assert not vars(module)[CALLS].recordings.met
