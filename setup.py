"""Where the packages lie, and the native operators of a wheel; everything else is in pyproject.toml.

`kernels/` and `csrc/` stand at the root of the repository and are installed inside the package: a top-level package of
the name kernels would shadow Hugging Face's.

A wheel holds the operators compiled, as the module tfm_native, where torch can be imported (pip's
--no-build-isolation) and a C++ compiler and ninja are there; TFM_NATIVE_BUILD=0 leaves them out. Everywhere else, and
where they do not compile, the wheel is pure Python and `tfm build` can compile them later. An editable installation
never compiles: the sources change, and `tfm build` follows them.
"""

import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def native() -> Path | None:
    """The compiled library, None where the wheel is to be pure."""
    if "bdist_wheel" not in sys.argv or os.environ.get("TFM_NATIVE_BUILD") == "0":
        return None
    sys.path.insert(0, str(ROOT))
    try:
        from tfm.native.build import BuildError, Listener, build
    except ImportError as error:
        say(f"tfm: a pure wheel, without native operators: {error} (pip's --no-build-isolation shows it torch)")
        return None
    try:
        return build(listener=Listener(say=print)).library
    except (BuildError, OSError) as error:
        say(f"tfm: a pure wheel, without native operators: {error}")
        return None


def say(line: str) -> None:
    """Prints a line, on the terminal too where there is one: pip shows what a build prints only with --verbose."""
    print(line)
    with suppress(OSError), open("/dev/tty", "w") as terminal:
        terminal.write(f"\n{line}\n")


def description() -> str:
    """README for an index of packages: what it links to in the repository is named instead."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^]]*)\]\((?!https?:)([^)]*)\)", r"\1 (in the repository: `\2`)", readme)


class Copy(build_ext):
    """Puts the library, which is compiled by then, where the wheel takes its modules from."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(LIBRARY, target)


LIBRARY = native()

setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    packages=[
        *find_packages(include=["tfm", "tfm.*"]),
        "tfm.kernels",
        *(f"tfm.kernels.{name}" for name in find_packages("kernels")),
        "tfm.csrc",
    ],
    package_dir={"tfm": "tfm", "tfm.kernels": "kernels", "tfm.csrc": "csrc"},
    include_package_data=False,
    package_data={
        "tfm": ["py.typed"],
        "tfm.demo": ["*.tsv.gz"],
        "tfm.csrc": [f"**/*{suffix}" for suffix in (".cpp", ".h", ".cu", ".cuh")],
    },
    ext_modules=[Extension("tfm_native", sources=[], py_limited_api=True)] if LIBRARY else [],
    cmdclass={"build_ext": Copy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIBRARY else {},
)
