"""What check_kernels compiles: every kernel at its launch settings, with the flags that need the most registers.

One file for each file of kernels/. A new kernel adds its function to ALL.
"""

from benchmarks.kernel_cases.layer_norm import layer_norm_cases

ALL = (layer_norm_cases,)
