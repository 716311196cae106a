"""Writes tables and pictures of what was measured into the pages, and marks where the tree has moved on since.

    python -m tools.report [--check]

Writes the parts between markers of README.md (the versions tried, the speed of training, a row an operation), of
benchmarks/README.md (every measurement, from the newest record of each device) and of docs/translation.md (the presets,
from tfm/config.py), and the charts beside the records. An operation is marked stale when a source file that its numbers
rest upon has changed since. Prints what no record covers.

With --check nothing is written: exit status 1 where a page differs from what the records say.
"""
