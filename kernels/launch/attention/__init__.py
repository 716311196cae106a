"""Settings of the kernels of attention."""
