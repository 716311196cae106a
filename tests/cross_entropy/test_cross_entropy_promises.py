"""What the kernels of linear_cross_entropy promise beside numbers: memory, no waiting, padding, torch's own tools."""

from __future__ import annotations

import gc

import allocations
import launches
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import (
    MEAN,
    ROW,
    SMALL_TILES,
    assert_all_ignored_is_no_loss,
    assert_compiles_whole,
    assert_nan_stays_in_ignored_rows,
    assert_operators_obey_torch,
    inputs_of,
    kernel,
    losses_of,
    run,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from triton.runtime.jit import KernelInterface

from tfm import ops
from tfm.kernels.launch import cross_entropy as launch
from tfm.operators.cross_entropy import times
from tfm.reference import cross_entropy as reference


@pytest.fixture
def launched(monkeypatch):
    return launches.watch(monkeypatch)


@pytest.fixture
def chunks_of_3(monkeypatch):
    monkeypatch.setattr(launch, "logits_rows", lambda rows, classes, itemsize: 3)


@pytest.fixture
def streamed(monkeypatch):
    """Small tiles, and fp32 streams too."""
    monkeypatch.setattr(launch, "streaming_cross_entropy", lambda *_: SMALL_TILES)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_target_ignored_is_no_loss_and_no_gradient(reduction, kernel_device, launched):
    assert_all_ignored_is_no_loss("triton", kernel_device, torch.float16, reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_in_ignored_rows_stays_there(reduction, kernel_device):
    assert_nan_stays_in_ignored_rows("triton", kernel_device, reduction)


@pytest.mark.parametrize("wrong", [-1, 17, 10**12])
def test_a_target_that_is_no_class(wrong, kernel_device, streamed, monkeypatch):
    inputs, target = inputs_of(3, 8, 17, kernel_device)
    target[1] = wrong
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    with pytest.raises(IndexError, match=rf"^target: expected classes in \[0, 17\) or -100, got {wrong}$"):
        kernel(*inputs[:2], target)
    given = (*inputs, target)
    spoilt = torch.tensor([False, True, False], device=kernel_device)
    for losses in (
        losses_of("tfm", *given),  # streamed
        _stored_losses(monkeypatch, given),
    ):
        assert torch.equal(losses.isnan(), spoilt)
    grad = torch.autograd.grad(losses.sum(), inputs[0])[0]
    assert torch.equal(grad.isnan().all(dim=1), spoilt)


def _stored_losses(monkeypatch, given):
    monkeypatch.setattr(launch, "streaming_cross_entropy", lambda *_: None)
    return losses_of("tfm", *given)


class NoWaiting(TorchDispatchMode):
    """Fails where the host would read what the device computes."""

    READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function.name() not in self.READS, f"{function.name()} waits for the device"
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_waits_for_nothing(reduction, kernel_device, chunks_of_3, request):
    inputs, target = inputs_of(5, 8, 17, kernel_device)
    given = [x.detach() for x in inputs]
    options = (-100, 0.1, 0.01, 2.0)
    if kernel_device.type == "cuda":
        request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
        torch.cuda.set_sync_debug_mode("error")
    with NoWaiting(), pytest.raises((AssertionError, RuntimeError)):
        target[0].item()
    with NoWaiting():
        for needs in ([True] * 3, [False] * 3):
            loss, scale, *_ = torch.ops.tfm.linear_cross_entropy(*given, target, reduction, *options, needs)
        if reduction == "none":
            torch.ops.tfm.linear_cross_entropy_backward(torch.ones_like(loss), *given, target, *options, [True] * 3)
        else:
            times(given[0], scale, torch.float16)


@pytest.fixture
def prompt_garbage(monkeypatch):
    """Triton's interpreter keeps a kernel's arguments in reference cycles; here they go with the launch."""
    subscript = KernelInterface.__getitem__

    def collected(kernel, grid):
        def launch_and_collect(*args, **options):
            subscript(kernel, grid)(*args, **options)
            gc.collect()

        return launch_and_collect

    monkeypatch.setattr(KernelInterface, "__getitem__", collected)
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures CPU memory")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("impl", "chunks_held"), [("triton", 1), ("reference", 3)])
def test_peak_memory_is_a_chunk_and_the_gradients(impl, chunks_held, reduction, monkeypatch, prompt_garbage):
    rows, dim, classes, step = 40, 4, 496, 8
    (input, weight), target = inputs_of(rows, dim, classes, "cpu", bias=False)
    monkeypatch.setattr(launch, "logits_rows", lambda *_: step)
    monkeypatch.setitem(reference.CHUNK_BYTES, "cpu", step * classes * 4)

    def loss_and_gradients(reduction=reduction):
        loss = ops.linear_cross_entropy(input, weight, target, reduction=reduction, impl=impl)
        torch.autograd.grad(loss.sum(), (input, weight))

    peak = allocations.peak_bytes(loss_and_gradients)
    chunk, gradients = step * classes * 4, input.nbytes + weight.nbytes
    # The gradients twice: as formed, and as scaled for the caller. A row has a few numbers of its own.
    assert peak <= chunks_held * chunk + 2 * gradients + 64 * rows
    whole = allocations.peak_bytes(lambda: F.cross_entropy(F.linear(input, weight), target).backward())
    assert peak < whole / 2


def test_operators_obey_torch(kernel_device, chunks_of_3):
    assert_operators_obey_torch("tfm", kernel_device, torch.float16)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend, kernel_device):
    assert_compiles_whole("triton", kernel_device, backend)


def test_checkpoint_gives_the_same_gradients(kernel_device, launched):
    inputs, target = inputs_of(4, 8, 17, kernel_device)

    def recomputed(*args, **options):
        return checkpoint(lambda *args: kernel(*args, **options), *args, use_reentrant=False)

    results = [run(function, inputs, target) for function in (kernel, recomputed)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert launched == [ROW, MEAN] * 3
