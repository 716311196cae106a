"""Runs the CPU kernels of csrc under gcc's sanitizers: `make sanitize`.

    python -m tools.sanitize.native [thread] [address] [-- arguments of pytest]

address: the library is compiled with -fsanitize=address,undefined, and the tests that run it do so from Python.
thread: tests/native_threads, which holds the kernels themselves, is compiled with -fsanitize=thread, once for each
instruction set that this processor has. Exit status 1 where one of them finds something.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from tfm.native import recipe, toolchain
from tfm.native.build import Listener, compile_library, run_ninja
from tfm.native.recipe import BuildError, Object

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "sanitize"
# The line and the stack of a finding; an index or an overflow ends the program as an address does.
COMMON = ("-O1", "-g1", "-fno-omit-frame-pointer")
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", *COMMON)
THREAD = ("-fsanitize=thread", *COMMON)
# The tests that run native operators on the CPU: all that are named so, but for the one about compiling.
TESTS = sorted(
    {str(path) for path in ROOT.glob("tests/**/test_native_*.py")} - {str(ROOT / "tests" / "test_native_build.py")}
)
NEEDS = {"avx2": ("avx2", "fma", "f16c"), "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"), "neon": ()}


def address(pytest: list[str]) -> int:
    """Runs the tests under the address and undefined behaviour sanitizers."""
    csrc = recipe.sources()
    assert csrc is not None
    library = compile_library(
        FOLDER / "address", csrc, toolchain.Cuda(why_not="of no use here"), ADDRESS, listener=Listener(report=_report)
    )
    runtimes = [_runtime(name) for name in ("libasan.so", "libubsan.so")]
    environment = os.environ | {
        "TFM_NATIVE": str(library),
        # Python is not compiled like this: the sanitizers must be loaded first. Memory that Python keeps is no leak.
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    # Without the library its tests would be skipped.
    loads = "import sys; from tfm import native; sys.exit(native.load()[0] or 0)"
    tests = ["-m", "pytest", "-q", *(pytest or TESTS)]
    for arguments in (["-c", loads], tests):
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, check=False)
        if done.returncode != 0:
            return done.returncode
    return 0


def thread() -> int:
    """Runs the driver under the thread sanitizer, for each instruction set."""
    csrc = recipe.sources()
    assert csrc is not None
    sources, failures = sorted((ROOT / "tests" / "native_threads").glob("*.cpp")), 0
    for name, flags in recipe.variants().items():
        if not _runs(name):
            print(f"{name}: not on this processor")
            continue
        options = (*recipe.HOST_FLAGS, f"-DTFM_ISA={name}", *flags, *THREAD)
        program = run_ninja(
            FOLDER / f"thread-{name}", [Object(source, f"{source.name} {name}", options) for source in sources],
            "native_threads", csrc, THREAD, toolchain.Cuda(), listener=Listener(report=_report),
        )  # fmt: skip
        # The sanitizer needs its memory at fixed addresses: some kernels randomise them too much.
        done = subprocess.run(["setarch", "-R", str(program)], check=False)
        print(f"{name}: {'clean' if done.returncode == 0 else f'exit status {done.returncode}'}")
        failures += done.returncode != 0
    return failures


def main() -> int:
    ours, pytest = sys.argv[1:], []
    if "--" in ours:
        place = ours.index("--")
        ours, pytest = ours[:place], ours[place + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizers", nargs="*", default=["thread", "address"], help="default: both")
    wanted = parser.parse_args(ours).sanitizers
    if unknown := set(wanted) - {"thread", "address"}:
        parser.error(f"expected thread, address or both, got {', '.join(sorted(unknown))}")
    try:
        failures = (thread() if "thread" in wanted else 0) + (address(pytest) if "address" in wanted else 0)
    except BuildError as error:
        print(f"not run: {error}")
        return 2
    return 1 if failures else 0


def _runtime(name: str) -> str:
    found = subprocess.run(
        [*toolchain.compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    if "/" not in found.stdout:
        raise BuildError(f"the compiler has no {name}")
    return found.stdout.strip()


def _runs(variant: str) -> bool:
    known = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return set(NEEDS[variant]) <= set(known[1].split() if known else ())


def _report(done: int, total: int, what: str) -> None:
    print(f"{done}/{total} {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
