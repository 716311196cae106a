"""Measures the native kernels on this machine's processor: each operation beside its peers, on one core, in one record.

    python -m benchmarks.cpu --out benchmarks/results/cpu.json

The ceilings come first: a copy of memory that no cache holds, copies of what caches hold, by their size, and torch's
product of fp32 matrices. A case that moves no more than such a copy is held against it. Then every
benchmark of benchmarks/bench_*.py but the training step's, which benchmarks.bench_training measures on real text. A
quiet machine is the measurer's duty; the record keeps its load.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.progress import say
from benchmarks.record import ROOT, environment, sources, write
from tools.gpu.ceilings import Work, copy_rates, matmul_rates

FORMAT = 1
CPU = torch.device("cpu")
# A copy in a cache is measured for this part of the time.
CACHE_SHARE = 8
WORK = Work(copied=1 << 30, side=1024, samples=9, steps=4)
# Bytes read and written by copies that a cache may hold, up to the last level of today's processors for one core.
CACHED = tuple(1 << power for power in range(18, 25))
BENCHMARKS = "not training"


def ceilings(work: Work = WORK) -> dict[str, Any]:
    """Measures one core: GB/s read and written, in memory and in caches, and TFLOP/s of sgemm, each sample."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    say("measuring the ceilings")
    copies = copy_rates(CPU, work)
    caches = [(size, copy_rates(CPU, of_cache(work, size))) for size in CACHED if size < work.copied]
    left, right = torch.randn(2, work.side, work.side)
    products = matmul_rates(left, right, torch.empty_like(left), work)
    return {
        "copy": {"GB/s": statistics.median(copies), "samples": copies},
        "caches": [{"bytes": size, "GB/s": statistics.median(rates), "samples": rates} for size, rates in caches],
        "matmul": {"TFLOP/s": statistics.median(products), "samples": products, "dtype": "float32"},
    }


def of_cache(work: Work, size: int) -> Work:
    """Returns work that copies `size` bytes again and again for as long as `work` copies memory that no cache holds."""
    return replace(work, copied=size // 2, steps=max(1, 2 * work.copied * work.steps // size // CACHE_SHARE))


def run_suites(measured: dict[str, Any], chosen: str) -> list[dict[str, Any]]:
    """Runs the suites that `chosen` names, as pytest's -k does, and returns pytest-benchmark's entries."""
    with tempfile.TemporaryDirectory() as folder:
        rates, entries = Path(folder) / "ceilings.json", Path(folder) / "entries.json"
        rates.write_text(json.dumps(known(measured)))
        command = [sys.executable, "-m", "pytest", "benchmarks", "-o", "python_files=bench_*.py", "-v", "-k", chosen]
        command += ["--benchmark-enable", f"--benchmark-json={entries}", "--disable-warnings"]
        given = os.environ | {"TFM_CEILINGS": str(rates)}
        status = subprocess.run(command, cwd=ROOT, env=given, stdout=sys.stderr, check=False)
        if not entries.exists():
            raise SystemExit(f"benchmarks.cpu: nothing was measured, pytest ended with {status.returncode}")
        return json.loads(entries.read_text())["benchmarks"]


def known(measured: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of measured ceilings that benchmarks.measure reads."""
    caches = [(level["bytes"], level["GB/s"]) for level in measured["caches"]]
    return {"copy": measured["copy"]["GB/s"], "caches": caches, "matmul": measured["matmul"]["TFLOP/s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu.json"))
    parser.add_argument(
        "--only", default=BENCHMARKS, help="benchmarks to run, as for pytest's -k; default: %(default)s"
    )
    arguments = parser.parse_args()
    record: dict[str, Any] = {"format": FORMAT, "environment": environment(CPU), "sources": sources()}
    record["ceilings"] = ceilings()
    record["environment"]["threads"] = 1
    record["benchmarks"] = run_suites(record["ceilings"], arguments.only)
    write(arguments.out, record)


if __name__ == "__main__":
    main()
