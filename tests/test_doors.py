"""A call that takes a route is checked, cast, drawn for and differentiated as one that takes none."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from plain_calls import plainly
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import tfm
from tfm import native, ops
from tfm.ops import backends, routing

CPU = torch.device("cpu")


@pytest.fixture(params=["triton", pytest.param("native", marks=pytest.mark.skipif(
    bool(native.why_unavailable(CPU)), reason=native.why_unavailable(CPU)))])  # fmt: skip
def impl(request) -> str:
    if request.param == "triton" and (why := backends.why_triton_unavailable(device_of("triton"), automatic=False)):
        pytest.skip(why)
    return request.param


def device_of(impl: str) -> torch.device:
    return torch.device("cuda") if impl == "triton" and torch.cuda.is_available() else CPU


def taken(function: Callable) -> int:
    """How many kinds of calls of a function have a route."""
    (door,) = (door for door in routing.Door.every if door.function.__name__ == function.__name__)
    return sum(bool(kind.kept) for kinds in door.kinds.found.values() for kind in kinds)


def heads(device: torch.device, *shape: int) -> list[Tensor]:
    return [torch.randn(shape, device=device).requires_grad_() for _ in range(3)]


def assert_as_plain(compute: Callable[[], list[Tensor]], function: Callable) -> None:
    """Compares a third call, which takes a route, with one that takes none."""
    for _ in range(3):
        state = torch.random.get_rng_state()
        found = compute()
    assert taken(function) > 0
    torch.random.set_rng_state(state)
    with plainly():
        expected = compute()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert a.requires_grad == b.requires_grad


def test_a_bad_call_is_refused_after_good_ones(impl):
    device = device_of(impl)
    x, weight = torch.randn(4, 8, device=device), torch.ones(8, device=device)
    for _ in range(3):
        ops.rms_norm(x, weight, impl=impl)
    assert taken(ops.rms_norm) == 1
    with pytest.raises(ValueError, match="weight: expected shape"):
        ops.rms_norm(x, weight[:7], impl=impl)
    with pytest.raises(ValueError, match="weight: expected a floating-point tensor"):
        ops.rms_norm(x, weight.int(), impl=impl)
    with pytest.raises(ValueError, match="eps: expected a number, got nan"):
        ops.rms_norm(x, weight, float("nan"), impl=impl)
    with pytest.raises(ValueError, match="impl: expected one of"):
        ops.rms_norm(x, weight, impl="cuda")


def test_values_are_checked_on_a_route(impl):
    if device_of(impl).type != "cpu":
        pytest.skip("values on a GPU are not read")
    query, key, value = heads(CPU, 6, 2, 16)
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    for _ in range(3):
        ops.varlen_attention(query, key, value, ends, ends.clone(), 4, 4, impl=impl)
    assert taken(ops.varlen_attention) == 1
    with pytest.raises(ValueError, match="cu_seq_k: expected offsets that never fall"):
        ops.varlen_attention(query, key, value, ends, torch.tensor([0, 7, 6], dtype=torch.int32), 4, 4, impl=impl)
    with pytest.raises(ValueError, match="max_q: expected at least the longest sequence, 5"):
        ops.varlen_attention(query, key, value, torch.tensor([0, 1, 6], dtype=torch.int32), ends, 4, 4, impl=impl)
    x, weight, target = torch.randn(5, 8), torch.randn(7, 8), torch.tensor([0, 1, 2, 3, 6])
    for _ in range(3):
        ops.linear_cross_entropy(x, weight, target, impl=impl)
    assert taken(ops.linear_cross_entropy) == 1
    with pytest.raises(IndexError, match="expected classes in"):
        ops.linear_cross_entropy(x, weight, target + 1, impl=impl)


def test_what_is_changed_in_place_is_checked_on_a_route(impl):
    device = device_of(impl)
    tables = ops.rotary_table(5, 16, device=device)
    for _ in range(4):
        x = torch.randn(1, 2, 5, 16, device=device).requires_grad_()
        turned = ops.rotary_(x * 1.0, 2, *tables, impl=impl)
        (gradient,) = torch.autograd.grad((turned * turned.detach()).sum(), x)
        torch.testing.assert_close(gradient, x.detach(), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            again = x.detach().clone()
            assert ops.rotary_(again, 2, *tables, impl=impl) is again
            assert torch.equal(again, turned)
        with pytest.raises(ValueError, match="a leaf that needs a gradient"):
            ops.rotary_(x, 2, *tables, impl=impl)
    assert taken(ops.rotary_) == 2


@pytest.mark.parametrize("learns", [False, True])
def test_masks_and_biases(impl, learns):
    device = device_of(impl)
    query, key, value = heads(device, 2, 2, 7, 16)
    bias = torch.randn(2, 7, 7, device=device).requires_grad_(learns)
    mask = torch.rand(2, 1, 1, 7, device=device) > 0.3
    seed = torch.tensor(3, device=device)

    def attend(attn_mask: Tensor) -> list[Tensor]:
        out = ops.attention(query, key, value, attn_mask, 0.2, seed=seed, impl=impl)
        wanted = [x for x in (query, key, value, attn_mask) if x.requires_grad]
        return [out, *torch.autograd.grad((out * out.detach().cos()).sum(), wanted)]

    assert_as_plain(lambda: attend(bias), ops.attention)
    assert_as_plain(lambda: attend(mask), ops.attention)
    assert_as_plain(lambda: attend(mask.expand(2, 2, 7, 7)), ops.attention)
    assert taken(ops.attention) == 3


def test_seeds_are_drawn_anew(impl):
    query, key, value = heads(device_of(impl), 1, 2, 9, 16)
    torch.manual_seed(1)
    outs = [ops.attention(query, key, value, None, 0.5, impl=impl) for _ in range(6)]
    assert taken(ops.attention) == 1
    assert len({tuple(out.flatten().tolist()) for out in outs}) == len(outs)
    torch.manual_seed(1)
    again = [ops.attention(query, key, value, None, 0.5, impl=impl) for _ in range(6)]
    assert all(map(torch.equal, outs, again))


def test_a_checkpoint_draws_the_same_again(impl):
    query, key, value = heads(device_of(impl), 1, 2, 9, 16)

    def attend(*tensors: Tensor) -> Tensor:
        return ops.attention(*tensors, None, 0.5, impl=impl)

    for _ in range(4):
        state = torch.random.get_rng_state()
        kept = torch.autograd.grad(checkpoint(attend, query, key, value, use_reentrant=False).sum(), (query, value))
        torch.random.set_rng_state(state)
        plain = torch.autograd.grad(attend(query, key, value).sum(), (query, value))
        assert all(map(torch.equal, kept, plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(impl, dtype):
    if impl == "native" and dtype == torch.float16:
        pytest.skip("csrc has no fp16 on CPUs")
    device = device_of(impl)
    x = torch.randn(6, 16, device=device).requires_grad_()
    first, second = (torch.randn(*shape, device=device).requires_grad_() for shape in ((32, 16), (16, 32)))
    bias = torch.randn(32, device=device).requires_grad_()

    def compute(under: torch.dtype = dtype) -> list[Tensor]:
        with torch.autocast(device.type, dtype=under):
            out = ops.feed_forward(x, first, bias, second, None, "gelu", impl=impl)
        return [out, *torch.autograd.grad(out.float().cos().sum(), (x, first, bias, second))]

    assert_as_plain(compute, ops.feed_forward)
    assert compute()[0].dtype == dtype
    ops.feed_forward(x, first, bias, second, None, "gelu", impl=impl)
    for _ in range(3):
        assert ops.feed_forward(x, first, bias, second, None, "gelu", impl=impl).dtype == torch.float32
    assert taken(ops.feed_forward) == 2


def test_whether_gradients_are_wanted_is_part_of_a_kind(impl):
    device = device_of(impl)
    x, weight = torch.randn(4, 8, device=device), torch.ones(8, device=device)
    wanted = []
    for _ in range(3):
        for needs_x, needs_weight in ((False, False), (True, False), (False, True)):
            given = x.detach().requires_grad_(needs_x), weight.detach().requires_grad_(needs_weight)
            with torch.no_grad():
                assert not ops.layer_norm(*given, impl=impl).requires_grad
            y = ops.layer_norm(*given, impl=impl)
            assert y.requires_grad == (needs_x or needs_weight)
            if y.requires_grad:
                y.sum().backward()
            wanted.append((given[0].grad is not None, given[1].grad is not None))
    assert wanted == 3 * [(False, False), (True, False), (False, True)]
    with torch.inference_mode():
        for _ in range(3):
            assert ops.layer_norm(x, weight, impl=impl).is_inference()


def test_what_hooks_lay_out_anew_is_read_right(impl):
    device = device_of(impl)
    query, key, value = (torch.randn(2, 9, 3, 16, device=device).requires_grad_() for _ in range(3))

    def gradients() -> list[Tensor]:
        out = ops.attention(*(x.transpose(1, 2) for x in (query, key, value)), impl=impl)
        return list(torch.autograd.grad((out * out.detach()).sum(), (query, key, value)))

    for _ in range(3):
        expected = gradients()
    for hooks in (saved_tensors_hooks(lambda x: x, lambda x: x.contiguous().clone()), save_on_cpu()):
        for _ in range(3):
            with hooks:
                found = gradients()
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_use_and_subclasses(impl):
    device = device_of(impl)
    x, weight = torch.randn(4, 8, device=device), torch.ones(8, device=device)
    for _ in range(3):
        with tfm.use(impl):
            ops.rms_norm(x, weight)
    assert taken(ops.rms_norm) == 1
    with tfm.use("reference"):
        for _ in range(3):
            ops.rms_norm(x, weight)
    # The reference has no route, and no call takes that of another backend.
    assert taken(ops.rms_norm) == 1

    class Marked(Tensor):
        pass

    for _ in range(3):
        assert type(ops.rms_norm(x.as_subclass(Marked), weight, impl="reference")) is Marked


def test_threads_share_routes(impl):
    device = device_of(impl)
    if impl == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter has one state for all threads")
    weight = torch.ones(16, device=device)
    right: list[int] = []

    def work(number: int) -> None:
        x = torch.full((3, 16), float(number), device=device)
        x[:, 0] = 0
        expected = ops.rms_norm(x, weight, impl="reference")
        for _ in range(20):
            if torch.allclose(ops.rms_norm(x, weight, impl=impl), expected):
                right.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 4 * 20
    assert taken(ops.rms_norm) == 1


def test_routes_keep_no_tensor(impl):
    device = device_of(impl)
    met = []
    for _ in range(4):
        query, key, value = heads(device, 1, 2, 5, 16)
        mask = torch.rand(1, 1, 1, 5, device=device) > 0.2
        out = ops.attention(query, key, value, mask, 0.1, impl=impl)
        weight = torch.randn(16, 16, device=device).requires_grad_()
        y = ops.feed_forward(out, weight, None, weight, None, impl=impl)
        y.sum().backward()
        met += [weakref.ref(x) for x in (query, key, value, mask, out, weight, y)]
        del query, key, value, mask, out, weight, y
    gc.collect()
    assert taken(ops.attention) == taken(ops.feed_forward) == 1
    assert not any(one() is not None for one in met)
