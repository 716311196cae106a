"""What check_kernels compiles: every kernel at its launch settings, with the flags that need the most registers."""
