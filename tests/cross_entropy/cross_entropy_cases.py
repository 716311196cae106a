"""What the tests of linear_cross_entropy's kernels share: inputs, options, comparisons, promises of every backend."""

from __future__ import annotations

from functools import partial

import oracle
import torch
import torch.nn.functional as F

from tfm import ops
from tfm.kernels.launch import cross_entropy as launch
from tfm.kernels.launch.device import chip_of
from tfm.operators.autograd import apply
from tfm.operators.cross_entropy import LinearCrossEntropy, Loss

ROW, MEAN = "cross_entropy_kernel", "mean_loss_kernel"
STREAM = ["streaming_statistics_kernel", "streaming_losses_kernel"]
RESULTS = ("loss", "input", "weight", "bias")
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
    major = chip_of(device).major
    return launch.streaming_cross_entropy(24, dtype, aligned=True, plain=True, major=major) is not None


def some_ignored(target, ignore_index=-100):
    return target.index_fill(0, torch.arange(0, len(target), 4, device=target.device), ignore_index)


def run(function, inputs, target, cotangent=None, **options):
    """(loss, dinput, dweight[, dbias])."""
    input, weight, *bias = inputs
    loss = function(input, weight, target, linear_bias=bias[0] if bias else None, **options)
    cotangent = torch.ones_like(loss) if cotangent is None else cotangent.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, cotangent)]


def fused(impl):
    return partial(ops.linear_cross_entropy, impl=impl)


kernel = fused("triton")


def losses_of(namespace, input, weight, bias, target):
    """Each row's loss with label smoothing, by a backend's operators, which take any target."""
    call = LinearCrossEntropy(input, weight, bias, target, "none", -100, 0.1, 0.0, None, needs=[])
    (losses,) = apply(Loss, namespace, call)
    return losses


def narrow(input, weight, target, linear_bias=None, **options):
    """The oracle's formulas in the dtype of the input."""
    bias = None if linear_bias is None else linear_bias.to(input.dtype)
    return oracle.linear_cross_entropy(input, weight.to(input.dtype), target, linear_bias=bias, **options)


def assert_kernel_matches(inputs, target, impl="triton", **options):
    cotangent = torch.randn(len(target), device=target.device) if options.get("reduction") == "none" else None
    wide = [x.detach().double().requires_grad_() for x in inputs]
    actual = run(fused(impl), inputs, target, cotangent, **options)
    truth = run(oracle.linear_cross_entropy, wide, target, cotangent, **options)
    plain = run(narrow, inputs, target, cotangent, **options)
    oracle.assert_all_match(actual, truth, plain, RESULTS[: len(actual)])
    assert actual[0].dtype == torch.float32
    assert [x.dtype for x in actual[1:]] == [x.dtype for x in inputs]


def ones_like_loss(reduction, rows, device):
    return torch.ones(rows, device=device) if reduction == "none" else torch.tensor(1.0, device=device)


def assert_only_wanted_gradients(impl, device, needs, reduction):
    """Each subset of the inputs gets the gradients that all of them get, to the bit."""
    inputs, target = inputs_of(5, 8, 17, device)
    target = some_ignored(target)
    cotangent = torch.randn(5, device=device) if reduction == "none" else torch.tensor(2.0, device=device)
    expected = run(fused(impl), inputs, target, cotangent, reduction=reduction)
    some = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    loss = fused(impl)(*some[:2], target, linear_bias=some[2], reduction=reduction)
    assert loss.requires_grad == any(needs)
    assert torch.equal(loss, expected[0])
    if any(needs):
        loss.backward(cotangent)
    for x, grad, need in zip(some, expected[1:], needs, strict=True):
        assert torch.equal(x.grad, grad) if need else x.grad is None


def assert_takes_any_strides(impl, device, reduction):
    (input, weight, bias), target = inputs_of(5, 8, 17, device)
    inputs = [
        input.detach().t().contiguous().t(),
        F.pad(weight.detach(), (3, 5))[:, 3:11],
        bias.detach().repeat_interleave(2)[::2],
    ]
    assert_kernel_matches(
        [x.requires_grad_() for x in inputs], target.repeat_interleave(2)[::2], impl, reduction=reduction
    )


def assert_takes_expanded_gradients(impl, device):
    inputs, target = inputs_of(5, 8, 17, device)
    ones = torch.ones(5, device=device)
    expected = run(fused(impl), inputs, target, ones, reduction="none")
    actual = run(fused(impl), inputs, target, ones[0].expand(5), reduction="none")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_no_rows_are_no_loss(impl, device, dtype, reduction):
    inputs, target = inputs_of(0, 8, 17, device, dtype)
    loss, d_input, d_weight, d_bias = run(fused(impl), inputs, target, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert d_input.shape == (0, 8)
    assert all((x == 0).all() for x in (loss, d_weight, d_bias))
    with torch.no_grad():
        assert (fused(impl)(*inputs[:2], target, reduction=reduction) == 0).all()


def assert_all_ignored_is_no_loss(impl, device, narrow_dtype, reduction):
    inputs, target = inputs_of(4, 8, 17, device)
    inputs[0] = torch.full_like(inputs[0], float("nan")).requires_grad_()
    ignored = torch.full_like(target, -100)
    assert all((x == 0).all() for x in run(fused(impl), inputs, ignored, reduction=reduction, label_smoothing=0.1))
    with torch.no_grad():
        assert (fused(impl)(*(x.to(narrow_dtype) for x in inputs[:2]), ignored, reduction=reduction) == 0).all()


def assert_nan_stays_in_ignored_rows(impl, device, reduction):
    inputs, target = inputs_of(6, 8, 17, device)
    target = some_ignored(target)
    ignored = (target == -100)[:, None]
    poisoned = [inputs[0].detach().masked_fill(ignored, float("nan")).requires_grad_(), *inputs[1:]]
    cotangent = ones_like_loss(reduction, 6, device)
    stained = cotangent.masked_fill(ignored[:, 0], float("nan")) if reduction == "none" else cotangent
    options = EVERYTHING | {"ignore_index": -100}
    clean = run(fused(impl), inputs, target, cotangent, reduction=reduction, **options)
    actual = run(fused(impl), poisoned, target, stained, reduction=reduction, **options)
    torch.testing.assert_close(actual, clean, rtol=0, atol=0)


def assert_obeys_autocast(impl, device, dtype, reduction):
    """Forward and backward inside the block are the same as outside it from a narrow input."""
    (input, weight, bias), target = inputs_of(5, 24, 33, device)
    cotangent = ones_like_loss(reduction, 5, device)
    with torch.autocast(device.type, dtype=dtype):
        actual = run(fused(impl), (input, weight, bias), target, cotangent, reduction=reduction)
    narrow_input = input.detach().to(dtype).requires_grad_()
    expected = run(fused(impl), (narrow_input, weight, bias), target, cotangent, reduction=reduction)
    expected[1] = expected[1].float()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_operators_obey_torch(namespace, device, dtype):
    (input, weight, bias), target = inputs_of(4, 8, 17, device)
    input, weight, bias = (x.detach() for x in (input, weight.to(dtype), bias))
    operators, options = getattr(torch.ops, namespace), (-100, 0.1, 0.01, 2.0)
    forward, backward = operators.linear_cross_entropy.default, operators.linear_cross_entropy_backward.default
    torch.library.opcheck(forward, (input, weight, bias, target, "mean", *options, [True, True, True]))
    torch.library.opcheck(forward, (input, weight, None, target, "sum", -100, 0.0, 0.0, None, [True, False, False]))
    torch.library.opcheck(forward, (input, weight, bias, target, "none", *options, [True, True, True]))
    torch.library.opcheck(
        backward, (torch.randn_like(bias[:4]), input, weight, bias, target, *options, [False, True, True])
    )


def assert_compiles_whole(impl, device, backend):
    inputs, target = inputs_of(4, 8, 17, device)
    torch._dynamo.reset()
    for reduction in ("mean", "none"):
        compiled = torch.compile(fused(impl), backend=backend, fullgraph=True)
        expected = run(fused(impl), inputs, target, reduction=reduction, **EVERYTHING)
        actual = run(compiled, inputs, target, reduction=reduction, **EVERYTHING)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
