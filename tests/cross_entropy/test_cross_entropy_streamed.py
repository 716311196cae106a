"""The loss whose logits are never stored: against float64, and where it is chosen."""

from __future__ import annotations

import launches
import oracle
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import (
    MEAN,
    OPTIONS,
    ROW,
    SMALL_TILES,
    STREAM,
    inputs_of,
    kernel,
    narrow,
    run,
    some_ignored,
    streams,
)
from oracle import DTYPES, HALVES

from tfm.kernels.launch import cross_entropy as launch


@pytest.fixture
def launched(monkeypatch):
    return launches.watch(monkeypatch)


@pytest.fixture
def streamed(monkeypatch):
    """Small tiles, and fp32 streams too."""
    monkeypatch.setattr(launch, "streaming_cross_entropy", lambda *_: SMALL_TILES)


@pytest.mark.parametrize("name", ["plain", "smoothing", "everything"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_streamed_loss_matches(name, reduction, dtype, kernel_device, streamed, launched):
    options = {"reduction": reduction, **OPTIONS[name]}
    inputs, target = inputs_of(33, 40, 131, kernel_device, dtype, bias=name == "everything")
    inputs, target = [x.detach() for x in inputs], some_ignored(target, options.get("ignore_index", -100))
    results = []
    for function, some in ((kernel, inputs), (oracle.linear_cross_entropy, [x.double() for x in inputs])):
        results.append(function(*some[:2], target, linear_bias=some[2] if len(some) > 2 else None, **options))
    bias = inputs[2] if len(inputs) > 2 else None
    plain = narrow(*inputs[:2], target, linear_bias=bias, **options)
    oracle.assert_matches(*results, plain, "loss")
    assert launched == STREAM + ([MEAN] if reduction == "mean" else [])


def test_a_loss_of_large_logits_is_not_rounded_as_they_are(kernel_device, streamed):
    """Logits of 65536 and a few halves, which fp32 holds exactly: so does plain torch the small differences between."""
    input, weight = (torch.randint(-2, 3, (rows, 8), device=kernel_device) / 2 for rows in (9, 131))
    input[:, 0] = weight[:, 0] = 256.0
    target = torch.randint(131, (9,), device=kernel_device)
    with torch.no_grad():
        loss = kernel(input, weight, target, reduction="none")
    truth = oracle.linear_cross_entropy(input.double(), weight.double(), target, reduction="none")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_the_launch_row_streams_and_stores_the_same_loss(half, kernel_device, monkeypatch, launched):
    if not streams(kernel_device, half):
        pytest.skip("this GPU stores the logits")
    (input, weight), target = inputs_of(5, 72, 300, kernel_device, half, bias=False)
    with torch.no_grad():
        streamed = kernel(input, weight, target, label_smoothing=0.1)
        assert launched == [*STREAM, MEAN]
        launched.clear()
        monkeypatch.setattr(launch, "streaming_cross_entropy", lambda *_: None)
        stored = kernel(input, weight, target, label_smoothing=0.1)
        assert launched == [ROW, MEAN]
    truth = oracle.linear_cross_entropy(input.double(), weight.double(), target, label_smoothing=0.1)
    for loss in (streamed, stored):
        oracle.assert_matches(loss, truth, narrow(input, weight, target, label_smoothing=0.1))


def test_streamed_rows_do_not_see_their_batch(kernel_device, streamed):
    (input, weight), target = inputs_of(33, 40, 131, kernel_device, bias=False)
    with torch.no_grad():
        many, few = (kernel(input[:n], weight, target[:n], reduction="none") for n in (33, 7))
    assert torch.equal(many[:7], few)


def test_unaligned_rows_are_not_streamed(kernel_device, launched):
    (input, weight), target = inputs_of(2, 20, 17, kernel_device, torch.float16, bias=False)
    with torch.no_grad():
        kernel(input, weight, target)
        kernel(F.pad(input, (1, 3))[:, 1:], F.pad(weight, (1, 3))[:, 1:].contiguous(), target)
    assert launched == [ROW, MEAN] * 2


def test_large_logits_and_forbidden_classes(kernel_device, streamed):
    input, weight = torch.full((2, 8), 1e2, device=kernel_device), torch.eye(8, device=kernel_device) * 1e6
    bias = torch.zeros(8, device=kernel_device)
    bias[0] = float("-inf")
    target = torch.tensor([1, 7], device=kernel_device)
    inputs = [x.requires_grad_() for x in (input, weight, bias)]
    loss, *grads = run(kernel, inputs, target)
    torch.testing.assert_close(loss.item(), float(torch.tensor(7.0).log()))
    assert all(x.isfinite().all() for x in grads)
    with torch.no_grad():
        torch.testing.assert_close(kernel(input, weight, target, linear_bias=bias), loss)


def test_where_logits_are_not_stored():
    row = lambda dim=512, dtype=torch.bfloat16, aligned=True, plain=True, major=9: launch.streaming_cross_entropy(  # noqa: E731
        dim, dtype, aligned, plain, major
    )
    assert row() == launch.StreamingTiles(128, 256, 64, 8, 8, 4)
    assert row(plain=False).block_classes == row(major=10).block_classes == 128
    for tiles in (row(), row(plain=False), row(major=10)):
        assert tiles.tiles * tiles.block_classes == 2048
        stage = (tiles.block_rows + tiles.block_classes) * tiles.block_dim * 2
        assert tiles.num_stages * stage < 227 * 1024
    for stored in (row(dim=2048), row(dtype=torch.float32), row(aligned=False), row(major=8), row(major=12)):
        assert stored is None
