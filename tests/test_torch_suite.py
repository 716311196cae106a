"""How torch_suite.py picks among torch's tests, loads those of other versions, and explains what it loses."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest
import torch
import torch_suite
import torch_suite_plugin
from torch_suite_selection import NAMES, named, reaching

SOURCE = """
from torch.testing._internal.common_pruning import LSTMLayerNormLinearModel, SimpleLinear

class Block(torch.nn.Module):
    def __init__(self):
        self.norm = nn.LayerNorm(8)

def model():
    return Block()

def other():
    return nn.Linear(8, 8)

class TestOne(TestCase):
    def check(self):
        return model()

    def test_direct(self):
        nn.MultiheadAttention(8, 2)

    def test_by_a_function(self):
        model()

    def test_by_a_method(self):
        self.check()

    def test_by_torchs_helper(self):
        LSTMLayerNormLinearModel()

    def test_of_another(self):
        other(), SimpleLinear(), F.layer_norm

class TestTwo(TestCase):
    def test_of_another_class(self):
        self.check()
"""


def test_selection_follows_the_source(tmp_path: Path) -> None:
    path = tmp_path / "test_it.py"
    path.write_text(SOURCE)
    tests = {name for name in reaching(path, NAMES) if name.startswith("test")}
    assert tests == {"test_direct", "test_by_a_function", "test_by_a_method", "test_by_torchs_helper"}


def test_selection_by_whole_names() -> None:
    assert named("test_forward_nn_LayerNorm_cpu_float32", NAMES)
    assert not named("test_forward_nn_LocalResponseNorm_cpu_float32", NAMES)
    assert not named("test_gradgrad_nn_functional_rms_norm_cpu", NAMES)


def test_tests_of_another_version_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "test_it.py"
    path.write_text(
        "from torch.testing import assert_close, gone\n"
        "@gone\ndef kept(): return 5\n"
        "@gone(3, why='x')\ndef kept_too(): return 6\n"
        "found = kept(), kept_too(), [] + gone, bool(gone), [*gone.within]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.testing, "gone", None, raising=False)  # Undoes what is set below.
    monkeypatch.delattr(torch.testing, "gone")
    monkeypatch.setattr(builtins, "__import__", torch_suite_plugin.importing)
    space = {"__file__": str(path), "__name__": "test_it"}
    exec(compile(path.read_text(), path, "exec"), space)
    assert space["found"] == (5, 6, [], False, [])
    assert space["assert_close"] is torch.testing.assert_close


def test_reasons_go_by_names() -> None:
    assert torch_suite.reason("TestTransformersCPU.test_train_with_is_causal_cpu") == torch_suite.CAUSAL
    assert torch_suite.reason("TestQuantizeJitOps.test_layer_norm") == torch_suite.SCRIPT
    assert torch_suite.reason("TestStaticQuantizedModule.test_layer_norm") == ""
