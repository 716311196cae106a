"""Norms and what they are held against: plain torch in float64, and in the dtypes of the inputs."""

from __future__ import annotations

import oracle
import torch
import torch.nn.functional as F

from tfm import ops
from tfm.reference import dropout as reference

# RMSNorm has no bias.
NAMES = {"layer_norm": ("x", "residual", "weight", "x_bias", "bias"), "rms_norm": ("x", "residual", "weight", "x_bias")}
NORMS = tuple(NAMES)
OPERATIONS = {"layer_norm": ops.residual_layer_norm, "rms_norm": ops.residual_rms_norm}
SEED, SITE, EPS = -0x0123456789ABCDEF, 3, 1e-5
# Rows that share a tile, tiles that programs stride over, rows of one column and of several chunks.
SHAPES = [(1, 1), (7, 1), (5, 3), (2, 3, 17), (70, 65), (33, 130), (9, 512), (2, 3, 1000), (2, 9000)]


def inputs_of(norm, shape, device, dtype=torch.float32, residual_dtype=None, parameter_dtype=None):
    """The inputs under NAMES, all needing gradients."""
    x, residual = torch.randn(2, *shape, device=device)
    parameters = torch.randn(len(NAMES[norm]) - 2, shape[-1], device=device)
    tensors = [x.to(dtype), residual.to(residual_dtype or dtype), *parameters.to(parameter_dtype or dtype).unbind()]
    return [tensor.detach().requires_grad_() for tensor in tensors]


def run(function, inputs, cotangents):
    """(y, h) and the inputs' gradients; output i is weighed by cotangent i, not used where that is None."""
    outputs = function(*inputs)
    used = [(y, c.to(y.dtype)) for y, c in zip(outputs, cotangents, strict=True) if c is not None]
    grads = torch.autograd.grad([y for y, _ in used], inputs, [c for _, c in used])
    return [*(output.detach() for output in outputs), *grads]


def fused(norm, p, impl, **options):
    def operation(x, residual, weight=None, x_bias=None, bias=None):
        given = {"weight": weight, "x_bias": x_bias} | ({} if bias is None else {"bias": bias})
        fixed = {"eps": EPS, "dropout_p": p, "seed": SEED, "site": SITE, "impl": impl}
        return OPERATIONS[norm](x, residual, **given, **(fixed | options))

    return operation


def plain(norm, p):
    """The same composed of torch's operations, in the dtype of the inputs."""

    def operation(x, residual, weight, x_bias, bias=None):
        h = residual + reference.dropout(x + x_bias.to(x.dtype), p, torch.tensor(SEED), SITE)
        columns, weight = h.shape[-1:], weight.to(h.dtype)
        if norm == "layer_norm":
            return F.layer_norm(h, columns, weight, bias.to(h.dtype), EPS), h
        return F.rms_norm(h, columns, weight, EPS), h

    return operation


def largest_terms(norm, inputs, truth, cotangents):
    """Of the sums that results are: where they cancel, as in a gradient of three columns, their rounding errs."""
    x, _, weight = (tensor.detach().double() for tensor in inputs[:3])
    dy, dh = (torch.zeros_like(x) if cotangent is None else cotangent.double() for cotangent in cotangents)
    h, centre = truth[1], truth[1].mean(-1, keepdim=True) if norm == "layer_norm" else 0.0
    rstd = ((h - centre).square().mean(-1, keepdim=True) + EPS).rsqrt()
    gradient = (dy * weight * rstd).abs() + dh.abs()
    terms = [*truth[:2], gradient, gradient, dy * (h - centre) * rstd, gradient, dy]
    return [float(term.abs().max()) if term.numel() else 0.0 for term in terms]


def assert_matches(norm, inputs, p, impl, cotangents=None):
    if cotangents is None:
        cotangents = [torch.randn_like(inputs[0], dtype=torch.float32) for _ in range(2)]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    actual = run(fused(norm, p, impl), inputs, cotangents)
    truth, same = run(plain(norm, p), wide, cotangents), run(plain(norm, p), inputs, cotangents)
    terms = largest_terms(norm, inputs, truth, cotangents)
    names = ("y", "h", *NAMES[norm])
    # The gradient of x_bias is a sum of x's: of a few rows, torch's may be exact by luck, so it may err as x's does.
    x, x_bias = names.index("x"), names.index("x_bias")
    if oracle.error(same[x_bias], truth[x_bias]) < oracle.error(same[x], truth[x]):
        same[x_bias] = truth[x_bias] + oracle.error(same[x], truth[x]) * truth[x_bias].abs().max()
    for result, true, plain_result, term, name in zip(actual, truth, same, terms, names, strict=False):
        largest = float(true.abs().max()) if true.numel() else 0.0
        inherent = 2 * torch.finfo(result.dtype).eps * term / largest if largest else 0.0
        oracle.assert_matches(result, true, plain_result, name, inherent)
    for result, tensor in zip(actual[2:], inputs, strict=True):
        assert result.dtype == tensor.dtype
