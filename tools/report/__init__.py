"""From records to README: tables and pictures of what was measured, and where the tree has moved on since.

    python -m tools.report [--check]

Writes the parts of README.md between markers, the presets from tfm/config.py, the versions that were tried, and the
measurements from the newest record of each device, and the charts beside the records. A row is marked stale when a
source file that its numbers rest upon has changed since. Prints what no record covers.

With --check nothing is written: exit status 1 where README differs from what the records say.
"""
