"""Compiles every kernel for GPUs that need not be here, and fails on what must not ship: `make check-kernels`."""
