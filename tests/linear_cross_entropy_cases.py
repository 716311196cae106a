"""What the tests of linear_cross_entropy's kernels share: inputs, options, and the comparison with the oracle."""

from __future__ import annotations

import oracle
import torch

from tfm import ops
from tfm.kernels import launch

ROW, MEAN = "cross_entropy_kernel", "mean_loss_kernel"
STREAM = ["streaming_statistics_kernel", "streaming_losses_kernel"]
RESULTS = ("loss", "input", "weight", "bias")
# Triton's interpreter computes bf16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
EVERYTHING = {"label_smoothing": 0.2, "z_loss": 0.03, "softcap": 1.3, "ignore_index": 2}
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing of everything": {"label_smoothing": 1},
    "z-loss": {"z_loss": 0.05},
    "softcap": {"softcap": 0.8},
    "everything": EVERYTHING,
}
# Two of them a share, so that few classes make several shares.
SMALL_TILES = launch.StreamingTiles(16, 32, 16, tiles=2, num_warps=4, num_stages=2)


def inputs_of(rows, dim, classes, device, dtype=torch.float32, parameter_dtype=None, bias=True):
    """input, weight and bias that make logits of about 1, all needing gradients, and targets, some ignored."""
    input, weight = torch.randn(rows, dim, device=device), torch.randn(classes, dim, device=device) / dim**0.5
    given = [(input, dtype), (weight, parameter_dtype or dtype)]
    if bias:
        given.append((torch.randn(classes, device=device), parameter_dtype or dtype))
    target = torch.randint(classes, (rows,), device=device)
    return [x.to(kind).requires_grad_() for x, kind in given], target


def streams(device, dtype):
    """Whether logits of aligned inputs are not stored where no gradient is formed beside them."""
    major = launch.chip(device).major
    return launch.streaming_cross_entropy(24, dtype, aligned=True, plain=True, major=major) is not None


def some_ignored(target, ignore_index=-100):
    return target.index_fill(0, torch.arange(0, len(target), 4, device=target.device), ignore_index)


def run(function, inputs, target, cotangent=None, **options):
    """(loss, dinput, dweight[, dbias])."""
    input, weight, *bias = inputs
    loss = function(input, weight, target, linear_bias=bias[0] if bias else None, **options)
    cotangent = torch.ones_like(loss) if cotangent is None else cotangent.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, cotangent)]


def kernel(*args, **options):
    return ops.linear_cross_entropy(*args, impl="triton", **options)


def narrow(input, weight, target, linear_bias=None, **options):
    """The oracle's formulas in the dtype of the input."""
    bias = None if linear_bias is None else linear_bias.to(input.dtype)
    return oracle.linear_cross_entropy(input, weight.to(input.dtype), target, linear_bias=bias, **options)


def assert_kernel_matches(inputs, target, **options):
    cotangent = torch.randn(len(target), device=target.device) if options.get("reduction") == "none" else None
    wide = [x.detach().double().requires_grad_() for x in inputs]
    actual = run(kernel, inputs, target, cotangent, **options)
    truth = run(oracle.linear_cross_entropy, wide, target, cotangent, **options)
    plain = run(narrow, inputs, target, cotangent, **options)
    oracle.assert_all_match(actual, truth, plain, RESULTS[: len(actual)])
    assert actual[0].dtype == torch.float32
    assert [x.dtype for x in actual[1:]] == [x.dtype for x in inputs]
