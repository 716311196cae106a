"""Attention of any length: the Triton kernels as torch's autograd, dispatcher and compiler see them."""

from __future__ import annotations

import launches
import pytest
import torch
from attention_cases import (
    PROBLEMS,
    SEED,
    Problem,
    attend,
    make,
    packing,
)
from long_attention import FORWARD, KEYS, QUERIES, equal, kernels_of_any_length, qkv, run
from native import Called
from oracle import HALVES
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tfm import ops
from tfm.kernels.launch.attention import short
from tfm.kernels.launch.attention.short import short_attention_backward
from tfm.operators.attention import Attention, AttentionBackward

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


@pytest.fixture(autouse=True)
def _kernels_of_any_length():
    with kernels_of_any_length():
        yield


@pytest.fixture
def launched(monkeypatch):
    return launches.watch(monkeypatch)


def test_operators_obey_torch(kernel_device):
    rules = PROBLEMS["everything"].rules | {"key_lengths": [7, 3], "query_start": [1, 0], "relative_bias": 2}
    tensors = make(Problem((2, 2, 1, 5, 7, 16, 24), rules, ("float", (2, 2, 5, 7))), kernel_device, torch.float32)
    inputs = [x.detach().requires_grad_() for x in tensors.inputs.values()]
    with Called() as called:
        attend(tensors, dict(zip(tensors.inputs, inputs, strict=True)), "triton")
    (given,) = (call for name, call in called.calls if name == "tfm::attention")
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in given]
    torch.library.opcheck(torch.ops.tfm.attention.default, tuple(arguments))
    output, statistics = torch.ops.tfm.attention(*arguments)
    for wanted in ([True] * 6, [False, True, False, False, True, False]):
        backward = (output, statistics[0], output, statistics, wanted, *arguments)
        torch.library.opcheck(torch.ops.tfm.attention_backward.default, backward)
    torch.library.opcheck(torch.ops.tfm.attention_weights.default, (statistics, *arguments))
    mask = torch.rand(1, 2, 5, 7, device=kernel_device) < 0.5
    starts = arguments[12]
    torch.library.opcheck(torch.ops.tfm.attention_mask_bits.default, (mask, starts, 0, 3, None))


@pytest.mark.parametrize("is_short", [False, True], ids=["long", "short"])
def test_statistics_of_other_strides_give_the_same(is_short, kernel_device, monkeypatch):
    """Kernels know how the forward lays its statistics out; whoever lays them otherwise gets no other numbers."""
    if is_short:
        monkeypatch.setattr(short, "short_attention_backward", short_attention_backward)
    inputs = [x.detach() for x in qkv(kernel_device, (2, 2, 1, 9, 40, 16, 16))]
    call = Attention(*inputs, *[None] * 11, 9, 40, 0, None, None, 0.25, None, 0.0, 0)
    output, statistics = torch.ops.tfm.attention(*call)
    other = statistics.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert other.stride() != statistics.stride()
    found = []
    for numbers in (statistics, other):
        wanted = [True, True, True, False, False, False]
        backward = AttentionBackward(torch.ones_like(output), None, output, numbers, wanted, *call)
        weights = torch.ops.tfm.attention_weights(numbers, *call)
        found.append([*torch.ops.tfm.attention_backward(*backward)[:3], weights])
    equal(*found)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend, kernel_device, launched):
    inputs = [x.detach().requires_grad_() for x in qkv(kernel_device)]
    bias = torch.randn(1, 2, 40, 70, device=kernel_device)
    mask = torch.rand(40, 70, device=kernel_device) < 0.7
    lengths = torch.tensor([70, 33], device=kernel_device)
    for options in (
        {"attn_mask": bias, "key_lengths": lengths, "dropout_p": 0.3, "seed": SEED},
        {"attn_mask": mask, "is_causal": True, "softcap": 2.0},
    ):
        torch._dynamo.reset()
        compiled = torch.compile(ops.attention, backend=backend, fullgraph=True)
        expected = run(inputs, options)
        watched = list(launched)
        launched.clear()
        equal(run(inputs, options, compiled), expected)
        assert launched == watched
        launched.clear()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_packed_compiles_whole(backend, kernel_device):
    torch._dynamo.reset()
    lengths = packing(kernel_device)
    inputs = [torch.randn(sum(lengths.query_lengths), 2, 16, device=kernel_device).requires_grad_() for _ in range(3)]
    cu_seq, _, longest, _ = lengths.arguments
    packed = [*inputs, cu_seq, cu_seq, longest, longest]
    options = {"is_causal": True, "dropout_p": 0.3, "seed": SEED}
    compiled = torch.compile(ops.varlen_attention, backend=backend, fullgraph=True)
    equal(run(packed, options, compiled), run(packed, options, ops.varlen_attention))


def test_checkpoint_draws_the_same_mask(kernel_device, launched):
    inputs = qkv(kernel_device)
    found = []
    for wrapped in (ops.attention, lambda *x, **o: checkpoint(ops.attention, *x, use_reentrant=False, **o)):
        torch.manual_seed(1)
        found.append(run(inputs, {"dropout_p": 0.5}, wrapped))
    equal(*found)
    assert launched == FORWARD + QUERIES + KEYS + FORWARD + FORWARD + QUERIES + KEYS


@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 5, 16, 16), (2, 2, 1, 0, 5, 16, 16), (2, 2, 1, 5, 0, 16, 16)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_empty_inputs(shape, masked, kernel_device):
    inputs = qkv(kernel_device, shape)
    mask = torch.ones(shape[3], shape[4], dtype=torch.bool, device=kernel_device) if masked else None
    for result, like in zip(run(inputs, {"attn_mask": mask}), (inputs[0], *inputs), strict=True):
        assert torch.equal(result, torch.zeros_like(like))


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_autocast_rounds_the_inputs_alone(half, kernel_device):
    query, key, value = qkv(kernel_device)
    with torch.autocast(kernel_device.type, half):
        output = ops.attention(query, key, value, impl="triton")
    equal(output, ops.attention(query.to(half), key.to(half), value.to(half), impl="triton"))


def test_explicit_triton_says_why_not(kernel_device):
    query, key, value = qkv(kernel_device)
    with pytest.raises(ValueError, match=r"^attention cannot run with impl='triton': .*got float64$"):
        ops.attention(query.double(), key.double(), value.double(), impl="triton")
    wide = torch.zeros(1, 1, 2, 513, device=kernel_device)
    with pytest.raises(ValueError, match="expected at most 512 columns, got 513"):
        ops.attention(wide[..., :8], wide[..., :8], wide, impl="triton")
    offsets = torch.tensor([0, 2], dtype=torch.int32, device=kernel_device)
    with pytest.raises(ValueError, match=r"^varlen_attention cannot run with impl='triton': .*got 513$"):
        ops.varlen_attention(*[wide[0].transpose(0, 1)] * 3, offsets, offsets, 2, 2, impl="triton")


def test_transforms_are_refused(kernel_device):
    query, key, value = qkv(kernel_device, (1, 1, 1, 3, 3, 16, 16))
    function = lambda query: ops.attention(query, key, value, impl="triton")  # noqa: E731
    with pytest.raises(ValueError, match=r"^attention cannot run with impl='triton': transforms and forward-mode"):
        torch.vmap(function)(query[None])
    with forward_ad.dual_level(), pytest.raises(ValueError, match="transforms and forward-mode"):
        function(forward_ad.make_dual(query.detach(), query.detach()))
