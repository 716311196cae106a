"""The way from parallel text to batches.

text.py reads it, compressed.py decompresses it, plan.py encodes it and cuts it into batches, batch.py holds a batch.
"""

from tfm.data.batch import IGNORED, Batch
from tfm.data.compressed import opened
from tfm.data.plan import BatchPlan, EncodedPairs, batches, encode_parallel
from tfm.data.text import ParallelText, lines_of, read_lines, read_parallel, split_lines

__all__ = [
    "IGNORED",
    "Batch",
    "BatchPlan",
    "EncodedPairs",
    "ParallelText",
    "batches",
    "encode_parallel",
    "lines_of",
    "opened",
    "read_lines",
    "read_parallel",
    "split_lines",
]
