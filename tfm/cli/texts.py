"""The places of a run's text: from the command line, or from paths.json to resume from another folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from tfm.checkpoint import Run, contents
from tfm.errors import UserError
from tfm.files import write_atomically
from tfm.records import Started, parse


@dataclass(frozen=True)
class Texts:
    """The files of the parallel text; None where one is not given."""

    source: Path | None = None
    target: Path | None = None
    valid_source: Path | None = None
    valid_target: Path | None = None

    def write(self, run: Run) -> None:
        """Writes the paths to paths.json as URIs, which hold a path of any bytes."""
        known = {name: None if path is None else path.resolve().as_uri() for name, path in vars(self).items()}
        write_atomically(run.paths, (json.dumps(known, indent=2) + "\n").encode())

    @classmethod
    def read(cls, run: Run, started: Started) -> Texts:
        """Returns what `write` wrote; for a run older than paths.json, what its config.json tells."""
        if not run.paths.is_file():
            return cls(**{name: _path(getattr(started, name), run.config) for name in vars(cls())})
        known = parse(dict[str, str | None], contents(run.paths), run.paths)
        return cls(**{name: _path(_from_uri(known.get(name), run.paths), run.paths) for name in vars(cls())})


def _path(text: str | None, place: Path) -> Path | None:
    if text is not None and "\0" in text:
        raise UserError(f"{place}: {text!r}: not a path")
    return None if text is None else Path(text)


def _from_uri(uri: str | None, place: Path) -> str | None:
    try:
        return None if uri is None else os.fsdecode(unquote_to_bytes(urlsplit(uri).path))
    except ValueError as error:
        raise UserError(f"{place}: {uri!r}: not a URI ({error})") from None
