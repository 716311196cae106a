"""What a long benchmark says while it runs: lines on stderr, which no record and no table is part of."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
