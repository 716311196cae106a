"""Models that already exist, patched in place: accelerate(), graphed() and restore()."""

from tfm.patching.replay import graphed
from tfm.patching.report import Left, Report, Swapped
from tfm.patching.selection import KINDS
from tfm.patching.swap import accelerate, restore

__all__ = ["KINDS", "Left", "Report", "Swapped", "accelerate", "graphed", "restore"]
