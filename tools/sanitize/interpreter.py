"""Every Triton kernel under the memory checker, in each dtype: a part of `make sanitize`.

    TRITON_INTERPRET=1 python -m tools.sanitize.interpreter [OPERATION ...]

Runs tools.sanitize.every_kernel, several operations at a time, and prints a line for each kernel, then what was found.
Exit status 1 where something was, where a kernel was never launched, or where an access in a kernel's source was never
come to, since it is not checked then, unless UNREACHABLE says why; 2 where kernels cannot be interpreted here.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from os import sched_getaffinity
from pathlib import Path

import torch

from benchmarks.progress import say
from tools import interpreter
from tools.interpreter import memory, reached
from tools.interpreter.findings import Findings, Place, from_root
from tools.sanitize import every_kernel

KERNELS = sorted((Path(__file__).parents[2] / "kernels").rglob("*.py"))
# Accesses that no call of an operation reaches: file, how they begin, why.
UNREACHABLE = {
    ("kernels/attention/backward_keys.py", "tl.load(upper + 2"): "no launch row has more queries here than for dq",
    ("kernels/attention/mask_bits.py", "allowed_tile("): "it has no words yet",
}
CPU = torch.device("cpu")
SEED = 20170612


def check(operation: str, dtype: torch.dtype) -> tuple[Findings, dict[str, memory.Checked]]:
    """Checks one operation's kernels; returns what was found, and what was checked of each."""
    interpreter.mend()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of NaN and infinities, which kernels expect.
    with memory.checked() as checker:
        every_kernel.run("triton", operation, CPU, dtype)
    return checker.findings, dict(checker.kernels)


def check_all(only: Sequence[str] = ()) -> tuple[Findings, dict[str, memory.Checked]]:
    """Checks every operation whose name contains one of `only`, or all, in the same way."""
    jobs = [
        (operation, dtype)
        for operation, dtypes in every_kernel.served("triton", CPU).items()
        if not only or any(name in operation for name in only)
        for dtype in sorted({torch.float32, *dtypes}, key=str)
    ]
    findings, kernels = Findings(), defaultdict[str, memory.Checked](memory.Checked)
    with ProcessPoolExecutor(len(sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        running = {pool.submit(check, *job): job for job in jobs}
        for done, future in enumerate(as_completed(running), 1):
            operation, dtype = running[future]
            found, checked = future.result()
            say(f"{done}/{len(jobs)} {operation} {str(dtype).removeprefix('torch.')}: {len(found)} findings")
            for finding in found:
                findings.add(finding)
            for kernel, part in checked.items():
                kernels[kernel] += part
    return findings, kernels


def main(only: Sequence[str]) -> int:
    if reason := every_kernel.missing("triton", CPU):
        print(f"not run: {reason}")
        return 2
    findings, kernels = check_all(only)
    print(f"{'kernel':38} launches  programs  elements  findings")
    for kernel, checked in sorted(kernels.items()):
        found = sum(finding.kernel == kernel for finding in findings)
        print(f"{kernel:38} {checked.launches:8}  {checked.programs:8}  {checked.elements:8}  {found:8}")
    lines = [str(finding) for finding in findings]
    if not only:
        lines += [f"never launched: {kernel}" for kernel in sorted(reached.launched(KERNELS) - kernels.keys())]
        lines += _unreached({place for checked in kernels.values() for place in checked.places})
    print(
        "\n".join(lines or ["clean: no access out of bounds, unwritten or raced for, and no order of programs matters"])
    )
    return 1 if lines else 0


def _unreached(places: set[Place]) -> list[str]:
    """Returns a line for each access that was not reached and should have been, or the other way round."""
    lines, needed = [], set()
    for access in reached.unreached(KERNELS, places):
        excuses = {
            (file, begin)
            for file, begin in UNREACHABLE
            if from_root(access.file) == file and access.source.startswith(begin)
        }
        needed |= excuses
        if not excuses:
            lines.append(f"never come to: {access}")
    return lines + [f"come to, though excused: {file}: {begin}" for file, begin in UNREACHABLE.keys() - needed]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
