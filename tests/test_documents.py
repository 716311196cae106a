"""Pages link to what exists, name files that exist, and hold samples and commands that run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import documents
import pytest
from documents import PAGES, ROOT

import tfm
from tools import reference

WITH_SAMPLES = [page for page in PAGES if documents.samples(page, "python") or documents.samples(page, "pycon")]
WITH_COMMANDS = [page for page in PAGES if documents.samples(page, "sh")]
# What ends a training early: the command is the page's, its length is not.
BRIEFLY = "--max-steps 3 --warmup 1 --vocab-size 400 --threads 1"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in documents.relative_links(page):
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in documents.anchors(str(path.resolve().relative_to(ROOT))), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    for name in documents.NAMED_PATH.findall(documents.prose(page)):
        assert (ROOT / name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("page", WITH_SAMPLES)
def test_samples_run(page, tmp_path, monkeypatch, request):
    if "runs/en-de" in documents.read(page):
        shutil.copytree(request.getfixturevalue("trained")[0], tmp_path / "runs" / "en-de")
    monkeypatch.chdir(tmp_path)
    documents.run_samples(page)


@pytest.mark.parametrize(
    ("sample", "error"),
    [
        ("```pycon\n>>> one = 1\n\n```\n\n```pycon\n>>> one + 1\n3\n\n```\n", "page.md.*line 7.*Expected.*3.*Got.*2"),
        ("```python\nassert False, 'a sample'\n```\n", "a sample"),
    ],
    ids=["a result", "an error"],
)
def test_a_wrong_sample_is_noticed(sample, error, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(sample)
    with pytest.raises(AssertionError, match=f"(?s){error}"):
        documents.run_samples("page.md")


def test_links_and_files_are_found_outside_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("# A page, [gone](gone.md#x)\n\n`tfm/gone.py`\n\n```sh\n[a](b) `tfm/c`\n```\n")
    assert documents.relative_links("page.md") == ["gone.md#x"]
    assert documents.NAMED_PATH.findall(documents.prose("page.md")) == ["tfm/gone.py"]


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in documents.commands(page):
        words = command.split()
        if words[0] == "make":
            assert words[1] in targets, f"{page}: {command}"
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, f"{page}: {command}"
        else:
            assert words[0] in ("tfm", "echo"), f"{page}: {command}"


@pytest.mark.long
@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_run(page, tmp_path, trained):
    """Those of tfm, in a shell, in a folder with the files that pages speak of."""
    if not any("tfm " in command for command in documents.commands(page)):
        pytest.skip("only commands of make and python")
    shutil.copytree(trained[0], tmp_path / "runs" / "demo")
    for name in ("train", "mine", "test"):
        for text, languages in (("source", ("en", "fr")), ("target", ("de",))):
            for language in languages:
                shutil.copy(trained[0].parent / f"{text}.txt", tmp_path / f"{name}.{language}")
    shutil.copy(trained[0].parent / "target.txt", tmp_path / "mine.en")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "tfm"
    program.write_text(f'#!/bin/sh\n[ "$1" = train ] && set -- "$@" {BRIEFLY}\nexec {sys.executable} -m tfm "$@"\n')
    program.chmod(0o755)
    given = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    script = "\n".join(command for command in documents.commands(page) if "tfm " in command)
    finished = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", script], cwd=tmp_path, env=given, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


def test_the_reference_names_everything_public():
    named = {name for page in PAGES for name in reference.DIRECTIVE.findall(reference.complete(documents.read(page)))}
    packages = {
        "tfm": set(tfm.__all__) - {"__version__", "nn", "ops"},
        "tfm.nn": tfm.nn.__all__,
        "tfm.ops": tfm.ops.__all__,
    }
    for package, public in packages.items():
        assert {f"{package}.{name}" for name in public} <= named
    for name in named:
        assert reference.public(name).__doc__, name
    imported = re.findall(r"^from (tfm\.\w+) import (.+)$", documents.read("README.md"), re.MULTILINE)
    assert {f"{module}.{name}" for module, names in imported for name in names.split(", ")} <= named


def test_versions_agree():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in documents.read("CITATION.cff")
    assert re.search(r"^## \[(.+)\]", documents.read("CHANGELOG.md"), re.MULTILINE)[1] == version


def test_hooks_are_what_make_check_calls():
    """But for the files that each is given."""
    hooks = re.findall(r"^ +entry: (.+)$", documents.read(".pre-commit-config.yaml"), re.MULTILINE)
    recipe = re.search(r"^check: .+\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    checks = [line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" $(CPP)") for line in recipe.splitlines()]
    assert hooks == [check.removesuffix(" .") for check in checks]


@pytest.mark.long
@pytest.mark.parametrize("broken", ["", "[gone](gone.md)", "[gone](numbers.md#gone)", "::: tfm.gone"])
def test_the_site_builds_and_fails_where_something_is_broken(broken, tmp_path):
    """By the command of `make docs`, on a copy of the pages."""
    pytest.importorskip("mkdocs")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for folder in ("tools", "tfm", "kernels", "csrc"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write(f"\n{broken}\n")
    recipe = re.search(r"^docs: .+\n\t(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    command = recipe.replace("$(BIN)/python", sys.executable)
    finished = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (finished.returncode == 0) == (not broken), finished.stderr
    if broken:
        assert "gone" in finished.stderr
    else:
        assert "ops.attention" in (tmp_path / "build" / "docs" / "reference" / "ops.html").read_text(encoding="utf-8")
