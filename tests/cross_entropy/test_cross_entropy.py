"""The chunked loss against torch's cross-entropy of the whole logits, and the promises about memory and padding."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tfm import ops
from tfm.ops.backends import use
from tfm.reference import cross_entropy as reference

ROWS, DIM, CLASSES = 11, 5, 7

CASES = {
    "plain": {},
    "bias": {"linear_bias": True},
    "class weights": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing of everything": {"label_smoothing": 1.0},
    "smoothing, class weights": {"label_smoothing": 0.3, "weight": True},
    "another ignored index": {"ignore_index": 2},
    "z-loss": {"z_loss": 0.05},
    "softcap": {"softcap": 0.8},
    "everything": {
        "linear_bias": True, "weight": True, "label_smoothing": 0.2, "z_loss": 0.03, "softcap": 1.3, "ignore_index": 3,
    },
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def on_the_reference():
    with use("reference"):
        yield


def tensors(rows=ROWS, dim=DIM, classes=CLASSES, dtype=torch.float64):
    shapes = (rows, dim), (classes, dim)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def arguments(case: dict, classes=CLASSES, dtype=torch.float64):
    options = dict(case)
    if "linear_bias" in case:
        options["linear_bias"] = torch.randn(classes, dtype=dtype, requires_grad=True)
    if "weight" in case:
        options["weight"] = torch.rand(classes, dtype=dtype) + 0.1
    return options


def targets(kind: str, rows=ROWS, classes=CLASSES, dtype=torch.float64, ignore_index=-100) -> Tensor:
    if kind == "probabilities":
        return torch.randn(rows, classes, dtype=dtype).softmax(dim=-1)
    classes_of_rows = torch.randint(classes, (rows,))
    classes_of_rows[::4] = ignore_index
    return classes_of_rows


@pytest.mark.parametrize("chunk_bytes", [1, 3 * CLASSES * 8, 8 << 20], ids=["chunks of 1", "chunks of 3", "one chunk"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_whole_logits(monkeypatch, case, kind, reduction, chunk_bytes):
    monkeypatch.setitem(reference.CHUNK_BYTES, "cpu", chunk_bytes)
    if kind == "probabilities":
        case = {name: value for name, value in case.items() if name != "ignore_index"}
    inputs, options = tensors(), arguments(case)
    target = targets(kind, ignore_index=case.get("ignore_index", -100))
    loss = ops.linear_cross_entropy(*inputs, target, reduction=reduction, **options)
    expected = oracle.linear_cross_entropy(*inputs, target, reduction=reduction, **options)
    torch.testing.assert_close(loss, expected)
    wanted = inputs + ([options["linear_bias"]] if "linear_bias" in options else [])
    cotangent = torch.randn_like(loss)
    grads, expected_grads = (torch.autograd.grad(y, wanted, cotangent) for y in (loss, expected))
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_torchs_own_function(kind, weighted, reduction):
    inputs, target = tensors(), targets(kind)
    options = arguments({"linear_bias": True, "label_smoothing": 0.1} | ({"weight": True} if weighted else {}))
    options["reduction"] = reduction
    bias = options.pop("linear_bias")
    expected = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*inputs, bias), target, **options)
    torch.testing.assert_close(ops.linear_cross_entropy(*inputs, target, linear_bias=bias, **options), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (0, 0, 0)], ids=str)
def test_only_the_gradients_asked_for(needs, reduction):
    *inputs, bias = *tensors(), torch.randn(CLASSES, dtype=torch.float64)
    for tensor, need in zip((*inputs, bias), needs, strict=True):
        tensor.requires_grad_(bool(need))
    target = targets("classes")
    results = []
    for function in (ops.linear_cross_entropy, oracle.linear_cross_entropy):
        loss = function(*inputs, target, linear_bias=bias, reduction=reduction)
        asked = [tensor for tensor in (*inputs, bias) if tensor.requires_grad]
        assert loss.requires_grad == bool(asked)
        results.append((loss, torch.autograd.grad(loss.sum(), asked) if asked else ()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    inputs, options = tensors(4, 3, 5), arguments(CASES["everything"], classes=5)
    bias = options.pop("linear_bias")
    target = torch.tensor([0, 3, 1, 4])

    def function(input, linear_weight, linear_bias):
        return ops.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, reduction=reduction, **options
        )

    assert torch.autograd.gradcheck(function, (*inputs, bias))


@settings(deadline=None, max_examples=30)
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    dim=st.integers(1, 4),
    classes=st.integers(1, 6),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_any_shape(leading, dim, classes, reduction, smoothing):
    input = torch.randn(*leading, dim, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(classes, dim, dtype=torch.float64, requires_grad=True)
    target = torch.randint(classes, leading)
    loss = ops.linear_cross_entropy(input, weight, target, reduction=reduction, label_smoothing=smoothing)
    grads = torch.autograd.grad(loss.sum(), (input, weight))
    assert loss.shape == (tuple(leading) if reduction == "none" else ())
    flat, rows = input.reshape(-1, dim), target.reshape(-1)
    expected = oracle.linear_cross_entropy(flat, weight, rows, reduction=reduction, label_smoothing=smoothing)
    if len(rows) == 0:  # torch's mean over nothing is NaN
        assert (loss == 0).all()
        assert all((grad == 0).all() for grad in grads)
        return
    torch.testing.assert_close(loss.reshape(-1), expected.reshape(-1))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), (input, weight)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", [{}, CASES["everything"] | {"ignore_index": -100}], ids=["plain", "everything"])
def test_every_target_ignored_is_no_loss_and_no_gradient(case, reduction):
    inputs, options = tensors(), arguments(case)
    wanted = inputs + ([options["linear_bias"]] if "linear_bias" in options else [])
    loss = ops.linear_cross_entropy(*inputs, torch.full((ROWS,), -100), reduction=reduction, **options)
    assert (loss == 0).all()
    for grad in torch.autograd.grad(loss.sum(), wanted):
        assert (grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_in_ignored_rows_stays_there(poison, reduction):
    (input, weight), target = tensors(), targets("classes")
    poisoned = input.detach().masked_fill((target == -100)[:, None], poison).requires_grad_()
    results = []
    for some in (poisoned, input):
        loss = ops.linear_cross_entropy(some, weight, target, reduction=reduction, label_smoothing=0.1, z_loss=0.1)
        results.append((loss, *torch.autograd.grad(loss.sum(), (some, weight))))
    for result, clean in zip(*results, strict=True):
        assert torch.equal(result, clean)


def test_one_class_has_no_loss():
    inputs = tensors(classes=1)
    loss = ops.linear_cross_entropy(*inputs, torch.zeros(ROWS, dtype=torch.int64), label_smoothing=0.1)
    assert loss == 0
    for grad in torch.autograd.grad(loss, inputs):
        assert (grad == 0).all()


def test_large_logits_stay_finite():
    input, weight = torch.full((2, 1), 1e4), torch.tensor([[1e4], [-1e4], [0.0]])
    input.requires_grad_()
    loss = ops.linear_cross_entropy(input, weight, torch.tensor([0, 0]), z_loss=1e-20)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, input)[0].isfinite().all()


def test_a_forbidden_first_class_keeps_the_partition():
    inputs, target = tensors(), torch.randint(1, CLASSES, (ROWS,))
    bias = torch.zeros(CLASSES, dtype=torch.float64)
    bias[0] = float("-inf")
    loss, expected = (
        function(*inputs, target, linear_bias=bias, z_loss=0.1)
        for function in (ops.linear_cross_entropy, oracle.linear_cross_entropy)
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))


def test_takes_any_strides():
    input = torch.randn(DIM, 2 * ROWS, dtype=torch.float64).t()[::2].requires_grad_()
    weight = torch.randn(1, DIM, dtype=torch.float64).expand(CLASSES, -1)
    target = torch.stack([targets("classes")] * 2, dim=1)[:, 0]
    loss = ops.linear_cross_entropy(input, weight, target, reduction="none")
    torch.testing.assert_close(loss, oracle.linear_cross_entropy(input, weight, target, reduction="none"))
    grad = torch.autograd.grad(loss.sum(), input)[0]  # a cotangent of stride 0
    whole = oracle.linear_cross_entropy(input, weight, target, reduction="sum")
    torch.testing.assert_close(grad, torch.autograd.grad(whole, input)[0])


@pytest.mark.parametrize("target", [CLASSES, -1, -101])
def test_a_target_that_is_no_class(target):
    with pytest.raises(IndexError, match=rf"^target: expected classes in \[0, 7\) or -100, got {target}$"):
        ops.linear_cross_entropy(*tensors(), torch.full((ROWS,), target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["narrow weight", "fp32 weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_errs_no_more_than_torch(dtype, mixed, reduction):
    rows, dim, classes = 130, 65, 257
    input, weight = tensors(rows, dim, classes, dtype)
    weight = (weight.detach() / 8).to(torch.float32 if mixed else dtype).requires_grad_()
    target = targets("classes", rows, classes)
    results = []
    options = {"reduction": reduction, "label_smoothing": 0.1}
    for function, inputs in (
        (ops.linear_cross_entropy, (input, weight)),
        (oracle.linear_cross_entropy, [t.detach().double().requires_grad_() for t in (input, weight)]),
        (lambda x, w, *rest, **more: oracle.linear_cross_entropy(x, w.to(x.dtype), *rest, **more), (input, weight)),
    ):
        loss = function(*inputs, target, **options)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    assert results[0][0].dtype == torch.float32
    oracle.assert_all_match(*results, ("loss", "input", "weight"))


def test_half_precision_gradients_do_not_underflow():
    """The mean over many rows divides only after the narrow products: 1e-4 / 8192 is 0 in half precision."""
    rows, classes = 8192, 64
    input, weight = ((t.detach() / 8).requires_grad_() for t in tensors(rows, 8, classes, torch.float16))
    bias = torch.zeros(classes).index_fill(0, torch.tensor(0), 9.0)  # leaves about 1e-4 for each other class
    target = torch.zeros(rows, dtype=torch.int64)
    wide = [t.detach().double().requires_grad_() for t in (input, weight)]
    grads, truths = (
        torch.autograd.grad(function(*some, target, linear_bias=bias.to(some[0].dtype)) * 2.0**14, some)
        for function, some in ((ops.linear_cross_entropy, (input, weight)), (oracle.linear_cross_entropy, wide))
    )
    for grad, truth in zip(grads, truths, strict=True):
        assert oracle.error(grad, truth) < 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_obeys_autocast(dtype, reduction):
    input, weight = tensors(33, 17, 65, torch.float32)
    target, options = targets("classes", 33, 65), arguments({"weight": True, "label_smoothing": 0.2}, 65, torch.float32)
    options |= {"reduction": reduction}
    with torch.autocast("cpu", dtype=dtype):
        loss = ops.linear_cross_entropy(input, weight, target, **options)
        grads = torch.autograd.grad(loss.sum(), (input, weight))
    narrow = input.detach().to(dtype).requires_grad_()
    expected = ops.linear_cross_entropy(narrow, weight, target, **options)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    narrow_grads = torch.autograd.grad(expected.sum(), (narrow, weight))
    assert [grad.dtype for grad in grads] == [torch.float32] * 2
    assert all(torch.equal(grad, other.float()) for grad, other in zip(grads, narrow_grads, strict=True))


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.itemsize)
        return result


@pytest.mark.parametrize("case", [{}, CASES["everything"]], ids=["plain", "everything"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_never_holds_the_whole_logits(monkeypatch, case, reduction):
    rows, dim, classes = 600, 4, 500
    monkeypatch.setitem(reference.CHUNK_BYTES, "cpu", 20 * classes * 4)
    inputs, options = tensors(rows, dim, classes, torch.float32), arguments(case, classes, torch.float32)
    target = torch.randint(classes, (rows,))
    largest = []
    for function in (ops.linear_cross_entropy, oracle.linear_cross_entropy):
        with LargestTensor() as record:
            function(*inputs, target, reduction=reduction, **options).sum().backward()
        largest.append(record.elements)
    assert largest[0] <= 20 * classes < rows * classes <= largest[1]


def test_without_grad_no_gradient_is_formed(monkeypatch):
    asked = []
    chunks = reference._chunks
    monkeypatch.setattr(reference, "_chunks", lambda *args: asked.append(args[6]) or chunks(*args))
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with torch.no_grad():
        ops.linear_cross_entropy(x, weight, torch.tensor([0, 1, 2]))
    assert asked == [(False, False, False)]
    with pytest.raises(ValueError, match="target: expected no gradient, got a target that requires one"):
        ops.linear_cross_entropy(x, weight, torch.rand(3, 5, requires_grad=True))
