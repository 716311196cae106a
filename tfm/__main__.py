"""`tfm` and `python -m tfm`: the command line, or a line that says which packages it lacks."""

from __future__ import annotations

import sys

from tfm.errors import MissingExtra


def main() -> None:
    """Runs the command line."""
    try:
        from tfm.cli import main as run
    except MissingExtra as error:
        print(f"tfm: error: {error}; tfm[translate] brings every command", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
