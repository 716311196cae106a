"""torch.nn's Transformer layers, under the same names, arguments and state_dict keys, on fused operations.

Results are torch's, with three differences that are kept on purpose, in training and evaluation alike:

* a query whose keys are all masked gets attention output 0 and zero gradients, where torch gives NaN with
  need_weights=True and on its fast path;
* positions that a key padding mask or lengths call padding are 0 in the output of a layer or stack;
* whatever stands in padding, NaN included, reaches no valid output; a decoder that is given no mask for its memory
  attends to zeros there.

`is_causal=True` without a mask, which torch refuses, means causal; keys of add_bias_kv and add_zero_attn stay visible
under it.

Besides, `TransformerXLDecoderLayer` is Transformer-XL's layer, which torch.nn does not have.

There is one code path: dropout apart, training and evaluation run the same operations and give the same shapes.
"""

from tfm.nn.attention import MultiheadAttention
from tfm.nn.layers import TransformerDecoderLayer, TransformerEncoderLayer
from tfm.nn.norm import LayerNorm, RMSNorm
from tfm.nn.quantization import register
from tfm.nn.stacks import Transformer, TransformerDecoder, TransformerEncoder
from tfm.nn.transformer_xl import TransformerXLDecoderLayer, relative_positions

__all__ = [
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "TransformerXLDecoderLayer",
    "relative_positions",
]

register()
