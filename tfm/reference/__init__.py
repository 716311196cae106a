"""Every operation in plain PyTorch: the backend of CPUs, and the definition that kernels are held against."""
