"""What a kernel is held against: float64 is the truth, and plain torch in the kernel's own dtype sets the tolerance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# What kernels take.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = DTYPES[1:]


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute error, relative to the largest true value."""
    if truth.numel() == 0:
        return 0.0
    scale = truth.abs().max().clamp(min=torch.finfo(truth.dtype).tiny)
    return ((actual.to(truth.dtype) - truth).abs().max() / scale).item()


# What plain torch is taken to err at least, in half units of fp32's last place, however well it did: a product, an
# exponential and a sum round once each. By the luck of one order of summation, which hangs on the processor's vectors
# and fused multiply-adds, all of them cancel on one machine and add up on the next.
ROUNDINGS = 3


def tolerance(truth: Tensor, plain: Tensor, dtype: torch.dtype, roundings: int = ROUNDINGS) -> float:
    """Twice what `plain` errs, or `roundings` of fp32 where that is more, and one rounding of a result of `dtype`.

    Kernels accumulate in fp32, so that what narrower dtypes add to `plain` is no luck; float64 has its own roundings.
    """
    accumulator = torch.promote_types(dtype, torch.float32)
    return 2 * max(error(plain, truth), roundings * torch.finfo(accumulator).eps / 2) + torch.finfo(dtype).eps


def assert_matches(
    actual: Tensor, truth: Tensor, plain: Tensor, what: str = "output", inherent: float = 0.0,
    roundings: int = ROUNDINGS,
) -> None:  # fmt: skip
    """`actual` errs by at most twice what `plain` errs, plus one rounding of its dtype: see `tolerance`.

    Args:
        actual: the result under test.
        truth: the same computed in float64 from the same (already rounded) inputs.
        plain: the same in plain torch, in the dtype of `actual`.
        what: named in the failure.
        inherent: the relative error of what the kernel saves and plain torch does not round.
        roundings: see `tolerance`.
    """
    assert actual.shape == truth.shape, f"{what}: expected shape {tuple(truth.shape)}, got {tuple(actual.shape)}"
    assert actual.isfinite().all(), f"{what}: {(~actual.isfinite()).sum().item()} elements are not finite"
    allowed = tolerance(truth, plain, actual.dtype, roundings) + inherent
    found = error(actual, truth)
    assert found <= allowed, f"{what}: error {found:.3e} exceeds {allowed:.3e} (plain torch: {error(plain, truth):.3e})"


def assert_all_match(
    actual: Sequence[Tensor], truth: Sequence[Tensor], plain: Sequence[Tensor], names: Sequence[str]
) -> None:
    """`assert_matches` for each of several results."""
    for result, true, same_dtype, name in zip(actual, truth, plain, names, strict=True):
        assert_matches(result, true, same_dtype, name)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """The sign of a zero included; one NaN is as good as another."""
    assert found.dtype == expected.dtype
    if found.is_floating_point():
        assert torch.equal(found.isnan(), expected.isnan())
        found, expected = (x.masked_fill(x.isnan(), 0.0) for x in (found, expected))
        assert torch.equal(found.signbit(), expected.signbit())
    assert torch.equal(found, expected)


ONES = 0xFFFFFFFF
# From Random123's kat_vectors, "philox4x32 7": counter, key, result.
PHILOX_VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


def philox(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int = 7) -> tuple[int, int, int, int]:
    """Philox4x32 in Python's own integers (Salmon et al., SC 2011, figure 2): four words from a counter and a key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return c0, c1, c2, c3


def is_kept(seed: int, p: float, column: int, row: int, group: int = 0, site: int = 0) -> bool:
    """Whether dropout keeps one element, by the rule that tfm.reference.dropout states."""
    word = philox((column // 8, row, group, site), (seed % (1 << 32), (seed >> 32) % (1 << 32)))[column % 8 // 2]
    half = word >> 16 if column % 2 else word % (1 << 16)
    return half >= round(65536 * p)


def kept_elements(seed: int, p: float, rows: int, columns: int, group: int = 0, site: int = 0) -> Tensor:
    """`is_kept` for a whole matrix: bool [rows, columns]."""
    return torch.tensor(
        [[is_kept(seed, p, column, row, group, site) for column in range(columns)] for row in range(rows)],
        dtype=torch.bool,
    ).view(rows, columns)


def allowed_keys(
    shape: tuple[int, int, int, int],
    is_causal: bool = False,
    query_start: int | Sequence[int] = 0,
    window_size: tuple[int, int] = (-1, -1),
    key_lengths: Sequence[int] | None = None,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Which keys each query may attend to, decided one by one: bool [B, H, Sq, Sk]."""
    batch, _, query_length, key_length = shape
    left, right = window_size
    allowed = torch.ones(shape, dtype=torch.bool)
    for sequence in range(batch):
        start = query_start if isinstance(query_start, int) else query_start[sequence]
        for query in range(query_length):
            for key in range(key_length):
                position = query + start
                outside = key_lengths is not None and key >= key_lengths[sequence]
                future = is_causal and key > position
                before, behind = left >= 0 and key < position - left, right >= 0 and key > position + right
                invalid = key_mask is not None and not key_mask[sequence, key]
                allowed[sequence, :, query, key] = not (outside or future or before or behind or invalid)
    if mask is None:
        return allowed
    return allowed & (mask if mask.dtype == torch.bool else mask != float("-inf"))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    multiplier: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention one query at a time, over its allowed keys only: output [B, Hq, Sq, Dv] and logsumexp [B, Hq, Sq].

    `allowed` is bool [B, Hq, Sq, Sk]; `bias` and `multiplier` (dropout of the softmax weights) broadcast to that.
    """
    batch, heads, length, dim = query.shape
    group = heads // key.shape[1]
    bias = None if bias is None else bias.expand(allowed.shape)
    outputs, denominators = [], []
    for b, h, q in ((b, h, q) for b in range(batch) for h in range(heads) for q in range(length)):
        chosen = allowed[b, h, q].nonzero()[:, 0]
        scores = key[b, h // group][chosen] @ query[b, h, q] * (dim**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if bias is not None:
            scores = scores + bias[b, h, q, chosen]
        terms = scores if sinks is None else torch.cat((scores, sinks[h].view(1)))
        lse = terms.logsumexp(0)
        weights = (scores - lse).exp()
        if multiplier is not None:
            weights = weights * multiplier[b, h, q, chosen]
        outputs.append(weights @ value[b, h // group][chosen])
        denominators.append(lse)
    output = torch.stack(outputs).view(batch, heads, length, value.shape[-1])
    return output, torch.stack(denominators).view(batch, heads, length)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The loss from the whole logits, by torch's own cross-entropy."""
    logits = F.linear(input, linear_weight, linear_bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    losses = F.cross_entropy(logits, target, reduction="none", **options)
    partition = z_loss * logits.logsumexp(dim=-1).square()
    if target.is_floating_point():
        losses, divisor = losses + partition, torch.tensor(float(len(target)))
    else:
        kept = target != ignore_index
        losses = losses + partition * kept
        divisor = (kept if weight is None else weight[target * kept] * kept).sum()
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / divisor}[reduction]
