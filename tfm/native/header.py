"""The arguments of the operators as csrc takes them: C++ made from the declarations in tfm/operators.

For each subject a header, operators/norm.h, with a struct for each operator of it, tfm::arguments::ResidualNorm, whose
members are the operator's arguments. So csrc states no list of arguments of its own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from tfm.files import write_atomically
from tfm.operators import OPERATORS, Operator

TYPES = {
    "Tensor": "Tensor", "int": "int64_t", "SymInt": "int64_t", "float": "double", "bool": "bool", "str": "std::string",
    "ScalarType": "ScalarType", "bool[]": "std::vector<bool>", "Tensor[]": "std::vector<Tensor>",
}  # fmt: skip
HEAD = """// Made from tfm/operators/{subject}.py.
#pragma once

#include "common/operator.h"

namespace tfm::arguments {{
"""


def headers() -> dict[str, str]:
    """Returns the text of each header, by its path within the folder."""
    subjects: dict[str, list[Operator]] = {}
    for item in OPERATORS.values():
        subjects.setdefault(item.subject, []).append(item)
    return {
        f"operators/{subject}.h": "\n".join(
            [HEAD.format(subject=subject), *map(_struct, operators), "} // namespace tfm::arguments", ""]
        )
        for subject, operators in subjects.items()
    }


def digest() -> str:
    """Returns a word that changes with any of the headers: it tells a library of other declarations."""
    return hashlib.sha256(repr(sorted(headers().items())).encode()).hexdigest()[:20]


def write(folder: Path) -> Path:
    """Writes the headers into `folder`, which compilers then search; unchanged ones keep their time of writing."""
    made = headers() | {"operators/digest.h": f'#define TFM_DECLARATIONS "{digest()}"\n'}
    for name, text in made.items():
        path = folder / name
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.encode())
    return folder


def _struct(item: Operator) -> str:
    members, takes = [], []
    for place, (name, kind) in enumerate(item.kinds.items()):
        plain = TYPES[kind.removesuffix("?").replace("(!)", "")]
        cpp = f"std::optional<{plain}>" if kind.endswith("?") else plain
        members.append(f"    {cpp} {name};")
        takes.append(f"            torch::stable::detail::to<{cpp}>(stack[{place}]),")
    return "\n".join(
        [
            f"struct {item.arguments.__name__} {{",
            f'    static constexpr const char* NAME = "{item.name}";',
            f"    static constexpr uint64_t COUNT = {len(members)};",
            *members,
            "",
            f"    static {item.arguments.__name__} take(StableIValue* stack) {{",
            "        return {",
            *takes,
            "        };",
            "    }",
            "};",
            "",
        ]
    )
