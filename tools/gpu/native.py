"""The library of csrc, built on this machine and for its GPU, and what each of its CUDA kernels takes.

    python -m tools.gpu.native

Run by `python -m tools.gpu`, in a process of its own; what it finds are lines of the journal. All that comes after
it takes this library. Where TFM_NATIVE names one, that is taken and nothing is built.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from tfm import native
from tfm.native import build, toolchain
from tools.check_kernels import native as native_kernels
from tools.check_kernels.allowed import ALLOWED
from tools.check_kernels.verdict import verdict
from tools.gpu import child
from tools.gpu.run import Run, ended

# A limit, not an estimate: alone on 16 cores it ends after about half a minute, and killed it leaves no library.
WEIGHT = 400


def part(run: Run, seconds: float) -> tuple[str, str]:
    """Builds the library for all that follows; where there is none, what follows says so."""
    command = run.command("native", "-m", "tools.gpu.native")
    end = child.run_one(command, seconds)
    found = run.record["native"] = {name: value for line in child.read(command.journal) for name, value in line.items()}
    if "missing" in found:
        return "missing", found["missing"]
    if "cuda" in found:
        run.native = Path(found["library"])
    reason = found.get("cpu" if run.options.rehearse else "cuda", "")
    if end.state == "done" and reason:
        return "missing", "; ".join(filter(None, (reason, found.get("without_cuda"))))
    said = []
    if "seconds" in found:
        said.append(f"built in {found['seconds']:.0f} s" if found["is_new"] else "built before")
    if "kernels" in found:
        said.append(f"{len(found['kernels'])} kernels of CUDA")
    if found.get("faults"):
        said.append(f"must not ship: {', '.join(found['faults'])}")
    return ended(end, ", ".join(said))


def main() -> None:
    journal, given = Path(os.environ[child.JOURNAL]), os.environ.get("TFM_NATIVE")
    reason = "" if given else toolchain.missing()
    if reason:
        child.append(journal, {"missing": reason})
        return
    find_toolkit()
    nvcc, _ = native_kernels.usable()
    with ThreadPoolExecutor(1) as beside:
        # At the same time as the build, and about as long: the same compiler reads the same files.
        taken = beside.submit(kernels, nvcc) if nvcc is not None and torch.cuda.is_available() else None
        try:
            library = {"library": given} if given else built()
        except build.BuildError as error:
            raise SystemExit(str(error)) from None
        child.append(journal, library)
        os.environ["TFM_NATIVE"] = library["library"]
        child.append(journal, why_unavailable())
        if taken is not None:
            child.append(journal, taken.result())


def find_toolkit() -> None:
    """Makes nvcc be found where it is not on PATH but where toolkits are installed."""
    nvcc = record.cuda_tool("nvcc")
    if nvcc is not None and toolchain.find_nvcc()[0] is None:
        os.environ["CUDA_HOME"] = str(Path(nvcc).parent.parent)


def built() -> dict[str, Any]:
    """Builds what `tfm build` makes here, or takes it from the cache.

    Raises:
        BuildError: as tfm.native.build.build.
    """
    start = time.perf_counter()
    listener = build.Listener(
        lambda done, total, what: print(f"{time.perf_counter() - start:.1f} s {what}", flush=True)
    )
    made = build.build(listener=listener)
    return {
        "library": str(made.library),
        "is_new": made.is_new,
        "gencode": made.cuda.gencode,
        "without_cuda": made.cuda.why_not,
        "compilers": json.loads(made.library.with_suffix(".json").read_text())["compilers"],
        "seconds": time.perf_counter() - start,
    }


def why_unavailable() -> dict[str, str]:
    """Says why the library that TFM_NATIVE names cannot serve this CPU and this GPU; empty where it can."""
    _, on_gpu = native.load()
    gpu = native.why_unavailable(torch.device("cuda")) if torch.cuda.is_available() else on_gpu
    return {"cpu": native.why_unavailable(torch.device("cpu")), "cuda": gpu}


def kernels(nvcc: Path) -> dict[str, Any]:
    """Compiles csrc's CUDA kernels for this GPU: registers, stack and shared memory of each, and what must not ship."""
    major, minor = torch.cuda.get_device_capability()
    rows = native_kernels.compile_all(nvcc, (10 * major + minor,))
    allowed = [exception for exception in ALLOWED if native_kernels.concerns(exception)]
    return {"kernels": [row.record() for row in rows], "faults": verdict(rows, allowed, whole=False)}


if __name__ == "__main__":
    main()
