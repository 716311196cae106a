"""What the tests of rotary's backends share: what is run and held against the oracle, on which sizes and views."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch.autograd import forward_ad

from tfm import ops

# (dim, columns of the tables): one pair, whole and partial rotation, odd rests, nothing to turn.
SIZES = [(2, 1), (16, 8), (17, 5), (130, 33), (64, 0)]
# Shapes of positions, and of the rows of tables, for [2, 5] tokens.
BROADCAST = [(), (1,), (5,), (1, 5), (2, 1), (2, 5)]

VIEWS = {
    "fused projection": lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns apart": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}
# In place no two elements may share an address.
OWN_ADDRESSES = [view for view in VIEWS if view != "expanded"]


def run(impl, query, key, cos, sin, positions, cotangents, interleaved=False):
    """Queries, keys and their gradients."""
    outputs = ops.rotary(query, key, cos, sin, positions, interleaved=interleaved, impl=impl)
    grads = torch.autograd.grad(outputs, (query, key), [c.to(query.dtype) for c in cotangents])
    return [*(output.detach() for output in outputs), *grads]


def assert_matches(impl, query, key, cos, sin, positions, interleaved):
    cotangents = [torch.randn_like(t, dtype=torch.float32) for t in (query, key)]
    wide = [t.detach().double().requires_grad_() for t in (query, key)]
    arguments = positions, cotangents, interleaved
    actual, truth, plain = (
        run(impl, query, key, cos, sin, *arguments),
        run("reference", *wide, cos.double(), sin.double(), *arguments),
        run("reference", query, key, cos, sin, *arguments),
    )
    oracle.assert_all_match(actual, truth, plain, ("query", "key", "dquery", "dkey"))


def assert_matches_at(impl, dim, columns, interleaved, dtype, device):
    """With positions, more heads than a program or a block takes, and tables that are scaled as YaRN's."""
    shapes = ((2, heads, 7, dim) for heads in (9, 1))
    query, key = (torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes)
    cos, sin = 2 * torch.randn(2, 11, columns, device=device)
    positions = torch.randint(11, (2, 7), device=device)
    assert_matches(impl, query, key, cos, sin, positions, interleaved)


def assert_matches_packed(impl, tokens, heads, half, rest, interleaved, device, dtype=torch.float32):
    dim = max(2 * half + rest, 1)
    query, key = (torch.randn(tokens, h, dim, device=device).to(dtype).requires_grad_() for h in heads)
    cos, sin = torch.randn(2, tokens, half, device=device).to(dtype)
    assert_matches(impl, query, key, cos, sin, None, interleaved)


def assert_angles_broadcast(impl, shape, device):
    query = torch.randn(2, 3, 5, 8, device=device)
    cos, sin = torch.randn(2, 11, 4, device=device)
    positions = torch.randint(11, shape, device=device)
    expected, _ = ops.rotary(query, None, cos, sin, positions, impl="reference")
    for angles in ((cos, sin, positions), (cos[positions], sin[positions])):
        found, _ = ops.rotary(query, None, *angles, impl=impl)
        torch.testing.assert_close(found, expected)


def assert_strides_change_nothing(impl, view, device, dtype=torch.float32):
    """Of queries, gradients and tables."""
    x, cotangent = (VIEWS[view](torch.randn(2, 3, 5, 8, device=device).to(dtype)) for _ in range(2))
    cos, sin = torch.randn(2, 5, 12, device=device).to(dtype)[..., ::3]
    results = []
    for change in (lambda t: t, torch.Tensor.contiguous):
        query = change(x).detach().requires_grad_()
        y, _ = ops.rotary(query, None, change(cos), change(sin), impl=impl)
        results.append([y.detach(), *torch.autograd.grad(y, query, change(cotangent))])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def assert_in_place_turns_the_first_heads(impl, view, interleaved, device, dtype=torch.float32):
    leaf = torch.randn(2, 6, 5, 8, device=device, dtype=dtype, requires_grad=True)
    cos, sin = torch.randn(2, 5, 3, device=device)
    cotangent, options = torch.randn_like(leaf), {"interleaved": interleaved, "impl": impl}
    fused = leaf * 1.0 if view is None else VIEWS[view](leaf * 1.0)
    address, version = fused.data_ptr(), fused._version
    found = ops.rotary_(fused, 4, cos, sin, **options)
    assert found is fused
    assert (found.data_ptr(), found._version > version) == (address, True)
    query, _ = ops.rotary(leaf[:, :4], None, cos, sin, **options)
    expected = torch.cat((query, leaf[:, 4:]), dim=1)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(y, leaf, cotangent) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def assert_autograd_knows_what_is_overwritten(impl, device):
    x, weight = torch.randn(5, 3, 8, device=device), torch.ones(5, 3, 8, device=device, requires_grad=True)
    product = (x * weight).sum()
    ops.rotary_(x, 2, *torch.randn(2, 5, 4, device=device), impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def assert_forward_mode_is_refused(impl, device):
    x, (cos, sin) = torch.randn(5, 3, 8, device=device), torch.randn(2, 5, 4, device=device)
    for turn in (ops.rotary, ops.rotary_):
        with forward_ad.dual_level(), pytest.raises(ValueError, match="transforms and forward-mode"):
            turn(forward_ad.make_dual(x, x.clone()), None if turn is ops.rotary else 3, cos, sin, impl=impl)


def assert_heads_that_are_not_turned_pass_infinities(impl, device):
    leaf = torch.ones(3, 4, 8, device=device, requires_grad=True)
    found = ops.rotary_(leaf * torch.inf, 2, *torch.randn(2, 3, 4, device=device), impl=impl)
    assert (found[:, 2:] == torch.inf).all()
    fused = leaf * 1.0
    ops.rotary_(fused, 2, *torch.randn(2, 3, 4, device=device), impl=impl)
    (gradient,) = torch.autograd.grad(fused, leaf, torch.full_like(fused, torch.inf))
    assert (gradient[:, 2:] == torch.inf).all()


def assert_only_wanted_gradients_are_computed(impl, wanted, device):
    query, key = torch.randn(2, 5, 3, 8, device=device)
    needed = (query if wanted == "query" else key).requires_grad_()
    cos, sin = torch.randn(2, 5, 4, device=device)
    turned = ops.rotary(query, key, cos, sin, impl=impl)
    assert [y.requires_grad for y in turned] == [wanted == "query", wanted == "key"]
    (used,) = (y for y in turned if y.requires_grad)
    (gradient,) = torch.autograd.grad(used, needed, torch.ones_like(used))
    expected, _ = ops.rotary(torch.ones_like(needed), None, cos, -sin, impl="reference")
    torch.testing.assert_close(gradient, expected)


def assert_compiles_whole(impl, backend, device):
    """Out of place and in place, with gradients; in place where nothing needs one, too."""
    query, key = (torch.randn(5, h, 8, device=device, requires_grad=True) for h in (4, 2))
    cos, sin = torch.randn(2, 5, 4, device=device)

    def function(query, key):
        query, key = ops.rotary(query, key, cos, sin, impl=impl)
        return ops.rotary_(torch.cat((query, key), dim=1), 5, cos, sin, impl=impl)

    def in_place(x):
        return ops.rotary_(x, 2, cos, sin, impl=impl) + 1

    torch._dynamo.reset()
    results = []
    for wrapped in (lambda f: f, lambda f: torch.compile(f, backend=backend, fullgraph=True)):
        y, x = wrapped(function)(query, key), query.detach().clone()
        gradients = torch.autograd.grad(y, (query, key), torch.ones_like(y))
        results.append([y.detach(), *gradients, wrapped(in_place)(x), x])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def assert_operators_obey_torch(namespace, device):
    operators = getattr(torch.ops, namespace)
    query, key = torch.randn(2, 4, 5, 8, device=device), torch.randn(2, 1, 5, 8, device=device)
    cos, sin = torch.randn(2, 9, 3, device=device)
    positions = torch.arange(5, device=device)
    torch.library.opcheck(operators.rotary.default, (query, key, cos, sin, positions, 4, False, False))
    tables = cos[:5, :2], sin[:5, :2]
    torch.library.opcheck(operators.rotary.default, (query.transpose(1, 3), None, *tables, None, 3, True, True))
    torch.library.opcheck(operators.rotary_.default, (query, cos, sin, positions, 2, True))
