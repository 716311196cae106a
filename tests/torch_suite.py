"""torch's own tests of its Transformer classes, run twice: on torch.nn, and with tfm.nn's classes in their place.

    python tests/torch_suite.py FOLDER [FILE ...] [--out tests/torch_suite.json]

FOLDER is `test` in a checkout of torch, of a version near the installed one; its tests need `expecttest` and scipy.
Prints by file how many tests pass and names each that torch passes and tfm does not, with its reason where the
difference is kept on purpose; exits with status 1 where one has none. The table that --out names keeps its rows of
other files.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent

# Where torch's tests make the classes.
FILES = (
    "nn/test_multihead_attention.py",
    "test_transformers.py",
    "test_modules.py",
    "test_nn.py",
    "test_nestedtensor.py",
    "test_expanded_weights.py",
    "test_proxy_tensor.py",
    "test_jit.py",
    "test_jit_fuser.py",
    "test_fx_experimental.py",
    "test_torch.py",
    "functorch/test_aotdispatch.py",
    "dynamo/test_repros.py",
    "dynamo/test_misc.py",
    "dynamo/test_export.py",
    "export/test_export.py",
    "export/test_export_nonstrict.py",
    "export/test_unflatten.py",
    "inductor/test_torchinductor.py",
    "inductor/test_cpu_repro.py",
    "inductor/test_aot_inductor.py",
    "inductor/test_perf.py",
    "onnx/test_utility_funs.py",
    "onnx/test_pytorch_onnx_no_runtime.py",
    "package/test_dependency_api.py",
    "ao/sparsity/test_structured_sparsifier.py",
    "quantization/core/test_quantized_op.py",
    "quantization/core/test_quantized_module.py",
    "quantization/eager/test_quantize_eager_ptq.py",
    "quantization/fx/test_quantize_fx.py",
    "quantization/jit/test_quantize_jit.py",
)

# pytest's: all passed, some failed, some could not be collected, none selected.
ENDINGS = (0, 1, 2, 5)

PADDING = "positions at padding are 0 in a layer's output; torch's are compared there"
CAUSAL = "is_causal=True without a mask means causal; torch refuses it"
FAST_PATH = "asks, by a mock, whether torch's fast path was taken; there is none here"
NESTED = "Transformer does not warn that its encoder cannot use nested tensors, as it never does"
SCRIPT = "torch.jit.script compiles torch's own layers alone: tfm.restore first"
EXACT = "hands torch.ao's class what is exactly torch's; the tables that prepare() uses know tfm's"
FALLBACKS = "forbids Inductor's implicit fallbacks, and with them every operator that is not torch's"
PACKAGE = "packages the source of all but torch; tfm, whose kernels are no Python source, is to be extern"
SIGN = "takes the sign of the sum of a norm's output, 0 but for rounding, which eager and traced calls do differently"
# The differences that README names, and what torch's machinery asks of its own alone, by patterns of a test's name,
# its class before it where the name is a common one.
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
    "TestQuantizeJitOps.test_layer_norm": SCRIPT,
    "CpuTests.test_layer_norm_cpu": FALLBACKS,
    "test_inplace_squeeze_needed": FALLBACKS,
    "test_externing_c_extension": PACKAGE,
    "test_aot_autograd_*module_exhaustive_nn_Transformer*": SIGN,
}


def outcomes(folder: Path, file: str, library: str, timeout: int, seconds: int) -> dict[str, str]:
    """What became of each test of `file`, on `library`: "passed", "skipped", or the first line of its failure."""
    paths = [str(path) for path in (ROOT, ROOT / "tests", folder, (folder / file).parent)]
    with tempfile.TemporaryDirectory() as scratch:
        record, output = Path(scratch, "record"), Path(scratch, "output")
        record.touch()
        wishes = {"TFM_TORCH_SUITE": library, "TFM_TORCH_SUITE_RECORD": str(record)}
        wishes |= {"TFM_TORCH_SUITE_SECONDS": str(seconds), "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "torch_suite_plugin"]
        command += ["-p", "no:cacheprovider", "-o", "addopts=", f"--rootdir={folder}", "-W", "ignore", file]
        with output.open("w") as stream:
            where = {"cwd": folder, "env": os.environ | wishes, "stdout": stream, "stderr": stream}
            try:
                ended = subprocess.run(command, **where, timeout=timeout, check=False).returncode
                cut = "" if ended in ENDINGS else f"ended with status {ended}: {output.read_text()[-200:]}"
            except subprocess.TimeoutExpired:
                cut = f"not done within {timeout} seconds"
        found: dict[str, str] = {file: cut} if cut else {}
        for name, outcome in map(json.loads, record.read_text().splitlines()):
            if found.get(name, "passed") in ("passed", "skipped"):
                found[name] = outcome
        return found


def reason(test: str) -> str:
    """Why `test`, in the form "Class.name", is lost on purpose; empty where it is not."""
    for pattern, words in ON_PURPOSE.items():
        if fnmatch.fnmatchcase(test, pattern if "." in pattern else f"*.{pattern}"):
            return words
    return ""


def compare(file: str, theirs: dict[str, str], ours: dict[str, str]) -> dict[str, object]:
    """A file's row of the table, printed: the counts, and the tests that torch alone passes."""
    passed = [name for name, outcome in theirs.items() if outcome == "passed"]
    kept = sum(outcome == "passed" for outcome in ours.values())
    row: dict[str, object] = {"tests": len(theirs), "torch": len(passed), "tfm": kept}
    print(f"{file}: {len(theirs)} tests, torch passes {len(passed)}, tfm {kept}", flush=True)
    if not passed:
        row["why"] = next(iter(theirs.values()), "no test of the classes")[:200]
        print(f"    torch: {row['why']}", flush=True)
    lost = row["lost"] = {}
    for name in passed:
        if ours.get(name) != "passed":
            lost[name] = {"reason": reason(name), "failure": ours.get(name, "it did not run")[:200]}
            print(f"    {name}: {lost[name]['reason'] or '! ' + lost[name]['failure']}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="`test` in a checkout of torch")
    parser.add_argument("files", nargs="*", help="some of its files; all that are known here if none is named")
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds a file and library")
    parser.add_argument("--test-timeout", type=int, default=300, help="seconds a test")
    options = parser.parse_args()
    folder = options.folder.resolve()
    version = (folder.parent / "version.txt").read_text().strip()
    table = json.loads(options.out.read_text()) if options.out and options.out.exists() else {"files": {}}
    unexplained = False
    for file in options.files or FILES:
        limits = options.timeout, options.test_timeout
        theirs, ours = (outcomes(folder, file, library, *limits) for library in ("torch", "tfm"))
        row = compare(file, theirs, ours)
        unexplained |= any(not case["reason"] for case in row["lost"].values())
        table["files"][file] = {"torch": torch.__version__, "tests of torch": version} | row
        if options.out:
            options.out.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    sys.exit(unexplained)


if __name__ == "__main__":
    main()
