"""The package as installed: names, one copy of each module, and every folder on board."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tfm

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


def run(program: str, cwd: Path = ROOT, python: tuple[str, ...] = (sys.executable,)) -> list[str]:
    finished = subprocess.run([*python, "-c", program], cwd=cwd, capture_output=True, text=True, check=False)
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


def test_version_is_a_string():
    assert isinstance(tfm.__version__, str)
    assert tfm.__version__[0].isdigit()


def test_every_module_is_imported_once_and_shadows_nobody(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OWNER = 'somebody else'")
    report = f"""
names = [name for name in sys.modules if name.startswith("tfm.")]
print(*names)
print(*(name for name in sys.modules if name.startswith("tfm.tfm") or name.split(".")[0] == "kernels"))
files = [getattr(sys.modules[name], "__file__", None) for name in names]
print(*(file for file in set(files) if file and files.count(file) > 1))
sys.path.append({str(tmp_path)!r})
import kernels
print(kernels.OWNER)
"""
    imported, doubled, twice, owner = run(IMPORT_EVERYTHING + report)
    assert {"tfm.kernels.layer_norm", "tfm.cli", "tfm.reference.attention", "tfm.demo"} <= set(imported.split())
    assert doubled == twice == ""
    assert owner == "somebody else"


def test_kernels_are_no_package_of_their_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tfm" / "kernels").exists()


def test_every_folder_of_modules_is_packaged():
    program = """
import sys, setuptools
setuptools.setup = lambda **options: print(*options["packages"], options["package_dir"], sep="\\n")
exec(open("setup.py").read())
"""
    *packages, directories = run(program)
    assert len(packages) == len(set(packages))
    assert set(packages) == packages_in_the_tree().keys() | {"tfm.kernels"}
    assert ast.literal_eval(directories) == {"tfm": "tfm", "tfm.kernels": "kernels"}


def test_every_folder_of_modules_has_its_init():
    for package, folder in packages_in_the_tree().items():
        assert (folder / "__init__.py").exists(), package


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package, built from a copy of the sources and installed into a folder of its own."""
    copy, target = (tmp_path_factory.mktemp(name) for name in ("source", "site"))
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    finished = subprocess.run([*pip, "--target", str(target), str(copy)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return target


@pytest.mark.xdist_group("installed")
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


@pytest.mark.xdist_group("installed")
def test_ships_what_it_needs_and_nothing_else(installed):
    assert (installed / "tfm" / "py.typed").exists()
    sources = {path.relative_to(ROOT) for path in (ROOT / "tfm").rglob("*.py")}
    sources |= {Path("tfm") / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    shipped = {path.relative_to(installed) for path in installed.rglob("*.py")}
    assert shipped == sources
    assert (installed / "bin" / "tfm").exists()
    assert any(installed.glob("tfm-*.dist-info/licenses/LICENSE"))
