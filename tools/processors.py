"""The tests as on processors that have fewer instructions than this one: `make test-processors`.

    python -m tools.processors [SETTING ...] [-- arguments of pytest]

Each setting is a variable by which torch, oneDNN or tfm leaves instructions unused, ATEN_CPU_CAPABILITY=default and so
on; without any, all of them. The tests that compute run under each, and a table comes last. A setting that this
processor cannot have, or that changes nothing here, is a row that says so. Exit status 1 where a test failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.progress import say
from tfm.native import INSTRUCTION_SET

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"


@dataclass(frozen=True)
class Setting:
    """A variable and its value, for processors that have at least the instructions `needs`, as torch names them."""

    variable: str
    value: str
    needs: str

    def __str__(self) -> str:
        return f"{self.variable}={self.value}"


# Each includes those before it.
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
SETTINGS = (
    Setting("ATEN_CPU_CAPABILITY", "default", "DEFAULT"),
    Setting("ATEN_CPU_CAPABILITY", "avx2", "AVX2"),
    Setting("ONEDNN_MAX_CPU_ISA", "AVX2", "AVX2"),
    Setting("ONEDNN_MAX_CPU_ISA", "AVX512_CORE", "AVX512"),
    Setting(INSTRUCTION_SET, "avx2", "AVX2"),
)
# Prints the instructions in use; oneDNN tells its own only when it computes something.
PROBE = """
import torch
from tfm import native
if torch.backends.mkldnn.is_available():
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        torch.ones(2, 2).to_mkldnn().relu()
print("torch:" + torch.backends.cpu.get_cpu_capability())
print("tfm:" + (native.load()[0] or torch.ops.tfm_native.instruction_set()))
"""
IN_USE = {"torch": r"^torch:(.*)", "oneDNN": r"cpu,isa:(.*)", "tfm": r"^tfm:(.*)"}

COMPARES = re.compile(r"\b(oracle|assert_close|allclose|torch\.equal)\b|\.abs\(\)")
IMPORTED = re.compile(r"^(?:from|import) (\w+)", re.MULTILINE)
STARTS_PROCESSES = {"subprocess", "small_run"}


def computing(folder: Path = TESTS) -> list[Path]:
    """Returns the files of tests whose results are the processor's: they or a helper of theirs compare tensors.

    Tests that start processes are left out: commands, packages and builds are the same everywhere.
    """
    found = []
    for path in sorted(folder.rglob("test_*.py")):
        text = path.read_text("utf-8")
        imported = set(IMPORTED.findall(text))
        places = [place / f"{name}.py" for name in imported for place in {folder, path.parent}]
        helpers = [place for place in places if place.is_file()]
        compares = any(COMPARES.search(part) for part in (text, *(helper.read_text("utf-8") for helper in helpers)))
        if compares and not imported & STARTS_PROCESSES:
            found.append(path)
    return found


def environment(setting: Setting | None) -> dict[str, str]:
    """Returns the environment of a process, with this setting alone."""
    variables = {other.variable for other in SETTINGS}
    given = {name: value for name, value in os.environ.items() if name not in variables}
    return given | ({setting.variable: setting.value} if setting else {})


def instructions(setting: Setting | None) -> dict[str, str]:
    """Returns the instructions that torch, oneDNN and tfm say they use."""
    command = [sys.executable, "-c", PROBE]
    said = subprocess.run(
        command, cwd=ROOT, env=environment(setting), stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    found = {name: re.search(pattern, said, re.MULTILINE) for name, pattern in IN_USE.items()}
    return {name: match[1] if match else "not here" for name, match in found.items()}


def has(plain: Mapping[str, str], capability: str) -> bool:
    """Tells whether a processor that uses `plain` by itself has these instructions, too."""
    known = CAPABILITIES.index(plain["torch"]) if plain["torch"] in CAPABILITIES else 0
    return CAPABILITIES.index(capability) <= known


@dataclass(frozen=True)
class Outcome:
    """The result of the tests, or the reason why they did not run."""

    note: str
    passed: int = 0
    failed: int = 0
    minutes: float = 0.0
    ran: bool = True

    def row(self, setting: Setting) -> str:
        counts = f"{self.passed:8,}{self.failed:8,}{self.minutes:9.1f}" if self.ran else f"{'not run':>25}"
        return f"{setting!s:32}{counts}   {self.note}"


HEAD = f"{'setting':32}{'passed':>8}{'failed':>8}{'minutes':>9}   in use"


def run(setting: Setting, plain: Mapping[str, str], pytest: Sequence[str]) -> Outcome:
    if not has(plain, setting.needs):
        return Outcome(f"this processor has no {setting.needs}", ran=False)
    in_use = instructions(setting)
    note = ", ".join(f"{name} {what}" for name, what in in_use.items())
    if in_use == plain:
        return Outcome(f"it changes nothing here: {note}", ran=False)
    say(f"\n{setting}: {note}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-m", "pytest", "-q", "--disable-warnings", f"--junit-xml={report}", *map(str, computing()), *pytest]
        status = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(setting), check=False).returncode
        passed, failed = counts(report) if report.is_file() else (0, 0)
    if status and not failed:
        note, failed = f"pytest ended with status {status}; {note}", 1
    return Outcome(note, passed, failed, (time.monotonic() - started) / 60)


def counts(report: Path) -> tuple[int, int]:
    """Counts tests that passed, and tests and files that did not."""
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    total, skipped, *wrong = (int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors"))
    return total - skipped - sum(wrong), sum(wrong)


def main(arguments: Sequence[str]) -> int:
    here = arguments.index("--") if "--" in arguments else len(arguments)
    names, pytest = arguments[:here], arguments[here + 1 :]
    known = {str(setting): setting for setting in SETTINGS}
    if unknown := set(names) - known.keys():
        say(f"expected settings among {', '.join(known)}, got {', '.join(sorted(unknown))}")
        return 2
    plain = instructions(None)
    rows, failed = [], 0
    for setting in [known[name] for name in names] or SETTINGS:
        outcome = run(setting, plain, pytest)
        rows.append(outcome.row(setting))
        failed += outcome.failed
    print("\nplain: " + ", ".join(f"{name} {what}" for name, what in plain.items()), HEAD, *rows, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
