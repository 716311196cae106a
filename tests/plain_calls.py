"""Calls without routes: what a call that takes one is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tfm.operators import calling
from tfm.ops import routing


@contextmanager
def plainly() -> Iterator[None]:
    """Within the block no call has a route."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "is_watched", lambda: True)
        patch.setattr(calling, "is_watched", lambda: True)
        yield
