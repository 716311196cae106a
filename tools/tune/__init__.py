"""Tries launch settings and backends on this GPU, and says which are faster than today's and which guesses were wrong.

    python -m tools.tune all --seconds 540 [--out FILE]
    python -m tools.tune norm [--size 8192x1024] [--dtype fp16]
    python -m tools.tune all --list                                       # the questions; needs no GPU
    python -m tools.tune all --seconds 60 --rehearse                      # Triton's interpreter, tiny sizes

What is tried lies in tools/tune/candidates/, beside the question and the prediction; what promises most comes first.
Each candidate must match float64 as closely as today's choice or plain torch does before it is timed. First all of them
run once, untimed, in as many processes as there are cores: Triton's cache is warm afterwards. Then one process times
them, one after the other; where it dies or hangs, another goes on behind the candidate that it died of. The record is
written anew after each sweep. What is printed last fits into 12,000 characters.
"""
