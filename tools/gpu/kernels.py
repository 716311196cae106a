"""Compiles every kernel for one chip, in parallel, and records what each takes; Triton's cache is warm afterwards.

    python -m tools.gpu.kernels --capability 90 --workers 16 [--only layer_norm]

Run by `python -m tools.gpu`; each kernel is a line of the journal, what must not ship the last one.
"""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Sequence
from pathlib import Path

from tools.check_kernels.allowed import ALLOWED
from tools.check_kernels.compiled import CASES, Compiled, cases_of, compile_all
from tools.check_kernels.verdict import verdict
from tools.gpu.child import JOURNAL, ROOT, append
from tools.report.sources import sources_of


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--capability", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--only", nargs="*", default=(), help="only these operations; default: all")
    arguments = parser.parse_args()
    journal = Path(os.environ[JOURNAL])

    def keep(row: Compiled) -> None:
        append(journal, {"kernel": row.record()})

    only = cases_under(arguments.only)
    if arguments.only and not only:
        append(journal, {"missing": f"no kernel serves {', '.join(arguments.only)}"})
        return
    # Everything that this GPU will run, as it will run it.
    rows = compile_all(
        capabilities=(arguments.capability,), workers=arguments.workers, only=only, report=keep,
        by_every=False, chosen=False,
    )  # fmt: skip
    append(journal, {"verdict": verdict(rows, ALLOWED, whole=False)})


def cases_under(operations: Sequence[str]) -> list[str]:
    """Returns the names of the cases whose kernels these operations launch, by the files that the operations reach."""
    if not operations:
        return []
    # Interpreted kernels cannot be compiled, and triton reads the variable when it is imported: by the cases.
    os.environ.pop("TRITON_INTERPRET", None)
    files = {ROOT / name for operation in operations for name in sources_of(operation)}
    return [case.name for case in cases_of(CASES, every=False) if Path(inspect.getfile(case.kernel.fn)) in files]


if __name__ == "__main__":
    main()
