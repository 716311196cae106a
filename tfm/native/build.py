"""Compiles the native library with ninja: what changed, under a lock, and in place only when it is whole.

Objects stay in a folder of their own for each checkout, torch and compiler, so that a changed file is all that is
compiled. The library goes to recipe.library, a name that follows from the sources: an older library is never taken for
a newer one, and going back to older sources finds theirs again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tfm.files import write_atomically
from tfm.native import header, recipe, toolchain
from tfm.native.recipe import BuildError, Object
from tfm.native.toolchain import Cuda

KEPT_BUILDS = 8
RULES = """
ninja_required_version = 1.5
rule host
  command = $compiler -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $label
rule device
  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $label
rule link
  command = $compiler $in -o $out $flags
  description = $label
"""


@dataclass(frozen=True)
class Listener:
    """The functions that are told: `report` of each object, done, of how many, and which; `say` of all else.

    `verbose`: not `report`, but each command and its output go to `say`.
    """

    report: Callable[[int, int, str], object] = lambda *_: None
    say: Callable[[str], object] = lambda _: None
    verbose: bool = False


SILENT = Listener()


@dataclass(frozen=True)
class Built:
    """The compiled library. `is_new`: it was compiled now. `cuda` says for which GPUs, or why for none."""

    library: Path
    is_new: bool
    cuda: Cuda


def build(force: bool = False, with_cuda: bool = True, listener: Listener = SILENT) -> Built:
    """Compiles the library of this checkout or installation into the cache, unless it is there already.

    Args:
        force: compile everything anew.
        with_cuda: the CUDA part too, where nvcc is.
        listener: is told.

    Raises:
        BuildError: no compiler, an error in the sources, sources that changed meanwhile.
    """
    csrc = recipe.sources()
    if csrc is None:
        raise BuildError("the sources, csrc, are not installed with this package")
    cxx, cuda = toolchain.compiler(), toolchain.cuda(with_cuda)
    versions = [toolchain.version_of(command) for command in (cxx, *([[str(cuda.nvcc)]] if cuda.nvcc else []))]
    library = recipe.library(csrc, torch.__version__, header.digest())
    stamp = library.with_suffix(".json")
    made = json.dumps({"compilers": versions, "command": cxx, "gencode": cuda.gencode})
    if not force and library.is_file() and stamp.is_file() and stamp.read_text() == made:
        return Built(library, False, cuda)
    key = hashlib.sha256(repr((str(csrc), str(toolchain.torch_folder()), torch.__version__, versions)).encode())
    folder = recipe.cache() / "objects" / key.hexdigest()[:20]
    try:
        product = compile_library(folder, csrc, cuda, force=force, listener=listener)
    except BuildError as error:
        raise (BuildError(f"{error}; `tfm build --no-cuda` leaves CUDA out") if cuda.gencode else error) from None
    if recipe.library(csrc, torch.__version__, header.digest()) != library:
        raise BuildError("the sources changed while they were compiled: run it again")
    write_atomically(library, product.read_bytes())
    write_atomically(stamp, made.encode())
    _prune(library.parent.parent)
    _prune(folder.parent)
    return Built(library, True, cuda)


def compile_library(
    folder: Path,
    csrc: Path,
    cuda: Cuda,
    extra: tuple[str, ...] = (),
    force: bool = False,
    listener: Listener = SILENT,
) -> Path:
    """Compiles in `folder` what changed in `csrc` since the last time there; `extra` goes to compiler and linker.

    Raises:
        BuildError: as `build`.
    """
    libraries = [f"-L{toolchain.torch_folder() / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if cuda.gencode:
        libraries += cuda.libraries
    flags = ["-shared", *extra, "-Wl,--no-as-needed", *libraries]
    objects = recipe.objects(csrc, cuda.gencode, extra)
    return run_ninja(folder, objects, "tfm_native.so", csrc, flags, cuda, force, listener)


def run_ninja(
    folder: Path,
    objects: Sequence[Object],
    product: str,
    csrc: Path,
    link_flags: Sequence[str],
    cuda: Cuda,
    force: bool = False,
    listener: Listener = SILENT,
) -> Path:
    """Compiles and links `objects` into `folder`/`product`."""
    ninja, compiler = toolchain.ninja(), toolchain.compiler()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock", listener) as lock:
        if force:
            for path in folder.glob("*.o"):
                path.unlink()
        header.write(folder)
        rules = _ninja_file(objects, product, toolchain.includes(csrc, folder), link_flags, compiler, cuda)
        (folder / "build.ninja").write_text(rules)
        command = [ninja, "-C", str(folder)] + ["-v"] * listener.verbose
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        environment = os.environ | {"NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"}
        lines = []
        # ninja holds the lock as well: where this process is killed, nobody else compiles until ninja has ended too.
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            pass_fds=(lock,),
        ) as process:  # fmt: skip
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    lines.append(line)
                    place = re.match(r"\[(\d+)/(\d+)\] (.*)", line)
                    if listener.verbose:
                        listener.say(line.rstrip("\n"))
                    elif place:
                        listener.report(int(place[1]), int(place[2]), place[3])
            except BaseException:
                process.terminate()
                raise
        log = folder / "build.log"
        log.write_text("".join(lines))
    if process.returncode != 0:
        raise BuildError(f"{_first_error(lines, csrc)} (everything: {log})")
    return folder / product


def _ninja_file(
    objects: Sequence[Object], product: str, includes: Sequence[str], link_flags: Sequence[str],
    compiler: Sequence[str], cuda: Cuda,
) -> str:  # fmt: skip
    lines = [f"compiler = {_words(compiler)}", f"nvcc = {_words([str(cuda.nvcc), '-ccbin', compiler[0]])}", RULES]
    for item in objects:
        rule = "device" if item.is_device else "host"
        lines += [f"build {item.file}: {rule} {_path(item.source)}", f"  flags = {_words([*item.flags, *includes])}"]
        lines += [f"  label = {item.label}"]
    names = " ".join(item.file for item in objects)
    lines += [f"build {product}: link {names}", f"  flags = {_words(link_flags)}", f"  label = {product}"]
    return "\n".join([*lines, f"default {product}", ""])


def _words(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _first_error(lines: Sequence[str], csrc: Path) -> str:
    """Returns the compiler's first error, without the path to the sources."""
    wrong = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE) and not line.startswith("[")]
    undefined = [line for line in lines if "undefined reference" in line]
    first = next(iter([*wrong[:1], *undefined, *lines[-1:]]), "ninja failed without a word")
    return " ".join(first.replace(f"{csrc}{os.sep}", "csrc/").split())


@contextmanager
def _locked(path: Path, listener: Listener) -> Iterator[int]:
    """Holds the folder alone, with whoever inherits the lock's file, until the last of these processes ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            listener.say("waiting for another build to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _prune(folder: Path) -> None:
    """Deletes all but the newest builds."""
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT_BUILDS]:
        shutil.rmtree(path, ignore_errors=True)
