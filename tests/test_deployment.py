"""An accelerated model leaves tfm as torch's does: torch.fx, TorchScript, torch.export and ONNX, for any batch."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tfm

DIM, HEADS = 16, 2
SIZES = ((3, 5, 7), (2, 9, 4), (6, 12, 30))
NAMES = ("source", "target", "source_padding", "target_padding", "mask")
# Loads what was saved where there is no tfm, and holds it against what was computed where there is.
ELSEWHERE = """
import sys
import torch
sys.modules["tfm"] = sys.modules["tfm_native"] = None
load = torch.jit.load if sys.argv[1] == "trace" else lambda file: torch.export.load(file).module()
model = load(sys.argv[2])
for inputs, expected in torch.load(sys.argv[3]):
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-5)
"""


class Translator(torch.nn.Module):
    """As a user writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = torch.nn.Transformer(DIM, HEADS, 1, 1, 24, batch_first=True)
        self.attention = torch.nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.norm = torch.nn.LayerNorm(DIM)

    def forward(
        self, source: Tensor, target: Tensor, source_padding: Tensor, target_padding: Tensor, mask: Tensor
    ) -> Tensor:
        x = self.transformer(
            source, target, tgt_mask=mask, src_key_padding_mask=source_padding, tgt_key_padding_mask=target_padding,
            memory_key_padding_mask=source_padding,
        )  # fmt: skip
        attended, _ = self.attention(x, x, x, key_padding_mask=target_padding)
        return self.norm(x + attended)


def translator() -> Translator:
    torch.manual_seed(3)
    model = Translator().eval()
    tfm.accelerate(model)
    return model


def inputs(batch: int, sources: int, targets: int) -> tuple[Tensor, ...]:
    """The last sentence has no source at all: its targets attend to nothing."""
    lengths = [*(sources - place for place in range(batch - 1)), 0]
    source_padding = torch.arange(sources) >= torch.tensor(lengths)[:, None]
    target_padding = torch.arange(targets) >= torch.tensor([targets - place for place in range(batch)])[:, None]
    mask = torch.ones(targets, targets, dtype=torch.bool).triu(1)
    return torch.randn(batch, sources, DIM), torch.randn(batch, targets, DIM), source_padding, target_padding, mask


def dynamic() -> dict[str, dict[int, torch.export.Dim]]:
    batch, sources, targets = (torch.export.Dim(name) for name in ("batch", "sources", "targets"))
    dims = ((batch, sources), (batch, targets), (batch, sources), (batch, targets), (targets, targets))
    return {name: dict(enumerate(pair)) for name, pair in zip(NAMES, dims, strict=True)}


def check(deployed: Callable[..., Tensor]) -> None:
    model = translator()
    for size in SIZES:
        given = inputs(*size)
        with torch.no_grad():
            torch.testing.assert_close(deployed(*given), model(*given), rtol=1e-4, atol=1e-5)


def check_elsewhere(kind: str, file: Path) -> None:
    model, expected = translator(), file.with_suffix(".expected")
    with torch.no_grad():
        torch.save([(given, model(*given)) for given in (inputs(*size) for size in SIZES)], expected)
    run = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, kind, str(file), str(expected)]
    subprocess.run(run, cwd=file.parent, check=True)


def test_fx_takes_modules_for_leaves_as_torchs_are() -> None:
    traced = torch.fx.symbolic_trace(translator())
    leaves = [type(traced.get_submodule(node.target)) for node in traced.graph.nodes if node.op == "call_module"]
    assert leaves == [tfm.nn.Transformer, tfm.nn.MultiheadAttention, tfm.nn.LayerNorm]
    check(traced)


def test_fx_looks_inside_the_root_as_into_torchs() -> None:
    norm = tfm.nn.LayerNorm(DIM)
    x = torch.randn(3, DIM)
    traced = torch.fx.symbolic_trace(norm)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [
        torch.nn.functional.layer_norm
    ]
    torch.testing.assert_close(traced(x), norm(x))


@pytest.mark.parametrize("differentiates", [False, True])
def test_a_trace_runs_without_tfm(differentiates: bool, tmp_path: Path) -> None:
    with torch.set_grad_enabled(differentiates), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(translator(), inputs(*SIZES[0]), check_trace=False)
        torch.jit.save(traced, tmp_path / "translator.pt")
    check(traced)
    check_elsewhere("trace", tmp_path / "translator.pt")


def test_a_trace_in_training_draws_anew() -> None:
    layer = tfm.nn.TransformerEncoderLayer(DIM, HEADS, 24, 0.5, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, torch.randn(2, 3, DIM), check_trace=False)
    x = torch.randn(4, 5, DIM)
    torch.manual_seed(1)
    first, second = traced(x), traced(x)
    torch.manual_seed(1)
    assert torch.equal(traced(x), first)
    assert not torch.allclose(first, second)
    assert not any("tfm" in node.kind() for node in traced.inlined_graph.nodes())


def test_a_trace_refuses_kernels_asked_for_by_name() -> None:
    norm = tfm.nn.LayerNorm(DIM)
    with tfm.use("native"), pytest.raises(ValueError, match=r"native.*a trace holds torch's own operations alone"):
        torch.jit.trace(norm, torch.randn(3, DIM), check_trace=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_says_what_to_do_instead() -> None:
    model = translator()
    with pytest.raises(RuntimeError, match=r"tfm\.nn\.Transformer.* tfm\.restore\(model\)"):
        torch.jit.script(model)
    encoder = torch.nn.Sequential(model.transformer.encoder.layers[0])
    tfm.restore(encoder)
    torch.jit.script(encoder)


@pytest.mark.parametrize("strict", [True, pytest.param(False, marks=pytest.mark.long)])
def test_an_export_keeps_the_kernels(strict: bool) -> None:
    program = torch.export.export(translator(), inputs(*SIZES[0]), dynamic_shapes=dynamic(), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    check(torch.export.load(file).module())


@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.long), False])
def test_an_export_of_the_reference_runs_without_tfm(strict: bool, tmp_path: Path) -> None:
    with tfm.use("reference"):
        program = torch.export.export(translator(), inputs(*SIZES[0]), dynamic_shapes=dynamic(), strict=strict)
    assert "tfm" not in str(program.graph)
    torch.export.save(program, tmp_path / "translator.pt2")
    check_elsewhere("export", tmp_path / "translator.pt2")


def test_an_export_of_the_reference_in_training_draws_anew() -> None:
    layer = tfm.nn.TransformerEncoderLayer(DIM, HEADS, 24, 0.5, batch_first=True)
    with tfm.use("reference"):
        program = torch.export.export(layer, (torch.randn(2, 3, DIM),))
    assert not any(str(node.target).startswith("tfm") for node in program.graph.nodes)
    exported, x = program.module(), torch.randn(2, 3, DIM)
    assert not torch.allclose(exported(x), exported(x))


def test_onnx_runs_without_torch() -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            translator(), inputs(*SIZES[0]), dynamo=True, dynamic_shapes=dynamic(), verbose=False
        )
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    names = [given.name for given in session.get_inputs()]

    def run(*tensors: Tensor) -> Tensor:
        found = session.run(None, {name: x.numpy() for name, x in zip(names, tensors, strict=True)})
        return torch.from_numpy(found[0])

    check(run)
