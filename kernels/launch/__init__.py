"""Launch settings as pure functions of the problem: no autotuning, the same on every run, testable without a GPU.

Each module has the name of a subject. Matmuls apart, block sizes never depend on the number of rows, so that a row's
numbers do not change with the batch around it.
"""
