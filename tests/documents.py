"""The pages people read, their links and their samples, taken apart."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = tuple(
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        ROOT / "benchmarks" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
NAMED_PATH = re.compile(r"`((?:kernels|csrc|tfm|tests|benchmarks|tools|docs|examples)/[\w./-]*)`")


class Sample(NamedTuple):
    """A block of code: its language, its text, and the line of the page where it begins."""

    language: str
    code: str
    line: int


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def samples(page: str, language: str) -> list[Sample]:
    """Returns the blocks of a page in a language, in order."""
    text = read(page)
    found = (Sample(match[1], match[2], text[: match.start()].count("\n") + 2) for match in BLOCK.finditer(text))
    return [sample for sample in found if sample.language == language]


def run_samples(page: str) -> None:
    """Runs a page's samples in order: what one defines, the next of its kind may use.

    Raises:
        AssertionError: a result differs from the one shown; or whatever a sample raises.
    """
    names: dict[str, object] = {}
    for sample in samples(page, "python"):
        exec(compile("\n" * (sample.line - 1) + sample.code, str(ROOT / page), "exec"), names)
    names = {"__name__": page}
    runner, said = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), []
    for sample in samples(page, "pycon"):
        test = doctest.DocTestParser().get_doctest(sample.code, names, page, page, sample.line - 1)
        runner.run(test, out=said.append, clear_globs=False)
        names = test.globs
    assert runner.failures == 0, "".join(said)


def prose(page: str) -> str:
    """Returns a page without its blocks of code."""
    return BLOCK.sub("", read(page))


def relative_links(page: str) -> list[str]:
    """Returns what a page links to within the repository."""
    return [target for target in LINK.findall(prose(page)) if not re.match(r"[a-z]+:", target)]


def anchors(page: str) -> set[str]:
    """Returns the names of a page's headings in links, as GitHub and MkDocs form them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: str) -> Iterator[str]:
    """Yields the lines of a page's shell samples, without comments."""
    for sample in samples(page, "sh"):
        for line in sample.code.splitlines():
            if command := line.partition(" #")[0].strip():
                yield command
