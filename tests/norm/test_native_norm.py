"""The native LayerNorm and RMSNorm, with bias, dropout and residual, against the oracle."""

from __future__ import annotations

import native
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import NORMS, SEED, SHAPES, SITE, assert_matches, fused, inputs_of, run

from tfm import ops
from tfm.reference import dropout as reference

pytestmark = native.MARKS
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_native_matches(norm, dtype, shape, instruction_set):
    with native.instruction_set(instruction_set):
        assert_matches(norm, inputs_of(norm, shape, "cpu", dtype), 0.3, "native")


@settings(deadline=None, max_examples=30)
@given(
    norm=st.sampled_from(NORMS),
    rows=st.integers(0, 70),
    columns=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_native_matches_at_any_shape(norm, rows, columns, dtype, p, seed):
    torch.manual_seed(seed)
    assert_matches(norm, inputs_of(norm, (rows, columns), "cpu", dtype), p, "native")


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
    ids=["wide parameters", "wide residual", "wide x"],
)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("norm", NORMS)
def test_native_takes_mixed_dtypes(norm, dtypes, p):
    assert_matches(norm, inputs_of(norm, (6, 17), "cpu", *dtypes), p, "native")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["y only", "h only"])
def test_one_output_may_go_unused(used, p):
    inputs = inputs_of("layer_norm", (40, 130), "cpu")
    cotangents = [torch.randn_like(inputs[0]) if wanted else torch.zeros_like(inputs[0]) for wanted in used]
    expected = run(fused("layer_norm", p, "native"), inputs, cotangents)
    given = [c if wanted else None for c, wanted in zip(cotangents, used, strict=True)]
    torch.testing.assert_close(run(fused("layer_norm", p, "native"), inputs, given), expected, rtol=0, atol=0)


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("columns", [1, 17, 65, 129, 9001])
def test_native_draws_the_references_mask(columns, instruction_set):
    rows, p = 5, 0.4
    x = torch.ones(rows, columns, requires_grad=True)
    with native.instruction_set(instruction_set):
        _, h = fused("layer_norm", p, "native")(x, torch.zeros_like(x))
        h.backward(torch.ones_like(h))
    expected = oracle.kept_elements(SEED, p, rows, columns, site=SITE) * reference.keep_scale(p)
    assert torch.equal(h, expected)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("rows", "columns"), [(1000, 130), (5000, 17)])
def test_same_bits_on_any_number_of_threads(norm, rows, columns):
    inputs, cotangents = inputs_of(norm, (rows, columns), "cpu"), torch.randn(2, rows, columns)
    native.assert_same_bits(lambda: run(fused(norm, 0.3, "native"), inputs, cotangents))


def test_rows_do_not_see_their_batch():
    x, residual, *parameters = inputs_of("layer_norm", (100, 65), "cpu")
    cotangents = torch.randn(2, 100, 65)
    many = run(fused("layer_norm", 0.3, "native"), [x, residual, *parameters], cotangents)
    some = [x[:7].detach().requires_grad_(), residual[:7].detach().requires_grad_(), *parameters]
    few = run(fused("layer_norm", 0.3, "native"), some, cotangents[:, :7])
    for all_rows, first_rows in zip(many[:4], few[:4], strict=True):
        assert torch.equal(all_rows[:7], first_rows)


STRIDES = {
    "rows apart": lambda x: torch.nn.functional.pad(x, (0, 6))[..., :17],
    "columns apart": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "offset": lambda x: torch.nn.functional.pad(x, (3, 0))[..., 3:],
}


@pytest.mark.parametrize("view", STRIDES)
def test_strides_change_nothing(view):
    x, residual, *parameters = inputs_of("layer_norm", (3, 4, 17), "cpu")
    cotangents, function = torch.randn(2, 3, 4, 17), fused("layer_norm", 0.3, "native")
    expected = run(function, [x, residual, *parameters], cotangents)
    viewed = [STRIDES[view](tensor.detach()).requires_grad_() for tensor in (x, residual)]
    apart = [tensor.detach().repeat_interleave(2)[::2].requires_grad_() for tensor in parameters]
    actual = run(function, [*viewed, *apart], [STRIDES[view](cotangent) for cotangent in cotangents])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("expand", [lambda row: row.expand(3, 4, 17), lambda row: row[:1].expand(3, 4, 17)])
def test_expanded_gradients(expand):
    inputs = inputs_of("rms_norm", (3, 4, 17), "cpu")
    gradient = expand(torch.randn(17))
    expected = run(fused("rms_norm", 0.3, "native"), inputs, [gradient.contiguous(), 2 * gradient.contiguous()])
    actual = run(fused("rms_norm", 0.3, "native"), inputs, [gradient, (2 * gradient[0, 0]).expand(3, 4, 17)])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_infinities_that_are_dropped_are_gone():
    residual = torch.randn(3, 17)
    _, h = fused("layer_norm", 1.0, "native")(torch.full((3, 17), torch.inf), residual)
    assert torch.equal(h, residual)


def test_not_a_number_stays_one():
    x = torch.randn(2, 17, dtype=torch.bfloat16)
    x[0, 3] = torch.nan
    _, h = ops.residual_layer_norm(x, torch.zeros_like(x), impl="native")
    assert torch.equal(h.isnan(), x.isnan())


def test_operators_obey_torch():
    x, residual, weight, x_bias, bias = (tensor.detach() for tensor in inputs_of("layer_norm", (5, 17), "cpu"))
    seed, options = torch.tensor(SEED), (1e-5, 0.3, SITE, True, 0.0, False)
    operator = torch.ops.tfm_native.residual_norm.default
    torch.library.opcheck(operator, (x, x_bias, residual.bfloat16(), weight, bias, seed, *options, torch.bfloat16))
    torch.library.opcheck(operator, (x, None, None, None, None, None, 1e-5, 0.0, 0, False, 1.0, True, None))
    y, h, statistics = operator(x, x_bias, residual, weight, bias, seed, *options, None)
    dtypes = [torch.float32, None, torch.bfloat16, None, torch.float32]
    backward = torch.ops.tfm_native.residual_norm_backward.default
    torch.library.opcheck(backward, (y, None, h, statistics, weight, seed, 0.3, SITE, 0.0, *dtypes))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend):
    inputs, cotangents = inputs_of("layer_norm", (5, 17), "cpu"), torch.randn(2, 5, 17)
    torch._dynamo.reset()
    function = fused("layer_norm", 0.3, "native")
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    torch.testing.assert_close(run(compiled, inputs, cotangents), run(function, inputs, cotangents), rtol=0, atol=0)


def test_what_nobody_writes_is_nan():
    assert torch.empty(7).isnan().all()


def test_the_reference_serves_what_no_native_kernel_reads():
    x, weight = torch.randn(5, 17), torch.randn(17)
    for others in ({"weight": weight.double()}, {"weight": weight.half()}, {"out_dtype": torch.float16}):
        assert torch.equal(ops.layer_norm(x, **others), ops.layer_norm(x, **others, impl="reference"))
        with pytest.raises(ValueError, match=r"native.*expected one of float32, bfloat16, got float"):
            ops.layer_norm(x, **others, impl="native")


def test_native_is_what_cpus_take():
    x = torch.randn(5, 17)
    assert torch.equal(ops.layer_norm(x), ops.layer_norm(x, impl="native"))
    with pytest.raises(ValueError, match=r"native.*expected one of float32, bfloat16, got float16"):
        ops.layer_norm(x.half(), impl="native")
