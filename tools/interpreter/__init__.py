"""Triton's interpreter made to prove more: bf16 as a GPU computes it, and every access of memory checked."""
