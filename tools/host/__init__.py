"""The host's work for every operation, counted and timed without a GPU: launches, syncs, compilations, microseconds.

    make host        or        python -m tools.host [--counts] [--compare] [--out FILE]

Triton is given a driver of an H200 that launches nothing, and tfm takes CPU tensors as it takes a GPU's. Launches,
syncs and compilations are exact, the same on any processor; tests/test_host.py holds them against the committed
benchmarks/results/host.json. Times are this processor's, told as multiples of one torch.add in the same run.
"""
