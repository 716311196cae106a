"""Says how far a long benchmark is: lines on stderr, apart from records and tables."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
