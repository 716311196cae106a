"""The package as installed: names, one copy of each module, and every folder on board."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import typing
import zipfile
from collections.abc import Callable
from email import message_from_string
from pathlib import Path

import pytest

import tfm
from tfm.native import toolchain
from tfm.patching.families import TRIED

ROOT = Path(__file__).parent.parent
# Imports every module there is, except the one that starts the program.
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import tfm, tfm.kernels
for package in (tfm, tfm.kernels):
    for module in pkgutil.walk_packages([package.__path__[0]], package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


# No settings but those a test gives; and as if a package were not installed.
WITHOUT = {"TFM_NATIVE_BUILD": "", "CXX": "", "CUDA_HOME": "", "CUDA_PATH": "", "TFM_NATIVE": "", "TFM_BUILD_CUDA": ""}
# A user id that no account has, as containers give one.
HOMELESS = """
import os
for name in ("HOME", "XDG_CACHE_HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
    os.environ.pop(name, None)
os.getuid = lambda: 2**31 - 7
"""
BLOCKED = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {package!r}.split() else find(name, *rest)
"""


def run(
    program: str,
    cwd: Path = ROOT,
    python: tuple[str, ...] = (sys.executable,),
    environment: dict[str, str] | None = None,
) -> list[str]:
    given = os.environ | (environment or {})
    command = [*python, "-c", program]
    finished = subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def packages_in_the_tree() -> dict[str, Path]:
    """The folders that must be packaged, by the names they are imported under."""
    inside = [*(ROOT / "tfm").rglob("*"), *(ROOT / "kernels").rglob("*")]
    folders = [folder for folder in (ROOT / "tfm", *inside) if folder.is_dir() and any(folder.glob("*.py"))]
    names = [".".join(folder.relative_to(ROOT).parts) for folder in folders]
    return {name if name.startswith("tfm") else f"tfm.{name}": at for name, at in zip(names, folders, strict=True)}


def test_public_names_resolve():
    for module in (tfm, tfm.nn, tfm.ops):
        assert sorted(module.__all__) == list(module.__all__)
        for name in module.__all__:
            assert getattr(module, name) is not None
    assert callable(tfm.accelerate)
    assert callable(tfm.restore)


def test_public_names_are_shown_before_they_are_used():
    """dir, help and the completion of a prompt, in a process that has imported nothing else."""
    program = """
import pydoc, rlcompleter, tfm
print(*(name for name in dir(tfm) if not name.startswith("_")))
shown = pydoc.render_doc(tfm, renderer=pydoc.plaintext)
names = "accelerate(", "restore(", "use(", "class Report", "nn (package)", "ops (package)"
print(*(name for name in names if name in shown))
completer = rlcompleter.Completer({"tfm": tfm})
print(completer.complete("tfm.acc", 0), completer.complete("tfm.op", 0))
"""
    listed, helped, completed = run(program)
    assert listed.split() == [name for name in tfm.__all__ if not name.startswith("_")]
    assert helped == "accelerate( restore( use( class Report nn (package) ops (package)"
    assert [word.rstrip("(") for word in completed.split()] == ["tfm.accelerate", "tfm.ops"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 keeps overloads")
def test_results_of_attention_have_types():
    def results(function: Callable[..., object]) -> dict[tuple[str, ...], str]:
        flags = ("return_lse", "return_weights")
        return {
            tuple(overload.__annotations__.get(flag, "") for flag in flags): overload.__annotations__["return"]
            for overload in typing.get_overloads(function)
        }

    no, yes = "Literal[False]", "Literal[True]"
    assert results(tfm.ops.attention) == {
        (no, no): "Tensor",
        (yes, no): "tuple[Tensor, Tensor]",
        (no, yes): "tuple[Tensor, Tensor]",
        (yes, yes): "tuple[Tensor, Tensor, Tensor]",
        ("bool", "bool"): "Tensor | tuple[Tensor, ...]",
    }
    assert results(tfm.ops.varlen_attention) == {
        (no, ""): "Tensor",
        (yes, ""): "tuple[Tensor, Tensor]",
        ("bool", ""): "Tensor | tuple[Tensor, Tensor]",
    }


def test_version_is_a_string():
    assert isinstance(tfm.__version__, str)
    assert tfm.__version__[0].isdigit()


@pytest.mark.triton
def test_every_module_is_imported_once_and_shadows_nobody(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OWNER = 'somebody else'")
    report = """
names = [name for name in sys.modules if name.startswith("tfm.")]
print(*names)
print(*(name for name in sys.modules if name.startswith(("tfm.tfm", "kernels."))))
files = [getattr(sys.modules[name], "__file__", None) for name in names]
print(*(file for file in set(files) if file and files.count(file) > 1))
import kernels
print(kernels.OWNER)
"""
    # transformers, which a part of tfm imports, looks for a package of that name too.
    before = f"import sys; sys.path.append({str(tmp_path)!r})"
    imported, doubled, twice, owner = run(before + IMPORT_EVERYTHING + report)
    assert {"tfm.kernels.norm", "tfm.cli", "tfm.reference.attention", "tfm.demo"} <= set(imported.split())
    assert doubled == twice == ""
    assert owner == "somebody else"


def test_kernels_are_no_package_of_their_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tfm" / "kernels").exists()


def test_every_folder_of_modules_is_packaged():
    program = """
import sys, setuptools
setuptools.setup = lambda **options: print(*options["packages"], options["package_dir"], sep="\\n")
exec(open("setup.py").read(), {"__file__": "setup.py"})
"""
    *packages, directories = run(program)
    assert len(packages) == len(set(packages))
    assert set(packages) == packages_in_the_tree().keys() | {"tfm.kernels", "tfm.csrc"}
    assert ast.literal_eval(directories) == {"tfm": "tfm", "tfm.kernels": "kernels", "tfm.csrc": "csrc"}


def test_every_folder_of_modules_has_its_init():
    for package, folder in packages_in_the_tree().items():
        assert (folder / "__init__.py").exists(), package


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The sources as they would be published."""
    folder = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def pip(*arguments: str | Path, **environment: str) -> str:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-build-isolation", "--no-index"]
    given = os.environ | environment
    finished = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def installed(copy, tmp_path_factory) -> Path:
    """The package, built from a copy of the sources where there is no compiler, in a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    said = pip("install", "--verbose", "--target", target, copy, **WITHOUT | {"PATH": str(target)})
    assert "tfm: a pure wheel, without native operators: no C++ compiler: looked for c++, g++, clang++" in said
    return target


@pytest.mark.triton
def test_installs_and_imports_from_elsewhere(installed, tmp_path):
    program = f"import sys; sys.path.insert(0, {str(installed)!r})\n" + IMPORT_EVERYTHING
    report = """
from importlib.metadata import version
print(*{str(getattr(module, "__file__", None)) for name, module in sys.modules.items() if name.split(".")[0] == "tfm"})
print(tfm.__version__ == version("tfm"), *tfm.__path__)
"""
    files, state = run(program + report, cwd=tmp_path)
    modules = [file for file in files.split() if file != "None"]
    assert modules
    assert all(Path(file).is_relative_to(installed) for file in modules)
    assert state.split() == ["True", str(installed / "tfm")]


def test_ships_what_it_needs_and_nothing_else(installed):
    assert (installed / "tfm" / "py.typed").exists()
    assert {path.name for path in (installed / "tfm" / "demo").iterdir()} >= {"training.tsv.gz", "held_out.tsv.gz"}
    assert sum(path.stat().st_size for path in (installed / "tfm" / "demo").rglob("*.gz")) < 1_000_000
    sources = {path.relative_to(ROOT) for path in (ROOT / "tfm").rglob("*.py")}
    sources |= {Path("tfm") / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    shipped = {path.relative_to(installed) for path in installed.rglob("*.py")}
    assert shipped == sources
    native = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.*")}
    assert {path.relative_to(installed / "tfm") for path in (installed / "tfm" / "csrc").rglob("*.*")} == native
    assert not list(installed.rglob("*.so"))
    assert (installed / "bin" / "tfm").exists()
    assert any(installed.glob("tfm-*.dist-info/licenses/LICENSE"))


def test_metadata_says_what_each_part_needs(installed):
    (folder,) = installed.glob("tfm-*.dist-info")
    metadata = message_from_string((folder / "METADATA").read_text("utf-8"))
    needs: dict[str, set[str]] = {}
    for line in metadata.get_all("Requires-Dist", []):
        package, marker = re.match(r"[\w-]+", line).group(), line.partition("extra == ")[2].strip("'\"")
        needs.setdefault(marker, set()).add(package)
    assert needs[""] == {"torch", "triton"}
    assert needs["translate"] >= {"tokenizers", "safetensors", "sacrebleu", "matplotlib", "typer", "rich", "numpy"}
    assert needs["build"] == {"ninja", "setuptools", "typer", "rich"}
    assert needs["docs"] == {"mkdocs", "mkdocs-material", "mkdocstrings"}
    assert needs.keys() == {"", "translate", "huggingface", "build", "test", "docs"}
    assert needs["huggingface"] == {"transformers"}
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    # An index of packages cannot show what lies in the repository.
    described = metadata.get_payload()
    assert "# tfm" in described
    assert "All measurements (in the repository: `benchmarks/README.md`)" in described
    assert not re.findall(r"\]\((?!https?:)", described)


def test_the_transformers_that_were_tried_are_those_that_the_tests_install():
    oldest, newest = TRIED
    assert f"\nOLDEST_TRANSFORMERS := {oldest}\n" in (ROOT / "Makefile").read_text()
    assert f"\ntransformers=={newest}\n" in (ROOT / "constraints.txt").read_text()
    supported = f'"transformers>={oldest.rpartition(".")[0]},<{int(newest.partition(".")[0]) + 1}"'
    assert f"huggingface = [{supported}]" in (ROOT / "pyproject.toml").read_text()


def test_an_installation_finds_the_sources_to_compile(installed, tmp_path):
    program = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\nfrom tfm.native import recipe\nprint(recipe.sources())"
    )
    assert run(program, cwd=tmp_path) == [str(installed / "tfm" / "csrc")]


# Machines that lack something

OF_TRANSLATION = "tokenizers safetensors sacrebleu matplotlib pydantic typer rich numpy"


def test_operations_and_layers_need_torch_alone():
    program = f"""{BLOCKED.format(package=OF_TRANSLATION)}
import torch, tfm, tfm.native.build
from tfm import nn, ops
model = torch.nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
tfm.accelerate(model)
print(*model(torch.ones(1, 3, 8), torch.ones(1, 2, 8)).shape)
"""
    assert run(program) == ["1 2 8"]


def test_a_missing_package_names_the_extra():
    packages = {"safetensors": "checkpoint", "sacrebleu": "evaluate", "matplotlib": "plots"}
    program = f"""{BLOCKED.format(package=" ".join(packages))}
from importlib import import_module
for module in {list(packages.values())}:
    try:
        import_module(f"tfm.{{module}}")
    except ModuleNotFoundError as error:
        print(error.name, error)
"""
    for package, said in zip(packages, run(program), strict=True):
        assert said.startswith(f"{package} {package} is not installed: pip install 'tfm[translate]' brings it")


@pytest.mark.parametrize(
    ("package", "command", "said"),
    [
        ("typer", "doctor", "typer is not installed: pip install 'tfm[build]' brings it"),
        ("tokenizers", "translate", "tokenizers is not installed: pip install 'tfm[translate]' brings it"),
    ],
)
def test_a_command_that_lacks_a_package_is_one_line(package, command, said, tmp_path):
    program = f"{BLOCKED.format(package=package)}\nfrom tfm.__main__ import main\nmain()"
    arguments = [sys.executable, "-c", program, command, *[str(tmp_path)] * (command == "translate")]
    finished = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"tfm: error: {said}")
    assert finished.stderr.count("\n") == 1


def test_a_pure_wheel_is_told_on_the_terminal():
    """pip keeps what a build prints to itself."""
    keyboard, terminal = os.openpty()
    program = f"""
import os, setuptools, sys
os.close(os.open({os.ttyname(terminal)!r}, os.O_RDWR))
setuptools.setup = lambda **options: None
sys.argv = ["setup.py", "bdist_wheel"]
exec(open("setup.py").read(), {{"__file__": "setup.py"}})
"""
    given = os.environ | WITHOUT | {"PATH": "/nowhere"}
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=ROOT, env=given, capture_output=True, start_new_session=True, check=True)
    said = os.read(keyboard, 1000).decode()
    for end in (keyboard, terminal):
        os.close(end)
    assert said.strip().startswith("tfm: a pure wheel, without native operators: no C++ compiler: looked for ")


@pytest.mark.skipif(bool(toolchain.missing()), reason=toolchain.missing())
def test_a_wheel_holds_the_operators_where_a_compiler_is(copy, tmp_path):
    pip("wheel", "--wheel-dir", tmp_path, copy, TFM_NATIVE_BUILD="", TFM_NATIVE="")
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    report = """
import torch
from tfm import native
print(native.library())
print(native.why_unavailable(torch.device("cpu")))
"""
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})" + report
    found, reason = run(program, tmp_path, environment={"TFM_NATIVE": "", "XDG_CACHE_HOME": str(tmp_path)})
    assert found == str(tmp_path / "site" / "tfm_native.abi3.so")
    assert reason == ""


@pytest.mark.parametrize(
    ("environment", "blocked", "reason"),
    [
        ({"TFM_NATIVE_BUILD": "0"}, "", None),
        ({}, "torch", "No module named 'torch'"),
        ({"PATH": "/nowhere"}, "", "no C++ compiler: looked for c++, g++, clang++ on PATH (or in CXX)"),
        ({"CXX": "false"}, "", "/false does not run: "),
    ],
    ids=["not wanted", "no torch", "no compiler", "broken compiler"],
)
def test_a_wheel_is_pure_where_nothing_can_be_compiled(environment, blocked, reason):
    program = f"""{BLOCKED.format(package=blocked)}
import setuptools
setuptools.setup = lambda **options: print(len(options["ext_modules"]))
sys.argv = ["setup.py", "bdist_wheel"]
exec(open("setup.py").read(), {{"__file__": "setup.py"}})
"""
    *said, extensions = run(program, environment=WITHOUT | environment)
    assert extensions == "0"
    assert len(said) == (reason is not None)
    assert all(line.startswith("tfm: a pure wheel, without native operators: ") and reason in line for line in said)


NO_HOME = "no folder to keep builds in: user 2147483641 has no home folder (set HOME or XDG_CACHE_HOME)"


@pytest.mark.parametrize(
    ("environment", "before", "rows"),
    [
        (
            {"PATH": "/nowhere", "XDG_CACHE_HOME": "/nowhere"}, "",
            {
                "C++ compiler": "not found: no C++ compiler: looked for c++, g++, clang++ on PATH",
                "nvcc": "not found",
                "tfm_native": "not here: tfm_native is not built: `tfm build` compiles it",
                "native on cpu": "not here: tfm_native is not built: `tfm build` compiles it",
            },
        ),
        ({}, BLOCKED.format(package="triton"), {"triton on cpu": "not here: triton is not installed"}),
        ({}, HOMELESS, {"native on cpu": f"not here: tfm_native cannot be looked for: {NO_HOME}"}),
    ],
    ids=["no compiler, no nvcc", "no triton", "no account and no HOME"],
)  # fmt: skip
def test_a_machine_that_lacks_something_works_and_says_so(environment, before, rows):
    program = f"""{before}
import torch
from tfm import ops
x = torch.randn(3, 8)
assert torch.equal(ops.layer_norm(x, impl="auto").isnan().any(), torch.tensor(False))
from tfm.cli.doctor import doctor
doctor()
"""
    said = run(program, environment=WITHOUT | environment)
    found = {line[:19].strip(): line[19:] for line in said}
    assert found["reference on cpu"].startswith("works (greatest error ")
    for name, words in rows.items():
        assert found[name].startswith(words), found[name]


def test_a_build_without_a_home_is_one_line():
    command = [sys.executable, "-c", f"{HOMELESS}from tfm.cli import main\nmain()", "build"]
    finished = subprocess.run(command, cwd=ROOT, env=os.environ | WITHOUT, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (2, f"tfm: error: {NO_HOME}\n")
