"""`tfm build` and the loader: what is compiled, that a build is whole or not there, and what is said where it fails."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from native import INSTRUCTION_SETS, instruction_set
from small_run import tfm

from tfm import native
from tfm.cli import doctor
from tfm.native import build, header, recipe, toolchain
from tfm.native.recipe import BuildError

ROOT = Path(__file__).parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

needs_compiler = pytest.mark.skipif(bool(toolchain.missing()), reason=toolchain.missing())


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of three lines in place of csrc, and a cache of their own."""
    csrc = tmp_path / "with a space" / "csrc"
    (csrc / "cpu").mkdir(parents=True)
    (csrc / "module.cpp").write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 1; }\n')
    (csrc / "cpu" / "isa.cpp").write_text("")
    (csrc / "cpu" / "add.cpp").write_text('#include "cpu/add.h"\n')
    (csrc / "cpu" / "add.h").write_text("#pragma once\n")
    for name in ("TFM_NATIVE", "MAX_JOBS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFM_BUILD_CUDA", "0")
    monkeypatch.setattr(recipe, "sources", lambda: csrc)
    return csrc


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before the library was looked for."""
    monkeypatch.setattr(native, "_reasons", None)
    monkeypatch.setattr(native, "_of_gpu", {})
    monkeypatch.delenv("TFM_INSTRUCTION_SET", raising=False)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def compiled(**options: bool) -> tuple[build.Built, list[str]]:
    """A build, and the objects that it compiled."""
    seen: list[str] = []
    listener = build.Listener(report=lambda done, total, what: seen.append(what))
    built = build.build(listener=listener, **options)
    return built, seen


# What is compiled


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        ("8.0", ["80,sm_80"]),
        ("8.0;9.0a;10.0+PTX", ["80,sm_80", "90a,sm_90a", "100,sm_100", "100,compute_100"]),
        ("7.5 8.6 8.6", ["86,sm_86"]),
        ("Hopper", ["90a,sm_90a"]),
        ("Ampere", ["80,sm_80", "86,sm_86", "86,compute_86"]),
    ],
)
def test_a_list_of_architectures_becomes_nvccs_flags(names: str, numbers: list[str]) -> None:
    assert recipe.gencode(names) == [f"-gencode=arch=compute_{pair.replace(',', ',code=')}" for pair in numbers]


@pytest.mark.parametrize("names", ["7.0;7.5", "ninety", "9.0a+", ""])
def test_a_wrong_list_of_architectures_is_one_line(names: str) -> None:
    with pytest.raises(BuildError, match=r"^TORCH_CUDA_ARCH_LIST: expected .*, got"):
        recipe.gencode(names)


def test_kernels_are_compiled_for_each_instruction_set_and_the_rest_once(small: Path) -> None:
    (small / "cuda").mkdir()
    (small / "cuda" / "add.cu").write_text("")
    variants = list(recipe.variants())
    labels = {item.label for item in recipe.objects(small)}
    assert labels == {"module.cpp", "cpu/isa.cpp", "cpu/add.cpp", *(f"cpu/add.cpp {name}" for name in variants)}
    with_cuda = {item.label: item for item in recipe.objects(small, recipe.gencode("9.0a"))}
    assert with_cuda.keys() == labels | {"cuda/add.cu"}
    assert all(recipe.CUDA_DEFINE in item.flags for item in with_cuda.values())
    assert [item.label for item in with_cuda.values() if item.is_device] == ["cuda/add.cu"]
    assert len({item.file for item in with_cuda.values()}) == len(with_cuda)


def test_a_librarys_place_follows_from_sources_and_torch(small: Path) -> None:
    place = recipe.library(small, "2.13.0", "declared")
    assert recipe.library(small, "2.13.0", "declared") == place != recipe.library(small, "2.12.0", "declared")
    assert recipe.library(small, "2.13.0", "declared anew") != place
    (small / "notes.txt").write_text("no source")
    assert recipe.library(small, "2.13.0", "declared") == place
    (small / "cpu" / "add.h").write_text("#pragma once\n// changed\n")
    assert recipe.library(small, "2.13.0", "declared") != place


# Builds


@needs_compiler
def test_only_what_changed_is_compiled_and_older_sources_find_their_library(small: Path) -> None:
    first, objects = compiled()
    assert first.is_new
    assert len(objects) == len(recipe.objects(small)) + 1
    again, nothing = compiled()
    assert (again.library, again.is_new, nothing) == (first.library, False, [])
    header = (small / "cpu" / "add.h").read_text()
    (small / "cpu" / "add.h").write_text(header + "inline int two() { return 2; }\n")
    second, changed = compiled()
    assert second.library != first.library
    assert set(changed) >= {"cpu/add.cpp"}
    assert not any(label.startswith("module") for label in changed)
    (small / "cpu" / "add.h").write_text(header)
    older, nothing = compiled()
    assert (older.library, older.is_new, nothing) == (first.library, False, [])
    assert set(compiled(force=True)[1]) == set(objects)


@needs_compiler
def test_a_failure_is_one_line_with_the_first_error_and_leaves_no_library(small: Path) -> None:
    (small / "cpu" / "add.h").write_text("#pragma once\nint broken = nothing;\nint more = wrong;\n")
    with pytest.raises(BuildError) as raised:
        compiled()
    message = str(raised.value)
    assert message.startswith("csrc/cpu/add.h:2:14: error: ")
    assert "\n" not in message
    log = Path(message.rpartition("everything: ")[2].removesuffix(")"))
    assert "wrong" in log.read_text()
    assert not recipe.library(small, torch.__version__, header.digest()).exists()
    result = tfm("build")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("tfm: error: csrc/cpu/add.h:2:14: error: ")


@needs_compiler
def test_where_nvcc_fails_the_message_says_how_to_go_without(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "cuda").mkdir()
    (small / "cuda" / "add.cu").write_text("")
    refusing = script(
        small / "nvcc", 'case "$*" in *--version*) exit 0;; esac\necho "error: unsupported GNU version"; exit 1'
    )
    cuda = toolchain.Cuda(Path(refusing), ("-arch=sm_80",))
    monkeypatch.setattr(toolchain, "cuda", lambda wanted: cuda if wanted else toolchain.Cuda())
    with pytest.raises(BuildError, match=r"^error: unsupported GNU version .*; `tfm build --no-cuda` leaves CUDA out$"):
        compiled()
    assert compiled(with_cuda=False)[0].is_new


@needs_compiler
def test_a_second_build_waits_for_the_first(small: Path) -> None:
    first, _ = compiled()
    lock = next((recipe.cache() / "objects").glob("*/lock"))
    said, waiting = [], threading.Event()

    def say(line: str) -> None:
        said.append(line)
        waiting.set()

    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = threading.Thread(target=build.build, kwargs={"force": True, "listener": build.Listener(say=say)})
        second.start()
        assert waiting.wait(20)
        assert second.is_alive()
    second.join(20)
    assert said == ["waiting for another build to end"]
    assert first.library.is_file()


@needs_compiler
def test_a_killed_build_leaves_nothing_half_done(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, real = small / "started", toolchain.compiler()[0]
    answer = f'case "$*" in *--version*) exec {real} "$@";; esac'
    slow = script(
        small / "slow", f'{answer}\n[ -e "{started}" ] || {{ touch "{started}"; sleep 1; }}\nexec {real} "$@"'
    )
    monkeypatch.setenv("CXX", f"'{slow}'")
    program = f"""
from pathlib import Path
from tfm.native import build, recipe
recipe.sources = lambda: Path({str(small)!r})
build.build()
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert started.exists()
    assert not list(recipe.cache().glob("libraries/*/tfm_native.so*"))
    built, _ = compiled()
    torch.classes.load_library(str(built.library))


@needs_compiler
def test_sources_that_change_under_the_compiler_are_no_build(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = toolchain.compiler()[0]
    editor = script(small / "editor", f'echo "// more" >> "{small}/cpu/add.h"\nexec {real} "$@"')
    monkeypatch.setenv("CXX", f"'{editor}'")
    with pytest.raises(BuildError, match="the sources changed while they were compiled"):
        compiled()
    assert not list(recipe.cache().glob("libraries/*/tfm_native.so"))


@needs_compiler
def test_old_builds_are_removed(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "KEPT_BUILDS", 2)
    libraries = []
    for number in range(4):
        (small / "cpu" / "isa.cpp").write_text(f"// {number}\n")
        libraries.append(compiled()[0].library)
        os.utime(libraries[-1].parent, (number, number))
    assert [library.is_file() for library in libraries] == [False, False, True, True]


# The toolchain


def test_without_a_compiler_one_line_says_which_was_looked_for(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(small))
    result = tfm("build")
    line = "no C++ compiler: looked for c++, g++, clang++ on PATH (or in CXX)"
    assert (result.exit_code, result.stderr) == (2, f"tfm: error: {line}\n")
    result = tfm("build", "--if-possible")
    assert (result.exit_code, result.stdout) == (0, f"the native operators are not compiled: {line}\n")
    monkeypatch.setenv("CXX", "icpx -v")
    assert toolchain.missing() == "no C++ compiler: looked for icpx that CXX names"


@needs_compiler
def test_without_ninja_or_pythons_headers_one_line_says_so(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = toolchain.compiler()[0]
    monkeypatch.setenv("PATH", str(small))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(small))
    assert toolchain.missing().startswith("no headers of Python in ")
    (small / "Python.h").write_text("")
    assert toolchain.missing().startswith("no ninja: ")


def test_nvcc_is_found_behind_a_script_and_needs_its_headers(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = small / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    script(small / "nvcc", f"echo '#$ _HERE_={toolkit / 'bin'}' >&2")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{small}:/bin:/usr/bin")
    assert toolchain.find_nvcc() == (None, f"no CUDA headers in {toolkit}")
    (toolkit / "include").mkdir()
    (toolkit / "include" / "cuda_runtime.h").write_text("")
    assert toolchain.find_nvcc() == (toolkit / "bin" / "nvcc", "")
    monkeypatch.setenv("PATH", str(toolkit))
    assert toolchain.find_nvcc() == (None, "no nvcc in CUDA_HOME or on PATH")


def test_the_cuda_part_is_for_a_torch_with_cuda_or_asked_for(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = Path(script(small / "nvcc", "echo compute_80; echo compute_90"))
    monkeypatch.delenv("TFM_BUILD_CUDA")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: (nvcc, ""))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert toolchain.cuda().why_not == "this torch is built without CUDA"
    monkeypatch.setenv("TFM_BUILD_CUDA", "1")
    assert toolchain.cuda().gencode == tuple(recipe.gencode("8.0;9.0a"))  # those that this nvcc knows
    assert toolchain.cuda(wanted=False).why_not == "not wanted"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9")
    assert toolchain.cuda().gencode == tuple(recipe.gencode("8.9"))
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: (None, "no nvcc"))
    with pytest.raises(BuildError, match=r"^TFM_BUILD_CUDA=1: no nvcc$"):
        toolchain.cuda()
    monkeypatch.delenv("TFM_BUILD_CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert toolchain.cuda() == toolchain.Cuda(why_not="no nvcc")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: (nvcc, ""))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5), (8, 6))[index])
    assert toolchain.cuda().gencode == tuple(recipe.gencode("8.6;9.0a"))


# The loader


@needs_compiler
def test_where_there_is_a_compiler_the_operators_are_there() -> None:
    assert native.why_unavailable(CPU) == "", "run `tfm build` first, or `make test`"


def test_says_why_there_is_no_library(
    unloaded: None, small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    reason = "tfm_native is not built: `tfm build` compiles it"
    assert native.why_unavailable(CPU) == native.why_unavailable(GPU) == reason
    assert native.why_unavailable(torch.device("mps")) == "expected CPU or CUDA tensors, got mps tensors"
    for place, words in [
        ("absent.so", "TFM_NATIVE: expected a library, got no file at "),
        ("text.so", "does not load: "),
    ]:
        (tmp_path / "text.so").write_text("no library")
        monkeypatch.setattr(native, "_reasons", None)
        monkeypatch.setenv("TFM_NATIVE", str(tmp_path / place))
        assert words in native.why_unavailable(CPU)
        assert str(tmp_path / place) in native.why_unavailable(CPU)
        assert native.why_unavailable(CPU).count("\n") == 0


@needs_compiler
def test_a_library_of_another_version_is_not_served(unloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFM_NATIVE", str(native.library()))
    monkeypatch.setattr(header, "digest", lambda: "of other declarations")
    assert " is of another version of tfm: " in native.why_unavailable(CPU)


def test_says_which_processor_the_library_does_not_serve(unloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = SimpleNamespace(instruction_set=lambda: "none", has_cuda=lambda: False)
    monkeypatch.setattr(torch.ops, "tfm_native", operators)
    monkeypatch.setattr(native, "_load", lambda: "")
    assert native.why_unavailable(CPU) == "expected a CPU with AVX2 and FMA, got one without"
    assert native.why_unavailable(GPU) == "tfm_native is built without CUDA: `tfm build` adds it where nvcc is"
    operators.instruction_set, operators.has_cuda = lambda: "avx2", lambda: True
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=7, minor=5))
    monkeypatch.setattr(native, "_reasons", None)
    assert native.why_unavailable(CPU) == ""
    assert native.why_unavailable(GPU) == "expected compute capability 8.0 or newer, got 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr(native, "_of_gpu", {})
    assert native.why_unavailable(GPU) == ""


@needs_compiler
def test_a_variable_chooses_the_instruction_set(unloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with instruction_set(INSTRUCTION_SETS[0]):
        # The widest last, so that each of two is another than what was in use.
        for name in reversed(INSTRUCTION_SETS):
            monkeypatch.setattr(native, "_reasons", None)
            monkeypatch.setenv("TFM_INSTRUCTION_SET", name)
            assert native.why_unavailable(CPU) == ""
            assert torch.ops.tfm_native.instruction_set() == name
            assert f"kernels for {name} (TFM_INSTRUCTION_SET), " in doctor._native()
        monkeypatch.setattr(native, "_reasons", None)
        monkeypatch.setenv("TFM_INSTRUCTION_SET", "sse")
        assert native.why_unavailable(CPU) == (
            "TFM_INSTRUCTION_SET: expected a set of instructions that this CPU and the kernels have, got sse"
        )
        assert torch.ops.tfm_native.instruction_set() == name


def test_dynamo_folds_the_answer() -> None:
    import tfm.ops.backends  # which loads

    assert tfm.ops.backends

    @torch.compile(fullgraph=True, backend="eager")
    def shifted(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if native.why_unavailable(x.device) else x + 2

    assert shifted(torch.zeros(1)).item() == (1 if native.why_unavailable(CPU) else 2)
