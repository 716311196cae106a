"""The parts of pages that records write: where each stands, and what makes its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.report import families, front, huggingface, presets, questions, tables, versions
from tools.report.records import Record, rows_of_versions


class Part(NamedTuple):
    """A part of a page, between two markers that bear its name.

    Attributes:
        page: the file it stands in, from the root of the repository.
        name: unique within its page.
        text: makes the Markdown between the markers, from the records and the root.
    """

    page: str
    name: str
    text: Callable[[Sequence[Record], Path], str]

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}, written by python -m tools.report -->"

    @property
    def end(self) -> str:
        return f"<!-- end of {self.name} -->"

    def written_into(self, page: str, text: str) -> str:
        """Returns `page` with `text` between this part's markers.

        Raises:
            ValueError: a marker is missing.
        """
        head, begin, rest = page.partition(self.begin)
        _, end, tail = rest.partition(self.end)
        if not begin or not end:
            raise ValueError(f"{self.page}: expected the lines {self.begin!r} and {self.end!r}")
        return f"{head}{begin}\n\n{text}\n\n{end}{tail}"


# README keeps what decides whether someone reads on: will it run with my torch, does it train faster, and which
# operations gain.
PARTS = (
    Part("README.md", "versions", lambda records, root: versions.table(rows_of_versions(records))),
    Part("README.md", "training speed", front.training_speed),
    Part("README.md", "operations", front.operations),
    Part("README.md", "families", lambda records, root: families.summary()),
    Part("docs/huggingface.md", "families", lambda records, root: families.table()),
    Part("docs/translation.md", "presets", lambda records, root: presets.table()),
    Part("docs/first-gpu-run.md", "open questions", lambda records, root: questions.table()),
    Part("benchmarks/README.md", "measurements", tables.markdown),
    Part("benchmarks/README.md", "Hugging Face's models", lambda records, root: huggingface.table(records)),
    Part("benchmarks/README.md", "failures", lambda records, root: versions.failures(rows_of_versions(records))),
)
PAGES = tuple(dict.fromkeys(part.page for part in PARTS))


def written(page: str, text: str, records: Sequence[Record], root: Path) -> str:
    """Returns the `text` of `page` with all its parts as the records have them."""
    for part in PARTS:
        if part.page == page:
            text = part.written_into(text, part.text(records, root))
    return text
