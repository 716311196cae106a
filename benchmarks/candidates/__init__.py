"""What benchmarks.tune tries: for each function of tfm.kernels.launch the open question, candidates and a prediction.

One file for each family of kernels. A new one adds its SWEEPS to FAMILIES.
"""

from benchmarks.candidates import attention, cross_entropy, layer_norm, matmul, short_attention

FAMILIES = {
    "layer_norm": layer_norm.SWEEPS,
    "attention": attention.SWEEPS,
    "short_attention": short_attention.SWEEPS,
    "matmul": matmul.SWEEPS,
    "cross_entropy": cross_entropy.SWEEPS,
}
