"""The pass that compute-sanitizer watches leaves no kernel out, Triton's or csrc's."""

from __future__ import annotations

import re

import emulated
import launches
import torch
from native import Called

from tfm.operators.declaration import FLOATS
from tools.check_kernels.compiled import CASES, cases_of
from tools.interpreter import reached
from tools.sanitize import every_kernel, interpreter

CUDA = emulated.ROOT / "csrc" / "cuda"


def test_every_kernel_of_triton_is_launched(kernel_device, monkeypatch):
    launched = launches.watch(monkeypatch)
    for operation, dtypes in every_kernel.served("triton", kernel_device).items():
        every_kernel.run("triton", operation, kernel_device, dtypes[-1])
    assert {case.kernel.fn.__name__ for case in cases_of(CASES, every=False)} <= set(launched)
    assert reached.launched(interpreter.KERNELS) == set(launched)


def test_triton_passes_in_every_dtype():
    for device in ("cpu", "cuda"):
        assert set(every_kernel.served("triton", torch.device(device)).values()) == {FLOATS}


def test_every_operator_of_csrc_is_called_as_a_gpu_takes_it(cuda_device, monkeypatch):
    served = every_kernel.served("native", torch.device("cuda"))
    assert served["attention"] == (torch.float16, torch.bfloat16)
    assert served["layer_norm"] == FLOATS
    for source in sorted(CUDA.rglob("*.cu")):
        operators = emulated.operators(str(source.relative_to(CUDA).with_suffix("")), cuda_device, monkeypatch)
    # A CPU stands for the GPU, so the problems must be those of one.
    given = every_kernel.Tensors
    monkeypatch.setattr(every_kernel, "Tensors", lambda device, dtype, short: given(device, dtype, short=True))
    with Called() as called:
        for operation, dtypes in served.items():
            every_kernel.run("native", operation, cuda_device, dtypes[-1])
    implemented = re.compile(r'(?:m\.impl\("|implement<arguments::\w+, )(\w+)')
    names = {name for source in CUDA.rglob("*.cu") for name in implemented.findall(source.read_text())}
    # Its kernel is also linear_activation's.
    names.remove("activation_dropout")
    assert {f"{operators.name}::{name}" for name in names} <= called.names


def test_a_backend_that_is_missing_is_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(every_kernel.JOURNAL, str(tmp_path / "journal.jsonl"))
    monkeypatch.setattr(every_kernel.native, "why_unavailable", lambda device: "tfm_native is built without CUDA")
    monkeypatch.setattr(every_kernel, "run", lambda *_: None)
    every_kernel.main(["rms_norm"])
    assert capsys.readouterr().out.splitlines()[-1] == "missing: native: tfm_native is built without CUDA"
    assert '{"missing": "native: tfm_native is built without CUDA"}' in (tmp_path / "journal.jsonl").read_text()
