"""Triton's interpreter made to prove more: bf16 as a GPU computes it, and every access of memory checked."""

from __future__ import annotations

from tfm.ops import backends


def mend() -> None:
    """Makes bf16 right where kernels run in the interpreter; call it before they do."""
    if backends.has_triton() and backends.interpreting():
        from tools.interpreter import bfloat16

        bfloat16.install()
