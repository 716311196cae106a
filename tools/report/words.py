"""Sizes in words: records hold them as benchmarks/shapes.py writes them."""

from __future__ import annotations

import re

MASKS = {
    "none": "no mask",
    "causal": "causal",
    "lengths": "padding masked",
    "bias": "a learnt bias",
    "self": "self-attention",
    "cross": "cross-attention",
}
# For each suite, in the order of benchmarks/shapes.py: what its sizes look like, and what the numbers are.
SEQUENCES = r"(?P<n>\d+)x(?P<length>\d+) heads (?P<heads>\d+)x(?P<dim>\d+)"
TABLES = r"(?P<n>\d+)x(?P<columns>\d+)"
PATTERNS = (
    (rf"{SEQUENCES} mask (?P<mask>\w+)", "{n} sentences of {length} tokens, {heads} heads of {dim}, {mask}"),
    (
        rf"{SEQUENCES}(?: of (?P<shared>\d+))? beam (?P<beam>\d+)",
        "{n} hypotheses at token {length}, {heads} heads of {dim}{shared}, beam {beam}",
    ),
    (SEQUENCES, "{n} sentences of {length} tokens, {heads} heads of {dim}"),
    (
        r"(?P<n>\d+) sentences(?: of (?P<lengths>\d+-\d+))? heads (?P<heads>\d+)x(?P<dim>\d+) (?P<mask>\w+)",
        "{n} sentences{lengths}, {heads} heads of {dim}, {mask}",
    ),
    (rf"{TABLES}x(?P<inner>\d+)(?P<gated> gated)?", "{n} tokens, {columns} to {inner} and back{gated}"),
    (
        rf"{TABLES}x(?P<inner>\d+), (?P<chosen>\d+) of (?P<experts>\d+)",
        "{n} tokens, {columns} to {inner} and back, {chosen} of {experts} experts",
    ),
    (rf"{TABLES} of (?P<rows>\d+)", "{n} tokens of {columns}, from {rows} rows"),
    (TABLES, "{n} tokens of {columns}"),
)
LOSS = rf"{TABLES}x(?P<classes>\d+)", "{n} tokens of {columns}, {classes} classes"


def in_words(suite: str, size: str) -> str:
    """Words a case's size for people to read; as it stands where it is of a kind unknown here."""
    size, _, dropout = size.partition(" dropout ")
    size, _, smoothing = size.partition(" smoothing ")
    for pattern, words in (LOSS, *PATTERNS) if suite.endswith("cross_entropy") else PATTERNS:
        if match := re.fullmatch(pattern, size):
            found = {name: _shown(name, value) for name, value in match.groupdict().items()}
            size = words.format(**found)
            break
    rates = [f"dropout {dropout}"] * bool(dropout) + [f"label smoothing {smoothing}"] * bool(smoothing)
    return ", ".join([size, *rates])


def _shown(name: str, value: str | None) -> str:
    if value is None:
        return ""
    if name == "mask":
        return MASKS.get(value, value)
    if name in ("shared", "lengths", "gated"):
        first, _, last = value.partition("-")
        return {"shared": f" over {value}", "lengths": f" of {first} to {last} tokens", "gated": ", gated"}[name]
    return f"{int(value):,}"
