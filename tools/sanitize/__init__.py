"""Runs every kernel under what watches memory: Triton's interpreter, compute-sanitizer, and g++'s sanitizers."""
