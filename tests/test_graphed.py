"""A graphed module is the eager one: outputs, gradients, dropout, whatever comes in between."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from graph_captures import DIM, HEADS, Pair, encoder, x
from torch import nn

import tfm
from tfm.graphs import rehearsal
from tfm.patching.replay import CALLS


def test_every_kind_of_call_is_that_of_the_module():
    torch.manual_seed(1)
    pair = Pair(tfm.nn.Transformer(DIM, HEADS, 1, 1, 12, batch_first=True))
    padding = torch.arange(5) >= torch.tensor([5, 2])[:, None]
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    calls = [
        lambda: ((x(), x(2, 4)), {}),
        lambda: ((x(), x(2, 4, needs_grad=False)), {"src_key_padding_mask": padding}),
        lambda: ((x(), x(2, 4)), {"src_key_padding_mask": padding.float() * -1e9, "tgt_mask": causal}),
        lambda: ((x(3, 6), x(3, 4)), {"tgt_is_causal": True}),
        lambda: ((x(2, 4).transpose(0, 1), x(4, 3)), {"src_lengths": torch.tensor([2, 1, 2, 1])}),
    ]
    for turn in range(4):
        replays = [pair.check(*args, seed=turn, **named) for args, named in (call() for call in calls)]
        assert replays == [0 if turn == 0 else 2] * len(calls)
    assert pair.captures.captured == ["forward", "backward"] * len(calls)
    pair.both(nn.Module.eval)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for turn in range(3):
            args, named = calls[1]()
            with mode():
                assert bool(pair.check(*args, **named)) == (turn > 0)
    pair.both(nn.Module.train)
    assert pair.check(x(), x(2, 4)) == 2


def test_dropout_is_drawn_anew_and_ruled_by_the_seed():
    pair = Pair(encoder())
    pair.settle(given := x())
    torch.manual_seed(3)
    drawn = [pair.graphed(given).detach() for _ in range(3)]
    torch.manual_seed(3)
    expected = [pair.eager(given) for _ in range(3)]
    assert all(map(torch.equal, drawn, expected))
    assert not torch.equal(drawn[0], drawn[1])


def test_results_and_gradients_are_the_callers_own():
    pair = Pair(encoder(), most_graphs=4)
    pair.settle(x())
    inputs, outputs, gradients = [x() for _ in range(3)], [], []
    for module in (pair.eager, pair.graphed):
        torch.manual_seed(5)
        kept = []
        for given in inputs:
            output = module(given)
            kept.append(output.detach().clone())
            # A view hands its gradient on as it is, and a parameter takes the first for its own.
            output.view(-1).sum().backward()
            output.detach().zero_()
        outputs.append(kept)
        gradients.append([p.grad for p in module.parameters()] + [given.grad for given in inputs])
        for given in inputs:
            given.grad = None
    assert all(map(torch.equal, *outputs))
    assert all(map(torch.equal, *gradients))
    assert pair.captures.replayed.count("backward") == 1 + 3


def test_two_forwards_before_their_backwards():
    pair = Pair(encoder())
    first, second = x(), x()
    pair.settle(first)
    for order in ((0, 1), (1, 0)):
        gradients = []
        before = len(pair.captures.replayed)
        for module in (pair.eager, pair.graphed):
            torch.manual_seed(7)
            outputs = [module(first), module(second)]
            gradients.append([torch.autograd.grad(outputs[i].sum(), [first, second][i])[0] for i in order])
        assert all(map(torch.equal, *gradients))
        # The second forward ran as it is.
        assert len(pair.captures.replayed) - before == 2
    forgotten = pair.graphed(first)
    assert pair.check(first) == 0
    # In evaluation too: its graphs share the memory.
    pair.both(nn.Module.eval)
    with torch.no_grad():
        assert [pair.check(first) for _ in range(3)] == [0, 0, 0]
    del forgotten
    gc.collect()
    pair.both(nn.Module.train)
    assert pair.check(first) == 2


def test_a_backward_that_is_kept_comes_again():
    pair = Pair(encoder())
    pair.settle(given := x())
    expected, found = pair.outputs(given)
    for keeps in (True, True, False):
        gradients = [torch.autograd.grad(y.square().sum(), given, retain_graph=keeps)[0] for y in (expected, found)]
        assert torch.equal(*gradients)
        # Held until the last of them.
        assert bool(pair.check(given)) == (not keeps)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        found.sum().backward()


def test_frozen_weights_and_a_second_backward():
    pair = Pair(encoder().requires_grad_(False))
    pair.settle(given := x())
    assert pair.check(given) == 2
    found = pair.graphed(given)
    found.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        found.backward(torch.ones_like(found))


def test_weights_changed_before_the_backward_are_refused():
    pair = Pair(encoder())
    pair.settle(given := x())
    output = pair.graphed(given)
    with torch.no_grad():
        pair.graphed.norm.weight.add_(1)
    before = list(pair.captures.replayed)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    assert pair.captures.replayed == before


def test_updated_weights_are_read_anew():
    pair = Pair(encoder())
    pair.settle(given := x())
    optimizers = [torch.optim.Adam(m.parameters(), 0.1) for m in (pair.eager, pair.graphed)]
    for _ in range(3):
        for output, optimizer in zip(pair.outputs(given), optimizers, strict=True):
            output.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert pair.check(given) == 2


def test_beyond_the_most_graphs_calls_run_as_they_are():
    pair = Pair(encoder(), most_graphs=1)
    shapes = [(1, 2), (2, 2), (1, 2), (2, 2), (1, 2)]
    assert [pair.check(x(*shape)) for shape in shapes] == [0, 0, 2, 0, 2]


def test_copies_and_pickles_capture_their_own():
    pair = Pair(encoder())
    pair.settle(given := x())
    for copied in (copy.deepcopy(pair.graphed), pickle.loads(pickle.dumps(pair.graphed))):
        assert isinstance(copied, tfm.nn.TransformerEncoder)
        with torch.no_grad():
            copied.norm.weight.mul_(2), copied.norm.bias.mul_(2)
        copied.eval(), pair.eager.eval()
        calls = vars(copied)[CALLS]
        for replays in (0, 1, 2):
            with torch.no_grad():
                torch.testing.assert_close(copied(given), 2 * pair.eager(given))
            assert len(calls.given.replayed) - len(pair.captures.replayed) == replays
        assert calls.module is copied
    assert pair.graphed.state_dict().keys() == pair.eager.state_dict().keys()


def test_accelerate_and_restore():
    torch.manual_seed(0)
    model = nn.ModuleDict({"whole": nn.Transformer(DIM, HEADS, 1, 1, 12), "alone": nn.Linear(2, 2)})
    before = {name: type(module) for name, module in model.named_modules()}
    assert "CUDA graphs" not in str(tfm.accelerate(model))
    report = tfm.accelerate(model, graphs=True)
    assert report.graphed == ("whole",)
    assert str(report).splitlines()[1] == "  CUDA graphs: whole"
    assert isinstance(model["whole"], tfm.nn.Transformer)
    calls = vars(model["whole"])[CALLS]
    again = tfm.accelerate(model, graphs=True)
    assert (again.graphed, again.swapped, again.unchanged) == ((), (), report.unchanged)
    assert vars(model["whole"])[CALLS] is calls
    restored = tfm.restore(model)
    assert restored.graphed == ("whole",)
    assert "  no CUDA graphs any more: whole" in str(restored)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert CALLS not in vars(model["whole"])
    tfm.graphed(model["whole"])
    assert "call accelerate() before graphed()" in tfm.accelerate(model).left[0].reason


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_refuses_what_it_cannot_change():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got Tensor"):
        tfm.graphed(torch.ones(2))
    patched = nn.Linear(2, 2)
    patched.forward = lambda given: given
    for module in (patched, torch.jit.script(nn.Linear(2, 2)), torch.compile(nn.Linear(2, 2))):
        with pytest.raises(TypeError, match="expected a module that runs its class's forward"):
            tfm.graphed(module)
    with pytest.raises(ValueError, match="most_graphs: expected at least 1, got 0"):
        tfm.graphed(nn.Linear(2, 2), most_graphs=0)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_cuda_graphs_train_as_run_kernels(autocast):
    torch.manual_seed(1)
    eager = tfm.nn.Transformer(64, 4, 2, 2, 128, batch_first=True).cuda()
    graphed = tfm.graphed(copy.deepcopy(eager))
    padding = torch.arange(9, device="cuda") >= torch.tensor([9, 3, 5], device="cuda")[:, None]
    for turn in range(6):
        source, target = (torch.randn(3, n, 64, device="cuda") for n in (9, 5 + turn % 2))
        found = []
        for module in (eager, graphed):
            torch.manual_seed(turn)
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast), rehearsal():
                output = module(source.requires_grad_(), target, src_key_padding_mask=padding)
            output.float().square().mean().backward()
            found.append([output.detach(), source.grad, *(p.grad for p in module.parameters())])
            source.grad = None
        for expected, replayed in zip(*found, strict=True):
            torch.testing.assert_close(
                replayed, expected, rtol=2e-2 if autocast else 1e-5, atol=1e-3 if autocast else 1e-6
            )
    assert len(vars(graphed)[CALLS].recordings.kept) == 2
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(graphed.eval()(source, target), eager.eval()(source, target))
    first, second = graphed.train()(source, target), graphed(source, target)
    assert not torch.equal(first, second)
