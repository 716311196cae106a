"""Valid JSON in which one thing is not as it was, and what a refusal of it looks like."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tfm.errors import UserError

odd_numbers = st.sampled_from([0, -1, 1.5, True, 10**30, 10**400, 2**63, 1e308, math.inf, math.nan, -0.0])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | odd_numbers
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
deep = st.integers(1, 3).map(lambda power: json.loads("[" * 50 * power + "]" * 50 * power))
anything = st.one_of(values, deep)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested JSON."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path, *(place for key in keys for place in places(value[key], (*path, key)))]


@st.composite
def altered(draw: st.DrawFn, whole: Any) -> bytes:
    """JSON with one thing in it replaced, left out, added or torn."""
    whole = json.loads(json.dumps(whole))
    path = draw(st.sampled_from(places(whole)))
    if path:
        *before, last = path
        holder = whole
        for key in before:
            holder = holder[key]
        if draw(st.booleans()):
            holder[last] = draw(anything)
        else:
            del holder[last]
        if isinstance(holder, dict) and draw(st.booleans()):
            holder[draw(st.text(max_size=3))] = draw(anything)
    else:
        whole = draw(anything)
    data = json.dumps(whole, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(max_size=2)) + data[place + draw(st.integers(0, 3)) :]
    return data


def check_line(refusal: UserError, path: Path) -> None:
    """One line that names its file."""
    assert str(refusal).startswith(str(path))
    assert len(str(refusal).splitlines()) == 1
