"""Cross-entropy of logits that are there: against torch's in every option, what is saved, what stays untouched."""

from __future__ import annotations

import allocations
import launches
import native
import oracle
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import EVERYTHING, OPTIONS, ROW, some_ignored
from oracle import DTYPES

from tfm import ops

BACKENDS = [
    pytest.param("triton", marks=pytest.mark.triton),
    pytest.param("native", marks=native.MARKS[:1]),
]
ALL = ["reference", *BACKENDS]
REDUCTIONS = ["mean", "sum", "none"]
# Rows and classes: one, vectors with a rest, several blocks of a program.
SHAPES = [(1, 1), (3, 17), (5, 64), (4, 1000), (2, 9001)]


def make(rows, classes, dtype=torch.float32, device="cpu"):
    logits = (2 * torch.randn(rows, classes, device=device)).to(dtype).requires_grad_()
    return logits, torch.randint(classes, (rows,), device=device)


def of_torch(logits, target, **options):
    """The oracle's loss of a linear layer whose weight changes nothing."""
    unit = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    return oracle.linear_cross_entropy(logits, unit, target, **options)


def run(function, logits, target, cotangent=None, **options):
    loss = function(logits, target, **options)
    cotangent = torch.full_like(loss, 0.7) if cotangent is None else cotangent.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, logits, cotangent)]


def fused(impl):
    return lambda *given, **options: ops.cross_entropy(*given, **options, impl=impl)


def assert_matches(impl, logits, target, **options):
    cotangent = torch.randn(len(target), device=logits.device) if options.get("reduction") == "none" else None
    before = logits.detach().clone()
    found = run(fused(impl), logits, target, cotangent, **options)
    assert torch.equal(logits, before)
    truth = run(of_torch, logits.detach().double().requires_grad_(), target, cotangent, **options)
    plain = run(of_torch, logits, target, cotangent, **options)
    oracle.assert_all_match(found, truth, plain, ("loss", "logits"))
    assert (found[0].dtype, found[1].dtype) == (torch.float32, logits.dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_reference_is_torchs(name, reduction):
    options = OPTIONS[name] | {"reduction": reduction}
    logits, target = make(9, 17, torch.float64)
    target = some_ignored(target, options.get("ignore_index", -100))
    found = run(fused("reference"), logits, target, **options)
    torch.testing.assert_close(found, run(of_torch, logits, target, **options))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.triton
def test_triton_matches_in_every_option(name, reduction, kernel_device, monkeypatch):
    launched = launches.watch(monkeypatch)
    options = OPTIONS[name]
    for dtype in DTYPES:
        logits, target = make(9, 65, dtype, kernel_device)
        target = some_ignored(target, options.get("ignore_index", -100))
        assert_matches("triton", logits, target, reduction=reduction, **options)
    assert set(launched) == {ROW}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.triton
def test_triton_matches_at_odd_shapes(shape, kernel_device):
    for dtype in (torch.float32, torch.bfloat16):
        assert_matches("triton", *make(*shape, dtype, kernel_device), label_smoothing=0.1)


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
@pytest.mark.usefixtures("filled_with_nan")
@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_native_matches(reduction, dtype, instruction_set):
    with native.instruction_set(instruction_set):
        for options in OPTIONS.values():
            logits, target = make(9, 65, dtype)
            target = some_ignored(target, options.get("ignore_index", -100))
            assert_matches("native", logits, target, reduction=reduction, **options)
        for shape in SHAPES:
            assert_matches("native", *make(*shape, dtype), reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_leading_dimensions_and_strides(impl, reduction):
    logits = torch.randn(5, 3, 2, 8).permute(2, 1, 3, 0)[..., :4].requires_grad_()
    target = torch.randint(4, (3, 2)).t()
    target = target[:, :, None].expand(2, 3, 8).clone()
    found = run(fused(impl), logits, target, reduction=reduction)
    expected = run(lambda x, t, **o: F.cross_entropy(x.movedim(-1, 1), t, **o), logits, target, reduction=reduction)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_may_hold_anything(impl, reduction):
    logits, target = make(6, 17)
    target = some_ignored(target)
    ignored = (target == -100)[:, None]
    stained = logits.detach().masked_fill(ignored, float("nan")).requires_grad_()
    options = EVERYTHING | {"ignore_index": -100, "reduction": reduction}
    clean, found = (run(fused(impl), x, target, **options) for x in (logits, stained))
    torch.testing.assert_close(found, clean, rtol=0, atol=0)
    assert (found[1][ignored[:, 0]] == 0).all()


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_anything_that_counts_the_loss_is_0(impl, reduction):
    for rows in (0, 4):
        logits, target = make(rows, 17)
        loss, gradient = run(fused(impl), logits, torch.full_like(target, -100), reduction=reduction)
        assert loss.shape == ((rows,) if reduction == "none" else ())
        assert (loss == 0).all()
        assert (gradient == 0).all()


@pytest.mark.parametrize("impl", BACKENDS)
def test_a_graph_that_is_kept_gives_the_gradient_again(impl):
    """The gradient that is saved is not the one that is handed out, which its owner may change."""
    logits, target = make(5, 17)
    loss = ops.cross_entropy(logits, target, impl=impl)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(second, kept, rtol=0, atol=0)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives_are_the_references(impl, reduction):
    logits, target = make(5, 7)

    def second(impl):
        loss = ops.cross_entropy(logits, target, reduction=reduction, **EVERYTHING, impl=impl)
        (first,) = torch.autograd.grad(loss.sin().sum(), logits, create_graph=True)
        return torch.autograd.grad(first.square().sum(), logits)[0]

    torch.testing.assert_close(second(impl), second("reference"))


@pytest.mark.parametrize("impl", BACKENDS)
def test_one_graph(impl):
    logits, target = make(4, 17)
    for reduction in ("mean", "none"):
        compiled = torch.compile(fused(impl), backend="aot_eager", fullgraph=True)
        found, expected = (run(way, logits, target, reduction=reduction) for way in (compiled, fused(impl)))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("namespace", ["tfm", pytest.param("tfm_native", marks=native.MARKS[:1])])
def test_operators_obey_torch(namespace):
    logits, target = make(4, 17)
    operator = getattr(torch.ops, namespace).cross_entropy.default
    for wanted, grad, divisor in ((True, None, torch.tensor(3.0)), (True, torch.randn(4), None), (False, None, None)):
        torch.library.opcheck(operator, (logits.detach(), target, -100, 0.1, 0.01, 2.0, wanted, grad, divisor))


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
def test_memory_is_that_of_the_gradient():
    """Where torch makes the logarithms of all probabilities, their gradient, and the logits'."""
    logits, target = make(512, 4000)
    size = logits.numel() * 4

    def both(function):
        return allocations.peak_bytes(lambda: torch.autograd.grad(function(logits, target), logits))

    assert both(fused("native")) < 1.1 * size
    assert both(F.cross_entropy) > 1.9 * size


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
def test_threads_change_no_bit():
    logits, target = make(300, 1000)
    native.assert_same_bits(lambda: run(fused("native"), logits, target))


def test_class_weights_and_probabilities_are_the_references():
    logits, target = make(5, 7)
    weight = torch.rand(7)
    torch.testing.assert_close(
        ops.cross_entropy(logits, target, weight=weight), F.cross_entropy(logits, target, weight=weight)
    )
    probabilities = torch.rand(5, 7).softmax(-1)
    torch.testing.assert_close(ops.cross_entropy(logits, probabilities), F.cross_entropy(logits, probabilities))
    with pytest.raises(ValueError, match="class weights and probability targets run on the reference alone"):
        ops.cross_entropy(logits, target, weight=weight, impl="native")


@pytest.mark.parametrize(
    ("error", "name", "changes"),
    [
        (ValueError, "input", {"input": torch.zeros(4, 0)}),
        (ValueError, "input", {"input": torch.zeros(4, 3, dtype=torch.int64)}),
        (ValueError, "target", {"target": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, "target", {"target": torch.zeros(4, dtype=torch.int32)}),
        (IndexError, "target", {"target": torch.full((4,), 3)}),
        (ValueError, "weight", {"weight": torch.zeros(4)}),
        (ValueError, "reduction", {"reduction": "median"}),
        (ValueError, "label_smoothing", {"label_smoothing": 1.5}),
        (ValueError, "softcap", {"softcap": 0.0}),
        (ValueError, "impl", {"impl": "cuda"}),
    ],
)
def test_wrong_arguments_are_named(error, name, changes):
    good = {"input": torch.zeros(4, 3), "target": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=rf"^{name}: expected"):
        ops.cross_entropy(**good | changes)
