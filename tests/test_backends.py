"""The choice of a backend: by the table, by name, for a block; and every operation as one graph."""

from __future__ import annotations

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from operation_samples import BROUGHT

from tfm import ops
from tfm.operators.declaration import FLOATS
from tfm.ops import backends
from tfm.ops.backends import Row, choose, use

X = torch.randn(4, 6)
CPU_NEEDS = r"CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported"


@pytest.fixture
def uninterpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def square(*shape):
    return torch.randn(*shape, requires_grad=True)


def calls():
    """(name, function of impl) for each operation; the inputs are made on the first call of each."""
    q, kv = square(2, 4, 5, 3), square(2, 2, 7, 3)
    packed, cu_seq = square(6, 2, 3), torch.tensor([0, 2, 6], dtype=torch.int32)
    x, weight, vector = square(5, 8), square(8, 8), square(8)
    tokens = torch.randint(8, (2, 5))
    lengths = torch.tensor([3, 7])
    tables = ops.rotary_table(5, 2)
    decoding = *torch.randn(2, 2, 7, 2, 3), lengths.int()
    latest = dict(zip(("key", "value"), torch.randn(2, 2, 2, 3), strict=True))
    drop = {"dropout_p": 0.5, "seed": 1}
    return {
        "attention": lambda **o: ops.attention(q, kv, kv, is_causal=True, key_lengths=lengths, **drop, **o),
        "varlen_attention": lambda **o: ops.varlen_attention(packed, packed, packed, cu_seq, cu_seq, 4, 4, **drop, **o),
        "decode_attention": lambda **o: ops.decode_attention(q[:, :, 0].detach(), *decoding, **latest, **o),
        "layer_norm": lambda **o: ops.layer_norm(x, vector, vector, **o),
        "residual_layer_norm": lambda **o: ops.residual_layer_norm(x, x, vector, vector, **drop, **o),
        "rms_norm": lambda **o: ops.rms_norm(x, vector, **o),
        "residual_rms_norm": lambda **o: ops.residual_rms_norm(x, x, vector, **drop, **o),
        "feed_forward": lambda **o: ops.feed_forward(x, weight, vector, weight, vector, "gelu", **drop, **o),
        "gated_feed_forward": lambda **o: ops.gated_feed_forward(x, weight, weight, weight, **drop, **o),
        "linear_activation": lambda **o: ops.linear_activation(x, weight, vector, **drop, **o),
        "linear_cross_entropy": lambda **o: ops.linear_cross_entropy(
            x, weight, tokens.flatten()[:5], linear_bias=vector, weight=vector.detach().exp(), label_smoothing=0.1, **o
        ),
        "rotary": lambda **o: ops.rotary(q, kv[..., :5, :], *tables, **o),
        "rotary_": lambda **o: ops.rotary_(2 * q, 3, *tables, interleaved=True, **o),
        "embedding": lambda **o: ops.embedding(tokens, weight, torch.arange(5), padding_idx=1, **drop, **o),
        **{sample.operation: partial(sample, *sample.leaves()) for sample in BROUGHT},
    }  # fmt: skip


OPERATIONS = list(calls())
# Of inference.
WITHOUT_GRADIENTS = {"decode_attention"}


def tensors(result):
    return result if isinstance(result, tuple) else (result,)


def test_every_public_operation_is_called_here():
    choiceless = {"draw_seed", "dropout", "rotary_table", "sinusoid", "split_heads"}
    biases = {"alibi_bias", "alibi_slopes", "t5_bias"}
    assert set(OPERATIONS) == set(ops.__all__) - choiceless - biases


@pytest.mark.parametrize("name", OPERATIONS)
def test_compiles_into_one_graph(name):
    function = calls()[name]
    with use("reference"):
        expected = tensors(function())
        actual = tensors(torch.compile(function, fullgraph=True, backend="aot_eager")())
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    if name in WITHOUT_GRADIENTS:
        return
    roots = [sum(result.float().sum() for result in results) for results in (actual, expected)]
    leaves = [node for node in _leaves(roots[1].grad_fn) if node.requires_grad]
    assert leaves
    grads = [torch.autograd.grad(root, leaves) for root in roots]
    torch.testing.assert_close(*grads)


def _leaves(node, seen=None) -> list[torch.Tensor]:
    seen = set() if seen is None else seen
    if node is None or node in seen:
        return []
    seen.add(node)
    own = [node.variable] if hasattr(node, "variable") else []
    return own + [leaf for parent, _ in node.next_functions for leaf in _leaves(parent, seen)]


def automatic(function):
    """What serves a CPU: native operators where there are some, else the reference."""
    try:
        function(impl="native")
    except ValueError:
        return "reference"
    return "native"


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_obeys_impl_and_use(name, uninterpreted):
    function = calls()[name]
    for one, other in zip(tensors(function()), tensors(function(impl=automatic(function))), strict=True):
        assert torch.equal(one, other)
    function(impl="reference")
    with pytest.raises(ValueError, match=rf"^{name} cannot run with impl='triton': \w+"):
        function(impl="triton")
    with use("triton"):
        with pytest.raises(ValueError, match=rf"^{name} cannot run with impl='triton': \w+"):
            function()
        function(impl="reference")
    with pytest.raises(ValueError, match=r"^impl: expected one of auto, reference, triton, native, got 'cuda'$"):
        function(impl="cuda")


@pytest.mark.triton
def test_a_request_by_name_gives_its_reason(uninterpreted, monkeypatch):
    with pytest.raises(ValueError, match=rf"^layer_norm cannot run with impl='triton': {CPU_NEEDS}$"):
        choose("layer_norm", "triton", X)
    with pytest.raises(ValueError, match=r": expected one of float32, float16, bfloat16, got float64$"):
        choose("layer_norm", "triton", X.double())
    with pytest.raises(ValueError, match=r": expected at most 32768 columns, got 32769$"):
        choose("layer_norm", "triton", torch.empty(1, 32769))
    with pytest.raises(
        ValueError, match=r"^dropout cannot run with impl='triton': dropout has no backend of that name"
    ):
        choose("dropout", "triton", X)
    with pytest.raises(ValueError, match=r"^embedding cannot run with impl='triton': no kernel reads minds$"):
        choose("embedding", "triton", X, reference_only="no kernel reads minds")
    with pytest.raises(ValueError, match=r": expected CUDA tensors, got meta tensors$"):
        choose("layer_norm", "triton", X.to("meta"))
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    with pytest.raises(ValueError, match=r": triton is not installed$"):
        choose("layer_norm", "triton", X)


def test_the_interpreter_serves_only_those_who_ask(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    assert choose("layer_norm", "triton", X) == "triton"
    assert choose("layer_norm", "auto", X) != "triton"


@pytest.mark.parametrize(
    ("built_for", "capability", "auto", "reason"),
    [
        ("13.0", (9, 0), "triton", None),
        ("13.0", (8, 0), "triton", None),
        ("13.0", (7, 5), "reference", "expected compute capability 8.0 or newer, got 7.5"),
        (None, (9, 4), "reference", "the kernels are for NVIDIA GPUs"),
    ],
)
def test_which_gpus_the_kernels_serve(monkeypatch, built_for, capability, auto, reason):
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    chip = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    row, device = Row(("layer_norm",), "triton", FLOATS, max_columns=8), torch.device("cuda")
    found = backends.why_triton_unavailable(device, automatic=True)
    assert (found == "") == (auto == "triton")
    assert found.startswith(reason or "")
    assert "columns" in backends.why_unavailable(row, torch.empty(2, 9), (), automatic=True)


def test_use_nests_and_is_restored():
    seen = []
    with use("reference"):
        with use("triton"):
            with use("auto"):
                seen.append(backends._forced)
            seen.append(backends._forced)
        seen.append(backends._forced)
    assert [*seen, backends._forced] == [None, "triton", "reference", None]


def test_use_is_restored_after_an_exception():
    with pytest.raises(KeyError), use("triton"), use("reference"):
        raise KeyError
    assert backends._forced is None


def test_use_refuses_unknown_names_before_the_block():
    known = "auto, reference, triton, native"
    with pytest.raises(ValueError, match=rf"^impl: expected one of {known}, got 'numpy'$"), use("numpy"):
        pytest.fail("the block ran")
    assert backends._forced is None


def test_impl_wins_over_use(uninterpreted):
    with use("reference"), pytest.raises(ValueError, match="cannot run with impl='triton'"):
        choose("layer_norm", "triton", X)
    with use("triton"):
        assert choose("layer_norm", "reference", X) == "reference"


def test_compiled_code_follows_use(uninterpreted):
    compiled = torch.compile(lambda x: ops.layer_norm(x), fullgraph=True, backend="aot_eager")
    compiled(X)
    with use("triton"), pytest.raises(Exception, match="cannot run with impl='triton'"):
        compiled(X)
    assert torch.equal(compiled(X), ops.layer_norm(X))


def test_the_suite_runs_kernels_somewhere():
    assert torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1"


def test_functorch_transforms_run_on_the_reference():
    gradient = torch.func.grad(lambda x: ops.layer_norm(x).square().sum())(X)
    leaf = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ops.layer_norm(leaf, impl="reference").square().sum(), leaf)
    assert torch.equal(gradient, expected)
    with pytest.raises(ValueError, match=r"transforms and .+ need operations of torch's own"):
        torch.func.grad(lambda x: ops.layer_norm(x, impl="native").sum())(X)
