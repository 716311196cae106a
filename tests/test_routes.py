"""Routes and launch plans give the bits of the calls that they repeat, and stand aside where something else counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from plain_calls import plainly
from torch import Tensor

from tfm import native, ops
from tfm.operators import calling, watching
from tools.host import timing

pytest.importorskip("triton")
pytestmark = pytest.mark.triton

from tfm.kernels import plan  # noqa: E402
from tfm.ops import routing  # noqa: E402

ROOT = Path(__file__).parent.parent


def inputs(device: torch.device, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    rows = [torch.randn(9, 48, device=device) for _ in range(2)]
    heads = [torch.randn(2, 3, length, 32, device=device) for length in (12, 14, 14)]
    return [x.requires_grad_() for x in (*rows, torch.rand(48, device=device), *heads)]


def results(given: list[Tensor], site: int = 0) -> list[Tensor]:
    x, residual, weight, query, key, value = given
    rules = {"dropout_p": 0.2, "seed": torch.tensor(5, device=x.device), "site": site, "impl": "triton"}
    y, h = ops.residual_layer_norm(x, residual, weight, None, **rules)
    out = ops.attention(query, key, value, is_causal=True, **rules)
    loss = (y * y.detach().cos()).sum() + (h * h.detach()).sum() + (out * out.detach().sin()).sum()
    return [y, h, out, *torch.autograd.grad(loss, given)]


def steps() -> list[calling.Steps]:
    """The steps of all routes, their backwards included."""
    routes = [kind.kept for door in routing.Door.every for kinds in door.kinds.found.values() for kind in kinds]
    parts = [part for route in routes if route for part in route.parts if hasattr(part, "steps")]
    backwards = [
        kind.kept for part in parts for kinds in part.steps.backwards.found.values() for kind in kinds if kind.kept
    ]
    return [part.steps for part in parts] + backwards


def plans() -> dict[str, int]:
    """How many plans each operator has."""
    return dict(
        Counter(kind.operator for one in steps() for kind, step in one.known.items() if type(step) is plan.Plan)
    )


def ordinary(given: list[Tensor], site: int = 0) -> list[Tensor]:
    with plainly():
        return results(given, site)


ALL = {"residual_norm": 1, "residual_norm_backward": 1, "attention": 1, "attention_backward": 1}


def test_plans_give_the_same_bits(kernel_device) -> None:
    for seed in range(4):
        given = inputs(kernel_device, seed)
        # Layers share plans: the site of their dropout is no part of a kind.
        found, expected = results(given, site=seed), ordinary(given, site=seed)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
        assert plans() == (ALL if seed > 0 else {})


def test_every_operation_that_has_plans_gives_the_same_bits(kernel_device) -> None:
    tokens, table = torch.tensor([3, 1, 4, 1, 5], device=kernel_device), torch.randn(7, 32, device=kernel_device)
    angles, heads = ops.rotary_table(5, 16, device=kernel_device), torch.randn(1, 2, 5, 16, device=kernel_device)
    channels = torch.randn(2, 8, 11, device=kernel_device)
    calls = [
        lambda: ops.embedding(tokens, table, torch.arange(5, device=kernel_device), impl="triton"),
        lambda: ops.rms_norm(table, torch.ones(32, device=kernel_device), impl="triton"),
        lambda: ops.causal_conv1d(channels, torch.ones(8, 3, device=kernel_device), impl="triton"),
        lambda: ops.rotary(heads, heads, *angles, impl="triton"),
    ]
    for call in calls:
        for _ in range(3):
            last = call()
        with plainly():
            expected = call()
        pairs = zip(last, expected, strict=True) if isinstance(last, tuple) else [(last, expected)]
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    assert len(plans()) >= 3


def test_views_of_one_projection_have_plans(kernel_device) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        whole = torch.randn(6, 3 * 2 * 16, device=kernel_device).requires_grad_()
        ends = torch.tensor([0, 2 + seed, 6], dtype=torch.int32, device=kernel_device)

        def attend() -> list[Tensor]:
            query, key, value = whole.view(6, 3, 2, 16).unbind(1)  # noqa: B023
            out = ops.varlen_attention(query, key, value, ends, ends, 6, 6, impl="triton")  # noqa: B023
            return [out, *torch.autograd.grad((out * out.detach()).sum(), [whole])]  # noqa: B023

        found = attend()
        with plainly():
            expected = attend()
        assert all(map(torch.equal, found, expected))
    assert plans().get("attention") == 1


def test_keys_that_programs_share_have_plans(kernel_device) -> None:
    for _ in range(4):
        query, key, value = (torch.randn(1, 1, length, 16, device=kernel_device) for length in (3, 2048, 2048))
        found = ops.attention(query, key, value, impl="triton")
        with plainly():
            assert torch.equal(found, ops.attention(query, key, value, impl="triton"))
    assert plans() == {"attention": 1}
    (played,) = (step for one in steps() for step in one.known.values() if type(step) is plan.Plan)
    assert len(played.launches) == 2


def test_what_torch_computes_in_between_has_no_plan(kernel_device) -> None:
    # dh is expanded: the launch function copies it, and a plan would copy nothing.
    for seed in range(3):
        x, residual, weight, *_ = inputs(kernel_device, seed)
        y, h = ops.residual_layer_norm(x, residual, weight, None, impl="triton")
        d_x, d_weight = torch.autograd.grad(y.cos().sum() + h.sum(), (x, weight))
        expected = ops.residual_layer_norm(x, residual, weight, None, impl="reference")
        e_x, e_weight = torch.autograd.grad(expected[0].cos().sum() + expected[1].sum(), (x, weight))
        torch.testing.assert_close(d_x, e_x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(d_weight, e_weight, rtol=1e-4, atol=1e-4)
    assert "residual_norm_backward" not in plans()


def test_an_odd_address_goes_the_ordinary_way(kernel_device, monkeypatch) -> None:
    odd = torch.randn(4 * 32 + 1, device=kernel_device)[1:].view(4, 32)
    weight = torch.rand(32, device=kernel_device)
    even = odd.clone()
    for _ in range(3):
        assert torch.equal(ops.rms_norm(odd, weight, impl="triton"), ops.rms_norm(even, weight, impl="triton"))
    assert plans() == {"residual_norm": 1}
    with monkeypatch.context() as patch:
        for name in ("_launch", "_interpret"):
            patch.setattr(plan.Plan, name, lambda *_: pytest.fail("played for an odd address"))
        ops.rms_norm(odd, weight, impl="triton")


def test_a_view_with_its_sign_turned_goes_the_ordinary_way(kernel_device) -> None:
    x, weight = torch.randn(4, 32, device=kernel_device), torch.rand(32, device=kernel_device)
    for _ in range(3):
        expected = ops.rms_norm(-x, weight, impl="triton")
    for _ in range(4):
        assert torch.equal(ops.rms_norm(torch._neg_view(x), weight, impl="triton"), expected)
    learning, dy = x.requires_grad_(), torch.randn(4, 32, device=kernel_device)
    for _ in range(4):
        y = ops.rms_norm(learning, weight, impl="triton")
        (found,) = torch.autograd.grad(y, learning, torch._neg_view(dy), retain_graph=True)
        assert torch.equal(found, torch.autograd.grad(y, learning, -dy)[0])


def test_a_tensor_given_twice_says_nothing_of_two_tensors(kernel_device) -> None:
    x, y, z = (torch.randn(1, 2, 8, 16, device=kernel_device) for _ in range(3))
    for _ in range(3):
        ops.attention(x, x, x, impl="triton")
    for _ in range(3):
        found = ops.attention(x, y, z, impl="triton")
        torch.testing.assert_close(found, ops.attention(x, y, z, impl="reference"), rtol=1e-5, atol=1e-5)
    assert plans() == {"attention": 2}


def test_a_kind_is_recorded_when_it_comes_again(kernel_device) -> None:
    weight = torch.rand(32, device=kernel_device)
    for rows in range(1, 6):
        ops.rms_norm(torch.randn(rows, 32, device=kernel_device), weight, impl="triton")
    assert plans() == {}
    for eps in (1e-5, 1e-3, 1e-5, 1e-3):
        ops.rms_norm(torch.randn(5, 32, device=kernel_device), weight, eps, impl="triton")
    assert plans() == {"residual_norm": 2}


def test_there_are_never_more_than_so_many(kernel_device, monkeypatch) -> None:
    (door,) = (door for door in routing.Door.every if door.function.__name__ == "rms_norm")
    monkeypatch.setattr(door.kinds, "most", 3)
    weight = torch.rand(32, device=kernel_device)
    for rows in range(1, 9):
        for _ in range(2):
            ops.rms_norm(torch.randn(rows, 32, device=kernel_device), weight, impl="triton")
        assert plans()["residual_norm"] <= 3
    assert plans()["residual_norm"] > 0


def test_where_somebody_looks_on_operators_are_called(kernel_device) -> None:
    weight, x = torch.rand(32, device=kernel_device), torch.randn(4, 32, device=kernel_device)
    for _ in range(3):
        ops.rms_norm(x, weight, impl="triton")
    assert not watching.is_watched()
    with torch.profiler.profile() as profile:
        ops.rms_norm(x, weight, impl="triton")
    assert any("residual_norm" in event.key for event in profile.key_averages())
    batched = torch.func.vmap(lambda row: ops.rms_norm(row, weight))(x)
    torch.testing.assert_close(batched, ops.rms_norm(x, weight, impl="reference"))


@pytest.mark.skipif(bool(timing.why_unavailable()), reason=timing.why_unavailable())
def test_the_launcher_is_given_the_same_by_a_plan() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "planned_launches.py")]
    printed = subprocess.run(
        command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    found = json.loads(printed)
    ordinary, _, planned = found["rounds"]
    assert found["plans"] == 6
    assert len(ordinary) == 8
    assert planned == ordinary


@pytest.mark.parametrize("impl", ["triton", "native"])
def test_autograd_is_told_of_caches_that_a_step_wrote_into(kernel_device, impl) -> None:
    if impl == "native" and (why := native.why_unavailable(kernel_device)):
        pytest.skip(why)
    query, token = torch.randn(2, 1, 16, device=kernel_device), torch.randn(2, 1, 16, device=kernel_device)
    cache, lengths = torch.randn(2, 4, 1, 16, device=kernel_device), torch.full((2,), 3, dtype=torch.int32)
    lengths, factor = lengths.to(kernel_device), torch.ones((), device=kernel_device).requires_grad_()
    for _ in range(4):
        kept = (cache * factor).sum()
        with torch.no_grad():
            ops.decode_attention(query, cache, cache.clone(), lengths, key=token, value=token.clone(), impl=impl)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.backward()


@pytest.mark.parametrize("impl", ["triton", "native"])
def test_autograd_is_told_of_heads_that_were_turned_in_place(kernel_device, impl) -> None:
    if impl == "native" and (why := native.why_unavailable(kernel_device)):
        pytest.skip(why)
    x, tables = torch.randn(1, 2, 5, 16, device=kernel_device), ops.rotary_table(5, 16, device=kernel_device)
    kept = (x * torch.ones((), device=kernel_device).requires_grad_()).sum()
    with torch.no_grad():
        ops.rotary_(x, 2, *tables, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
