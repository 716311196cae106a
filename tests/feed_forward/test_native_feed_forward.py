"""The native feed-forward networks: torch's matmuls with one pass of our own between them, against the oracle."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import combinations

import native
import oracle
import pytest
import torch
import torch.nn.functional as F
from feed_forward_cases import NAMES, SEED, SITE, KeptShapes, assert_kernel_matches, inputs_of, network, run
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm import ops
from tfm.ops.feed_forward import ACTIVATIONS
from tfm.reference.dropout import keep_scale
from tfm.reference.feed_forward import ACTIVATIONS as PLAIN

pytestmark = native.MARKS
DTYPES = [torch.float32, torch.bfloat16]
# One more than torch's: a tail of the normal distribution or of the logistic function is rounded before it is used.
ROUNDING = torch.finfo(torch.float32).eps
# What one draw of dropout covers, and more; vectors that the columns do not fill.
SHAPES = [(1, 1, 1, 1), (3, 17, 33, 5), ((2, 3, 5), 64, 16, 33), ((70,), 20, 300, 9)]


def assert_matches(inputs, activation="gelu", p=0.3, gated=False, cotangent=None):
    assert_kernel_matches(inputs, activation, p, gated, cotangent, "native")


def native_network(activation="gelu", p=0.3, gated=False):
    return network(activation, p, gated, "native")


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_native_matches(gated, dtype, activation, instruction_set):
    with native.instruction_set(instruction_set):
        assert_matches(inputs_of((3, 13), 20, 150, 9, "cpu", dtype, gated=gated), activation, gated=gated)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_native_matches_at_any_shape(gated, dtype, shape):
    assert_matches(inputs_of(*shape, "cpu", dtype, gated=gated), gated=gated)


@settings(deadline=None, max_examples=15)
@given(
    sizes=st.tuples(*[st.integers(1, 70)] * 4),
    activation=st.sampled_from(["relu", "gelu"]),
    p=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_native_matches_whatever_the_shape(sizes, activation, p, seed):
    torch.manual_seed(seed)
    assert_matches(inputs_of(*sizes, "cpu"), activation, p)


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_keep_their_digits_over_the_whole_range(activation, instruction_set):
    """Both ways, held to torch's error decade by decade, on either side of 0 up to 10."""
    one = torch.ones(1, 1)
    for exponent in range(-6, 4):
        size = 10.0 ** torch.linspace(exponent, exponent + 1, 333)
        x = torch.cat((-size, size))[:, None].requires_grad_()
        (same, slope), (truth, true_slope) = (
            (y, torch.autograd.grad(y.sum(), given)[0])
            for given in (x, x.detach().double().requires_grad_())
            for y in [PLAIN[activation](given)]
        )
        with native.instruction_set(instruction_set):
            hidden, pre = torch.ops.tfm_native.linear_activation(
                x.detach(), one, None, None, False, activation, 0.0, None, 0, True
            )  # fmt: skip
            saved = hidden if activation == "relu" else pre
            dpre, _, _ = torch.ops.tfm_native.linear_activation_backward(
                torch.ones_like(hidden), one, saved, False, activation, 0.0, None, 0, False, None
            )  # fmt: skip
        # Far below 0 nothing but 0 is left of most.
        for side in (slice(333), slice(333, None)) if exponent < 1 else (slice(666),):
            results = [(hidden, truth, same), (dpre, true_slope, slope)]
            for result, true, plain in (tuple(t.detach()[side] for t in some) for some in results):
                oracle.assert_matches(result, true, plain, f"{activation} at 1e{exponent}", ROUNDING)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_a_number_stays_one(activation):
    pre = torch.tensor([[torch.nan, 1.0]])
    hidden = torch.ops.tfm_native.activation_dropout(pre, False, activation, 0.0, None, 0)
    assert hidden.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_biases_and_dropout_are_optional(activation, p, biased):
    x, w1, b1, w2, b2 = inputs_of(9, 20, 35, 9, "cpu")
    assert_matches([x, w1, b1, w2, b2] if biased else [x, w1, None, w2, None], activation, p)


def test_packed_weights_are_both():
    x, gate, up, down = inputs_of(9, 20, 35, 9, "cpu", gated=True)
    packed = torch.cat((gate, up)).detach().requires_grad_()
    cotangent = torch.randn(9, 9)
    assert_matches([x, packed, None, down], gated=True, cotangent=cotangent)
    expected = run(native_network(gated=True), [x, gate, up, down], cotangent)
    _, dx, dpacked, ddown = run(native_network(gated=True), [x, packed, None, down], cotangent)
    torch.testing.assert_close([dx, dpacked, ddown], [expected[1], torch.cat(expected[2:4]), expected[4]])


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_weights_of_another_dtype(gated, wide):
    assert_matches(inputs_of(9, 20, 35, 9, "cpu", torch.bfloat16, wide, gated), gated=gated)


def test_autocast():
    inputs, cotangent = inputs_of(9, 20, 35, 9, "cpu"), torch.randn(9, 9).bfloat16()
    expected = run(native_network(), [t.detach().bfloat16().requires_grad_() for t in inputs], cotangent)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = native_network()(*inputs)
        gradients = torch.autograd.grad(output, inputs, cotangent)
    assert torch.equal(output, expected[0])
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    # Those of the biases, which autocast leaves in fp32, are not rounded.
    exact = [gradient.bfloat16() for gradient in gradients]
    torch.testing.assert_close(exact[0::2] + exact[1::2], expected[1::2] + expected[2::2])


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_native_draws_the_references_mask(activation, instruction_set):
    rows, columns, p = 19, 141, 0.4
    x, identity = torch.ones(rows, columns, requires_grad=True), torch.eye(columns)
    with native.instruction_set(instruction_set):
        y = native_network(activation, p)(x, 100 * identity, None, identity, None)
        (dx,) = torch.autograd.grad(y.sum(), x)
    kept = oracle.kept_elements(SEED, p, rows, columns, site=SITE)
    assert torch.equal(y.detach() != 0, kept)
    if activation == "relu":
        torch.testing.assert_close(dx, kept * 100 * keep_scale(p))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_number_of_threads(activation, dtype):
    """Products with the identity are exact: every rounding is our own."""
    rows, columns = 700, 130
    x, bias, dy = torch.randn(rows, columns), torch.randn(columns), torch.randn(rows, columns)
    x, dy, identity = x.to(dtype), dy.to(dtype), torch.eye(columns, dtype=dtype)
    settings = False, activation, 0.3, torch.tensor(SEED), SITE

    def compute():
        hidden, pre = torch.ops.tfm_native.linear_activation(x, identity, None, bias, *settings, True)
        saved = hidden if activation == "relu" else pre
        backward = torch.ops.tfm_native.linear_activation_backward
        outputs = backward(dy, identity, saved, *settings, activation != "relu", torch.float32)
        return [hidden, pre, *(output for output in outputs if output is not None)]

    native.assert_same_bits(compute)


def test_same_inputs_same_bits():
    inputs, cotangent = inputs_of(70, 20, 35, 9, "cpu"), torch.randn(70, 9)
    first, second = (run(native_network(), inputs, cotangent) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_backward_sees_the_pre_activation_as_stored(gated, dtype):
    x, w1, other, *_ = (tensor.detach() for tensor in inputs_of(9, 20, 35, 9, "cpu", dtype, gated=gated))
    up, bias = (other, None) if gated else (None, other)
    hidden, pre = torch.ops.tfm_native.linear_activation(x, w1, up, bias, gated, "gelu", 0.0, None, 0, True)
    again = torch.ops.tfm_native.activation_dropout(pre, gated, "gelu", 0.0, None, 0)
    torch.testing.assert_close(hidden, again, rtol=0, atol=0)


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("recording", [True, False])
def test_keeps_a_pre_activation_only_for_a_backward(needed, recording):
    inputs = [tensor.detach().requires_grad_(needed) for tensor in inputs_of(5, 17, 20, 9, "cpu")]
    with KeptShapes("tfm_native") as kept, nullcontext() if recording else torch.no_grad():
        native_network()(*inputs)
    assert kept.shapes == [(5, 20) if needed and recording else (0,)]


VIEWS = {
    "row stride": lambda x: F.pad(x, (0, 6))[..., :20],
    "column stride": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_strides(view, gated):
    inputs, cotangent = inputs_of((3, 4), 20, 35, 20, "cpu", gated=gated), VIEWS[view](torch.randn(3, 4, 20))
    x, *parameters = (tensor.detach() for tensor in inputs)
    viewed = [VIEWS[view](x), *(F.pad(parameter, (0, 3))[..., :-3] for parameter in parameters)]
    viewed[1] = viewed[1].t().contiguous().t()
    assert_matches([tensor.requires_grad_() for tensor in viewed], gated=gated, cotangent=cotangent)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_no_rows(gated):
    inputs = inputs_of((2, 0), 20, 35, 9, "cpu", gated=gated)
    output, dx, *gradients = run(native_network(gated=gated), inputs, torch.zeros(2, 0, 9))
    assert (output.shape, dx.shape) == ((2, 0, 9), (2, 0, 20))
    for gradient, tensor in zip(gradients, inputs[1:], strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


SUBSETS = [
    (gated, activation, subset)
    for gated, activations in ((False, ("gelu", "relu")), (True, ("silu",)))
    for activation in activations
    for size in (1, 2)
    for subset in combinations(NAMES[gated], size)
]


@pytest.mark.parametrize(("gated", "activation", "subset"), SUBSETS, ids=str)
def test_only_wanted_gradients_are_computed(gated, activation, subset):
    inputs, cotangent = inputs_of(5, 17, 20, 9, "cpu", gated=gated), torch.randn(5, 9)
    function, names = native_network(activation, gated=gated), NAMES[gated]
    expected = dict(zip(names, run(function, inputs, cotangent)[1:], strict=True))
    some = [tensor.detach().requires_grad_(name in subset) for name, tensor in zip(names, inputs, strict=True)]
    function(*some).backward(cotangent)
    for name, tensor in zip(names, some, strict=True):
        if name in subset:
            torch.testing.assert_close(tensor.grad, expected[name])
        else:
            assert tensor.grad is None


def test_operators_obey_torch():
    x, w1, b1, w2, _ = (tensor.detach() for tensor in inputs_of(5, 17, 20, 9, "cpu"))
    dy, seed = torch.randn(5, 9), torch.tensor(SEED)
    forward = torch.ops.tfm_native.linear_activation.default
    backward = torch.ops.tfm_native.linear_activation_backward.default
    for activation, p, drawn, bias in (("gelu", 0.3, seed, b1), ("relu", 0.3, seed, None)):
        settings = activation, p, drawn, SITE
        torch.library.opcheck(forward, (x, w1, None, bias, False, *settings, True))
        hidden, pre = forward(x, w1, None, bias, False, *settings, True)
        saved = hidden if activation == "relu" else pre
        torch.library.opcheck(backward, (dy, w2, saved, False, *settings, activation != "relu", torch.bfloat16))
    settings = "silu", 0.3, seed, SITE
    torch.library.opcheck(forward, (x, w1, w1.clone(), None, True, *settings, False))
    torch.library.opcheck(torch.ops.tfm_native.activation_dropout.default, (w1, False, *settings))
    _, pre = forward(x, torch.cat((w1, w1)), None, None, True, *settings, True)
    torch.library.opcheck(backward, (dy, w2, pre, True, *settings, False, None))


@pytest.mark.parametrize(("backend", "gated"), [("aot_eager", True), ("inductor", False)])
def test_compiles_whole(backend, gated):
    inputs, cotangent = inputs_of(5, 17, 20, 9, "cpu", gated=gated), torch.randn(5, 9)
    torch._dynamo.reset()
    function = native_network(gated=gated)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    torch.testing.assert_close(run(compiled, inputs, cotangent), run(function, inputs, cotangent))


def test_native_is_what_cpus_take():
    inputs = [tensor.detach() for tensor in inputs_of(5, 17, 20, 9, "cpu")]
    assert torch.equal(ops.feed_forward(*inputs, "gelu"), ops.feed_forward(*inputs, "gelu", impl="native"))
    with pytest.raises(ValueError, match=r"native.*expected one of float32, bfloat16, got float64"):
        ops.feed_forward(*(tensor.double() for tensor in inputs), impl="native")
    with pytest.raises(RuntimeError, match=r"activation: expected one of tfm\.ops\.feed_forward, got mish"):
        torch.ops.tfm_native.activation_dropout(torch.ones(1, 1), False, "mish", 0.0, None, 0)
