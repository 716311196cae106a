"""A hook of MkDocs: finds where each public name on the pages of docs/reference/ is defined.

A page says `::: tfm.ops.attention`; what is documented is the object that this name has once tfm is imported, so that a
definition may move from file to file. `::: tfm.ops.*` stands for what is public there and not named on the page.
"""

from __future__ import annotations

import re
from functools import reduce
from importlib import import_module
from typing import Any

DIRECTIVE = re.compile(r"^::: (tfm(?:\.\w+)+)$", re.MULTILINE)
REST = re.compile(r"^::: (tfm(?:\.\w+)*)\.\*$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns a page whose directives name definitions, under headings that name what users import."""
    return DIRECTIVE.sub(lambda found: _directive(found[1]), complete(markdown))


def complete(markdown: str) -> str:
    """Returns a page that names all it documents: `tfm.ops.*` is replaced by whatever it does not name of tfm.ops."""
    named = set(DIRECTIVE.findall(markdown))

    def rest(found: re.Match[str]) -> str:
        every = (f"{found[1]}.{name}" for name in import_module(found[1]).__all__)
        return "\n\n".join(f"::: {name}" for name in every if name not in named)

    return REST.sub(rest, markdown)


def _directive(name: str) -> str:
    definition = public(name)
    heading = name.removeprefix("tfm.") if name.count(".") > 1 else name
    where = f"{definition.__module__}.{definition.__qualname__}"
    return f"::: {where}\n    options:\n      heading: {heading}\n      toc_label: {heading}"


def public(name: str) -> Any:
    """Returns the object that users reach by this dotted name.

    Raises:
        AttributeError, ModuleNotFoundError: there is none.
    """
    package, *rest = name.split(".")
    found = import_module(package)
    try:
        return reduce(getattr, rest, found)
    except AttributeError:
        return getattr(import_module(name.rpartition(".")[0]), rest[-1])
