"""The native attention for CPUs against the oracle: every rule, padded and packed, dropout included."""

from __future__ import annotations

import native
import oracle
import pytest
import torch
from attention_cases import (
    NOTHING_ALLOWED,
    PACKED,
    PACKED_RULES,
    PROBLEMS,
    SEED,
    UNREACHED,
    VIEWS,
    Problem,
    assert_matches,
    attend,
    every_problem,
    make,
    packed_problem,
    packing,
    results,
    unreached,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm import ops
from tfm.operators.attention import split_heads

pytestmark = native.MARKS
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]

# Besides the common ones: several tiles of queries and of keys, whole ones, edges within, and some that nobody sees.
LONG = {
    "tiles, dropout, sinks": Problem((1, 4, 2, 200, 300, 32, 32), {"dropout_p": 0.2, "sinks": True}),
    "tiles, causal": Problem((1, 1, 1, 260, 260, 16, 16), {"is_causal": True}),
    "tiles, window, softcap, starts": Problem(
        (2, 1, 1, 150, 400, 24, 8), {"window_size": (70, 20), "query_start": [240, -30], "softcap": 2.0}
    ),
    "tiles, lengths, bool mask, dropout": Problem(
        (2, 2, 2, 130, 270, 16, 16), {"key_lengths": [270, 140], "dropout_p": 0.3}, ("bool", (2, 1, 130, 270))
    ),
    "bias of one row, softcap": Problem((2, 2, 1, 140, 150, 16, 16), {"softcap": 1.5}, ("float", (1, 2, 1, 150))),
    "bias of all sequences": Problem((2, 1, 1, 70, 200, 16, 16), {"is_causal": True}, ("float", (1, 1, 70, 200))),
    "key mask, tiles, causal": Problem((2, 2, 1, 300, 300, 16, 16), {"key_mask": "left", "is_causal": True}),
    "key mask with holes, tiles, bias, dropout": Problem(
        (2, 2, 1, 70, 300, 16, 16), {"key_mask": "holes", "dropout_p": 0.3}, ("float", (1, 2, 70, 300))
    ),
    # Few queries, whose keys are read where they lie.
    "one query, lengths, sinks, 4 to 1": Problem(
        (3, 4, 1, 1, 300, 24, 40), {"key_lengths": [300, 0, 33], "sinks": True, "scale": -0.3}
    ),
    "one query, key mask with holes, bias, softcap": Problem(
        (2, 2, 1, 1, 300, 16, 16), {"key_mask": "holes", "softcap": 1.5}, ("float", (1, 2, 1, 300))
    ),
    "three queries, starts, window, bias by distance": Problem(
        (2, 4, 2, 3, 200, 17, 16),
        {"query_start": [150, -2], "window_size": (140, 0), "relative_bias": 30, "key_mask": "left"},
    ),
    "four queries, bool mask of each head": Problem((2, 4, 2, 4, 150, 16, 8), {}, ("bool", (2, 4, 4, 150))),
    "head dim above what Triton takes": Problem((1, 1, 1, 9, 20, 300, 270)),
}


def run(inputs, options, call=ops.attention):
    """Output and gradients of `inputs`, the output weighed by fixed random numbers."""
    output = call(*inputs, impl="native", **options)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs[:3], cotangent)]


def qkv(shape=(2, 2, 1, 40, 70, 16, 24), dtype=torch.float32):
    inputs = make(Problem(shape), CPU, dtype).inputs
    return [inputs[name].requires_grad_() for name in ("query", "key", "value")]


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", (PROBLEMS | LONG).values(), ids=(PROBLEMS | LONG).keys())
def test_native_matches(problem, dtype, instruction_set):
    with native.instruction_set(instruction_set):
        assert_matches(make(problem, CPU, dtype), dtype, impl="native")


@pytest.mark.long
@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", every_problem().values(), ids=every_problem().keys())
def test_native_matches_in_every_product_of_rules(problem, dtype, instruction_set):
    with native.instruction_set(instruction_set):
        assert_matches(make(problem, CPU, dtype), dtype, impl="native")


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(0, 2),
    queries=st.integers(0, 70),
    keys=st.integers(0, 140),
    dim=st.integers(1, 40),
    group=st.integers(1, 3),
    rules=st.fixed_dictionaries(
        {},
        optional={
            "is_causal": st.just(True),
            "window_size": st.tuples(st.sampled_from([-1, 8, 33]), st.sampled_from([-1, 0, 20])),
            "query_start": st.integers(-20, 40),
            "dropout_p": st.sampled_from([0.1, 1.0]),
        },
    ),
    seed=st.integers(0, 2**32),
)
def test_native_matches_at_any_shape(batch, queries, keys, dim, group, rules, seed):
    torch.manual_seed(seed)
    tensors = make(Problem((batch, group, 1, queries, keys, dim, dim + 3), rules), CPU, torch.bfloat16)
    if min(queries, keys) >= 8:
        assert_matches(tensors, torch.bfloat16, impl="native")
        return
    # Of a softmax over few keys the gradient is a difference of nearly equal numbers, one formed from the output as
    # it was rounded: no tolerance of plain torch's, which does not round it, holds there.
    found = []
    for impl, dtype in (("native", torch.bfloat16), ("reference", torch.float64), ("reference", torch.bfloat16)):
        inputs = {name: None if x is None else x.to(dtype) for name, x in tensors.inputs.items()}
        output, lse = attend(tensors, inputs, impl)
        found.append([output, lse.masked_fill(lse == float("-inf"), 0.0)])
    oracle.assert_all_match(*found, ("output", "lse"))


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", PACKED_RULES.values(), ids=PACKED_RULES.keys())
def test_packed_equals_padded_and_the_reference(rules, dtype, instruction_set):
    attended = packed_problem(rules, CPU, dtype)
    with native.instruction_set(instruction_set):
        actual, padded = attended("native", dtype, "packed"), attended("native", dtype, "padded")
    # Sums over queries alone run over those at padding, too.
    equal([actual[name] for name in PACKED], [padded[name] for name in PACKED])
    truth, plain = (attended("reference", kind, "packed") for kind in (torch.float64, dtype))
    oracle.assert_all_match(*(list(found.values()) for found in (actual, truth, plain)), list(actual))


# Sequences that share a bias: more than there are parts, and with a bias of which one part's sums are all there is room
# for.
SHARING = {
    "many": Problem((130, 2, 1, 3, 5, 8, 8), {"relative_bias": 2}, ("float", (1, 1, 3, 5))),
    "large": Problem((3, 8, 8, 1024, 1030, 1, 1), {"relative_bias": 2}, ("float", (1, 8, 1024, 1030))),
}


@pytest.mark.parametrize("name", ["many", pytest.param("large", marks=pytest.mark.long)])
def test_parts_of_the_sequences_share_a_bias(name):
    tensors = make(SHARING[name], CPU, torch.float32)
    assert_matches(tensors, torch.float32, impl="native")
    native.assert_same_bits(lambda: list(results(tensors, "native", torch.float32).values()))


@pytest.mark.parametrize("name", ["everything", "lengths, dropout"])
def test_the_same_bits_on_any_number_of_threads(name):
    tensors = make(PROBLEMS[name], CPU, torch.float32)
    native.assert_same_bits(lambda: list(results(tensors, "native", torch.float32).values()))
    long = make(Problem((3, 4, 2, 150, 300, 32, 32), {"sinks": True}, ("float", (1, 4, 150, 300))), CPU, torch.float32)
    native.assert_same_bits(lambda: list(results(long, "native", torch.float32).values()))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", UNREACHED)
def test_what_no_query_reaches_stays_there(how, poison):
    query, key, value = qkv((2, 2, 1, 40, 70, 16, 16))
    options, hidden = unreached(how, CPU)
    expected = run([query, key, value], options)
    poisoned = [t.detach().masked_fill(hidden, poison).requires_grad_() for t in (key, value)]
    lse = ops.attention(query, key, value, **options, return_lse=True, impl="native")[1]
    empty = (lse == float("-inf"))[..., None]
    assert empty.any() == (("mask" in how or how == "bias") and how != "key mask")
    equal(run([query.detach().masked_fill(empty, poison).requires_grad_(), *poisoned], options), expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_one_query_does_not_reach_stays_there(poison):
    query, key, value = qkv((2, 4, 2, 1, 70, 16, 24))
    valid, mask = torch.rand(2, 70) < 0.6, torch.rand(1, 4, 1, 70) < 0.7
    valid[0, :40], mask[0, :2, 0, 50] = False, False
    hidden = (~valid[:, None, :, None]).expand(-1, 2, -1, -1).clone()
    hidden[:, 0, 50] = True
    options = {"key_mask": valid, "attn_mask": mask}
    poisoned = [x.detach().masked_fill(hidden, poison).requires_grad_() for x in (key, value)]
    equal(run([query, *poisoned], options), run([query, key, value], options))


def test_heads_that_share_a_pass_have_the_bits_of_each():
    query, key, value = (x.detach() for x in qkv((2, 4, 2, 2, 200, 24, 16)))
    options = {"key_mask": torch.rand(2, 200) < 0.7, "is_causal": True, "query_start": 150}
    together = run([x.requires_grad_() for x in (query, key, value)], options)[0]
    for head in range(4):
        some = [query[:, head : head + 1], *(x[:, head // 2 : head // 2 + 1] for x in (key, value))]
        equal(together[:, head : head + 1], run(some, options)[0])


# As many would not be if the weights' scores were formed in another order than those of the softmax.
@pytest.mark.parametrize("queries", [1, 4, 5])
def test_weights_of_huge_scores_sum_to_one(queries):
    query, key, value = qkv((2, 2, 1, queries, 150, 64, 8))
    weights = ops.attention(query, key, value, scale=1e4, return_weights=True, impl="native")[1]
    equal(weights.detach().sum(-1), torch.ones(2, 2, queries))


@pytest.mark.parametrize("options", NOTHING_ALLOWED.values(), ids=NOTHING_ALLOWED.keys())
def test_queries_without_keys_give_zero_and_zero_gradients(options):
    inputs = qkv()
    for result in run(inputs, options):
        equal(result, torch.zeros_like(result))
    sinks = torch.randn(2, requires_grad=True)
    output, lse = ops.attention(*inputs, **options, sinks=sinks, return_lse=True, impl="native")
    assert not output.any()
    equal(lse, sinks[:, None].expand_as(lse))
    equal(torch.autograd.grad(lse.sum(), sinks)[0], torch.full_like(sinks, 80))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_strides_change_nothing(view):
    inputs = qkv()
    bias, cotangent = torch.randn(2, 1, 40, 70), torch.randn(2, 2, 40, 24)
    found = []
    for change in (lambda x: x, view):
        changed = [change(x.detach()).requires_grad_() for x in (*inputs, bias)]
        output = ops.attention(*changed, impl="native", dropout_p=0.2, seed=SEED)
        found.append([output, *torch.autograd.grad(output, changed, change(cotangent))])
    equal(*found)


@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (0, 2), (1, 2), (3,), (4,), (5,)], ids=str)
def test_only_wanted_gradients_are_computed(subset):
    rules = {"sinks": True, "relative_bias": 5}
    tensors = make(Problem((2, 2, 1, 33, 40, 16, 16), rules, ("float", (1, 2, 33, 40))), CPU, torch.float32)
    expected = results(tensors, "native", torch.float32, with_lse=False)
    some = {name: x.detach().requires_grad_(place in subset) for place, (name, x) in enumerate(tensors.inputs.items())}
    attend(tensors, some, "native")[0].backward(tensors.cotangents[0])
    for name, x in some.items():
        assert (x.grad is None) == (not x.requires_grad)
        if x.requires_grad:
            equal(x.grad, expected[f"d{name}"])


@pytest.mark.parametrize("learnt", [torch.float16, torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_biases_and_sinks_of_any_dtype(learnt):
    rules = {"sinks": True, "relative_bias": 5}
    tensors = make(Problem((2, 2, 2, 33, 40, 16, 16), rules, ("float", (1, 2, 33, 40))), CPU, torch.bfloat16)
    values = {name: tensors.inputs[name] for name in ("bias", *rules)}
    found = []
    for impl, dtype, wide in (
        ("native", torch.bfloat16, learnt),
        ("reference", torch.float64, torch.float64),
        ("reference", torch.bfloat16, learnt),
    ):
        inputs = {name: x.to(wide if name in values else dtype).requires_grad_() for name, x in tensors.inputs.items()}
        output, _ = attend(tensors, inputs, impl)
        loss = (output * tensors.cotangents[0].to(output.dtype)).sum()
        found.append([output.detach(), *torch.autograd.grad(loss, list(inputs.values()))])
    # Gradients are formed from the output as it was rounded, which plain torch's are not.
    rounding = torch.finfo(torch.bfloat16).eps / 2
    for place, (result, truth, plain) in enumerate(zip(*found, strict=True)):
        oracle.assert_matches(result, truth, plain, f"result {place}", rounding if place else 0.0)
    assert [gradient.dtype for gradient in found[0][4:]] == [learnt] * 3


def test_native_draws_the_references_mask():
    query, key, value = torch.zeros(2, 3, 70, 8), torch.zeros(2, 3, 150, 8), torch.zeros(2, 3, 150, 150)
    value[:] = torch.eye(150)
    for instruction_set in native.INSTRUCTION_SETS:
        with native.instruction_set(instruction_set):
            output, weights = ops.attention(
                query, key, value, dropout_p=0.4, seed=SEED, site=3, return_weights=True, impl="native"
            )
        for group in (0, 4):
            kept = oracle.kept_elements(SEED, 0.4, 70, 150, group, 3)
            equal(output.flatten(0, 1)[group] != 0, kept)
            equal(weights.flatten(0, 1)[group] != 0, kept)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_returned_weights_are_those_applied(dropout_p):
    query, key, value = qkv((2, 4, 2, 40, 150, 16, 24))
    mask = torch.rand(2, 1, 40, 150) < 0.6
    mask[0, 0, 3] = False
    lengths = torch.tensor([150, 70])
    options = {"dropout_p": dropout_p, "seed": SEED, "softcap": 2.0, "attn_mask": mask, "key_lengths": lengths}
    output, weights = ops.attention(query, key, value, **options, return_weights=True, impl="native")
    found = [[weights.detach(), *torch.autograd.grad(weights.square().sum(), (query, key), retain_graph=True)]]
    for dtype in (torch.float64, torch.float32):
        some = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        expected = ops.attention(*some, **options, return_weights=True, impl="reference")[1]
        found.append([expected.detach(), *torch.autograd.grad(expected.square().sum(), some[:2])])
    oracle.assert_all_match(*found, ("weights", "query", "key"))
    equal(output, ops.attention(query, key, value, **options, impl="native"))


def test_operators_obey_torch():
    rules = PROBLEMS["everything"].rules | {"key_lengths": [7, 3], "query_start": [1, 0], "relative_bias": 2}
    tensors = make(Problem((2, 2, 1, 5, 7, 16, 24), rules, ("float", (2, 2, 5, 7))), CPU, torch.float32)
    with native.Called() as called:
        attend(tensors, tensors.inputs, "native")
    (arguments,) = (call for name, call in called.calls if name == "tfm_native::attention")
    operators = torch.ops.tfm_native
    torch.library.opcheck(operators.attention.default, arguments)
    output, statistics = operators.attention(*arguments)
    given = output, statistics[0], output, statistics
    for wanted in ([True] * 6, [False, True, False, False, True, False]):
        torch.library.opcheck(operators.attention_backward.default, (*given, wanted, *arguments))
    torch.library.opcheck(operators.attention_weights.default, (statistics, *arguments))
    mask = torch.rand(1, 2, 5, 7) < 0.5
    torch.library.opcheck(operators.attention_mask_bits.default, (mask, arguments[12], 0, 3, None))


def test_compiles_whole():
    torch._dynamo.reset()
    lengths = packing(CPU)
    projected = torch.randn(sum(lengths.query_lengths), 96, requires_grad=True)
    cu_seq, _, longest, _ = lengths.arguments

    def attended(projected):
        heads = split_heads(projected, 3, 2)
        return ops.varlen_attention(*heads, cu_seq, cu_seq, longest, longest, 0.3, True, seed=SEED, impl="native")

    found = []
    for function in (attended, torch.compile(attended, backend="aot_eager", fullgraph=True)):
        output = function(projected)
        found.append([output.detach(), *torch.autograd.grad(output.square().sum(), projected)])
    equal(*found)
    mask = torch.rand(40, 70) < 0.7
    compiled = torch.compile(ops.attention, backend="aot_eager", fullgraph=True)
    options = {"attn_mask": mask, "softcap": 2.0}
    inputs = qkv()
    equal(run(inputs, options, compiled), run(inputs, options))


@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 5, 16, 16), (2, 2, 1, 0, 5, 16, 16), (2, 2, 1, 5, 0, 16, 16)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_empty_inputs(shape, masked):
    inputs = qkv(shape)
    mask = torch.ones(shape[3], shape[4], dtype=torch.bool) if masked else None
    for result, like in zip(run(inputs, {"attn_mask": mask}), (inputs[0], *inputs), strict=True):
        equal(result, torch.zeros_like(like))
