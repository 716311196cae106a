"""One command that measures everything on one NVIDIA GPU, in at most nine minutes by its own clock.

    python -m tools.gpu [--only attention,norm] [--quick] [--data DIR] [--out FILE]
    python -m tools.gpu --rehearse        # the same without a GPU: interpreted kernels, tiny shapes

Environment, csrc built and every kernel compiled for this GPU, the two ceilings, the GPU tests, compute-sanitizer,
every benchmark, Nsight Compute over the two cases furthest from their ceiling, training steps, and with --data the BLEU
of a trained model: parts in turn, each within its share of the time that is left, each in processes of its own, so that
none takes another down. The record is written anew after each part; a short table comes last. Exit status 0; 1 where a
part or a test failed; 2 for a mistake on the command line.

A GPU that is lent for minutes is called twice, five minutes each, and each call leaves a record of its own:

    python -m tools.gpu --call proof                                # what fails is mended first
    python -m tools.gpu --call speed --data DIR

Where there is more time, on a GPU that has not been seen before, in this order:

    python -m tools.gpu --call proof
    python -m tools.tune all --seconds 540                          # rows to paste, predictions that missed
    python -m tools.gpu --data DIR                                  # the record

Needs a checkout and a `python3` with torch, triton, pytest, pytest-benchmark and pytest-xdist; nothing is installed.
"""

import time

# Taken before torch is imported: its seconds are on the clock, too.
STARTED = time.perf_counter()
