"""torch's own tests of its Transformer classes, run twice: on torch.nn, and with tfm.nn's classes in their place.

    python tests/torch_suite.py FOLDER [FILE ...] [--out tests/torch_suite.json]

FOLDER is `test` in a checkout of torch, of a version near the installed one; its tests need `expecttest` and scipy.
Prints by file how many tests pass and names each that torch passes and tfm does not, with its reason where the
difference is kept on purpose; exits with status 1 where one has none. As a plugin of pytest (`-p torch_suite`), under
TFM_TORCH_SUITE=tfm, this file makes the exchange.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
LIBRARY = os.environ.get("TFM_TORCH_SUITE", "")
NAMES = ("Transformer", "transformer", "MultiheadAttention", "multihead", "multi_head", "Norm", "norm")
OTHER_NORMS = ("Batch", "batch", "Group", "group", "Instance", "instance", "LocalResponse", "local", "weight_norm",
               "spectral", "clip", "linalg", "vector_norm", "normal")  # fmt: skip
SELECTION = f"({' or '.join(NAMES)}) and not ({' or '.join(OTHER_NORMS)})"

# Where torch's tests make the classes, and which of a file's tests (as pytest's -k).
FILES = {
    "nn/test_multihead_attention.py": "",
    "test_transformers.py": "TestTransformers",
    "test_modules.py": SELECTION,
    "test_nn.py": SELECTION,
    "test_nestedtensor.py": SELECTION,
    "test_expanded_weights.py": SELECTION,
    "test_proxy_tensor.py": SELECTION,
    "test_jit.py": SELECTION,
    "test_torch.py": SELECTION,
    "functorch/test_aotdispatch.py": SELECTION,
    "dynamo/test_repros.py": SELECTION,
    "dynamo/test_misc.py": SELECTION,
    "dynamo/test_export.py": SELECTION,
    "export/test_export.py": SELECTION,
    "inductor/test_cpu_repro.py": SELECTION,
    "quantization/core/test_quantized_op.py": SELECTION,
    "quantization/core/test_quantized_module.py": SELECTION,
    "quantization/eager/test_quantize_eager_ptq.py": SELECTION,
    "quantization/fx/test_quantize_fx.py": SELECTION,
}

PADDING = "positions at padding are 0 in a layer's output; torch's are compared there"
CAUSAL = "is_causal=True without a mask means causal; torch refuses it"
FAST_PATH = "asks, by a mock, whether torch's fast path was taken; there is none here"
NESTED = "Transformer does not warn that its encoder cannot use nested tensors, as it never does"
SCRIPT = "torch.jit.script compiles torch's own layers alone: tfm.restore first"
EXACT = "hands torch.ao's class what is exactly torch's; the tables that prepare() uses know tfm's"
# The differences that README names, by patterns of a test's name.
ON_PURPOSE = {
    "test_transformerencoder_batch_first_*": PADDING,
    "test_transformerdecoder": PADDING,
    "test_transformerdecoderlayer": PADDING,
    "test_train_with_is_causal_*": CAUSAL,
    "test_multihead_self_attn_two_masks_fast_path_mock_*": FAST_PATH,
    "test_disable_fastpath_*": FAST_PATH,
    "test_mask_check_fastpath_*": FAST_PATH,
    "test_transformer_bias_is_none_*": NESTED,
    "test_script_*": SCRIPT,
    "test_torchscript_*": SCRIPT,
    "test_transformerencoderlayer_subclass_*": SCRIPT,
    "test_custom_module_multi_head_attention": EXACT,
}


def _kept(test: object) -> object:
    """The decorator that changes nothing."""
    return test


# Helpers that tests of torch 2.4 import at their top and later versions have dropped.
DROPPED = {
    "torch.testing._internal.common_utils": {
        "skipIfMps": _kept,
        "disable_translation_validation_if_dynamic_shapes": _kept,
        "BUILD_WITH_CAFFE2": False,
    },
    "torch.testing._internal.common_nn": {"new_module_tests": []},
    "torch.testing._internal.common_cuda": {"tf32_is_not_fp32": bool},
    "torch.testing._internal.common_mkldnn": {"bf32_on_and_off": lambda *precisions: _kept},
    "torch.testing._internal.jit_metaprogramming_utils": {"additional_module_tests": []},
    "torch.jit.frontend": {"_IS_ASTUNPARSE_INSTALLED": True},
    "torch.export": {"dynamic_dim": None},
    "torch._dynamo.utils": {"CompileProfiler": None},
}


def replace_dropped() -> None:
    """What DROPPED lists, where the installed torch lacks it."""
    for name, helpers in DROPPED.items():
        module = importlib.import_module(name)
        for helper, stand_in in helpers.items():
            if not hasattr(module, helper):
                setattr(module, helper, stand_in)


def exchange() -> None:
    """tfm.nn's classes under torch.nn's names, wherever torch keeps those."""
    from torch.nn.modules import activation, normalization, transformer

    from tfm.patching.swap import PAIRS

    for theirs, ours in PAIRS.items():
        for module in (torch.nn, torch.nn.modules, activation, normalization, transformer):
            if getattr(module, theirs.__name__, None) is theirs:
                setattr(module, theirs.__name__, ours)


if LIBRARY == "tfm":
    exchange()
if LIBRARY:
    replace_dropped()


def outcomes(folder: Path, file: str, selection: str, library: str, timeout: int) -> dict[str, str]:
    """What became of each test of `file`, on `library`: "passed", "skipped", or the first line of its failure."""
    paths = [str(path) for path in (ROOT, ROOT / "tests", folder, (folder / file).parent)]
    environment = os.environ | {"TFM_TORCH_SUITE": library, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as scratch:
        record, output = Path(scratch, "record.xml"), Path(scratch, "output.txt")
        command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "torch_suite", "-p", "no:cacheprovider"]
        command += ["-o", "addopts=", f"--rootdir={folder}", f"--junitxml={record}", "-W", "ignore"]
        command += ["-k", selection] if selection else []
        with output.open("w") as stream:
            where = {"cwd": folder, "env": environment, "stdout": stream, "stderr": stream}
            try:
                subprocess.run([*command, file], **where, timeout=timeout, check=False)
            except subprocess.TimeoutExpired:
                return {file: f"not done within {timeout} seconds"}
        if not record.exists():
            return {file: output.read_text().strip().splitlines()[-1]}
        cases = ElementTree.parse(record).getroot().iter("testcase")
        return {f"{str(case.get('classname')).split('.')[-1]}.{case.get('name')}": _outcome(case) for case in cases}


def _outcome(case: ElementTree.Element) -> str:
    for kind in ("failure", "error"):
        found = case.find(kind)
        if found is not None:
            return (found.get("message") or kind).strip().splitlines()[0]
    return "passed" if case.find("skipped") is None else "skipped"


def reason(test: str) -> str:
    """Why `test` is lost on purpose; empty where it is not."""
    name = test.split(".")[-1]
    return next((words for pattern, words in ON_PURPOSE.items() if fnmatch.fnmatchcase(name, pattern)), "")


def compare(file: str, theirs: dict[str, str], ours: dict[str, str]) -> dict[str, object]:
    """A file's row of the table, printed: the counts, and the tests that torch alone passes."""
    passed = [name for name, outcome in theirs.items() if outcome == "passed"]
    kept = sum(outcome == "passed" for outcome in ours.values())
    print(f"{file}: {len(theirs)} tests, torch passes {len(passed)}, tfm {kept}", flush=True)
    lost = {}
    for name in passed:
        if ours.get(name) != "passed":
            lost[name] = {"reason": reason(name), "failure": ours.get(name, "it did not run")[:200]}
            print(f"    {name}: {lost[name]['reason'] or '! ' + lost[name]['failure']}", flush=True)
    return {"tests": len(theirs), "torch": len(passed), "tfm": kept, "lost": lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="`test` in a checkout of torch")
    parser.add_argument("files", nargs="*", help="some of its files; all that are known here if none is named")
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds a file and library")
    options = parser.parse_args()
    folder = options.folder.resolve()
    version = (folder.parent / "version.txt").read_text().strip()
    rows = {}
    for file in options.files or FILES:
        selection = FILES.get(file, SELECTION)
        theirs, ours = (outcomes(folder, file, selection, library, options.timeout) for library in ("torch", "tfm"))
        rows[file] = compare(file, theirs, ours)
        if options.out:
            table = {"torch": torch.__version__, "tests of torch": version, "files": rows}
            options.out.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    sys.exit(any(not case["reason"] for row in rows.values() for case in row["lost"].values()))


if __name__ == "__main__":
    main()
