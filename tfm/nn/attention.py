"""Multi-head attention ("Attention Is All You Need", section 3.2.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm import ops
from tfm.errors import AssertedArgument, BadArgument
from tfm.nn.leaf import leaf
from tfm.nn.masks import AttentionMask, PaddedMask, merge_masks
from tfm.nn.packing import SequenceInput, check_same_batch, padded_mask


@leaf
class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`: concat(head_1, ..., head_h) W^O, head_i = attention(Q W_i^Q, K W_i^K, V W_i^V).

    Arguments, masks and results are torch's. A query whose keys are all masked gets attention output 0, where torch
    gives NaN if it returns weights; `is_causal=True` without a mask, which torch refuses, means causal. Queries are
    never packed.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from each query to the keys in every head, and projects the heads' outputs (figure 2, right).

        Args:
            query: [B, Sq, E] (batch_first), [Sq, B, E] or, without a batch, [Sq, E].
            key: likewise, [.., kdim].
            value: likewise, [.., vdim].
            key_padding_mask: [B, Sk] or [Sk]: bool (True = padding), or floating point, added to the scores of its key.
            need_weights: also return the softmax weights, which then exist in memory.
            attn_mask: [Sq, Sk] or [B · H, Sq, Sk]: bool (True = masked), or floating point, added to the scores.
            average_attn_weights: the mean of the weights over heads rather than each head's.
            is_causal: hint that `attn_mask` is the causal mask, which then need not be read.

        Returns:
            The output in the form of `query`, and the weights [B, Sq, Sk] or [B, H, Sq, Sk] (no B without a batch), or
            None. With dropout the weights are those applied.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        _check_dimensions(query, key, value)
        queries = SequenceInput.of("query", query, self.batch_first)
        keys = SequenceInput.of("key", key, self.batch_first, key_padding_mask)
        check_same_batch(query=queries, key=keys)
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertedArgument(
                f"value: expected {tuple(key.shape[:-1])} rows like key, got shape {tuple(value.shape)}"
            )
        q, k, v = project(self, query, key, value)
        if not queries.batched:
            q, k, v = q[None], k[None], v[None]
        # torch, too, reads the mask rather than the hint where it returns weights.
        hint = is_causal and (attn_mask is None or not need_weights)
        mask = padded_mask(queries, keys, self.num_heads, attn_mask, hint)
        if self.bias_k is not None or self.add_zero_attn:
            mask = _seeing_extra_keys(self, mask, attn_mask, queries, keys)
            k, v = self._with_extra_keys(k, self.bias_k, mask), self._with_extra_keys(v, self.bias_v, mask)
        dropout_p = attention_dropout(self)
        seed = ops.draw_seed(query.device) if dropout_p > 0.0 else None
        weights = None
        if need_weights:
            output, weights = mask.attention_and_weights(q, k, v, dropout_p, seed, 0)
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            output = mask.attention(q, k, v, dropout_p, seed, 0)
        output = F.linear(output, self.out_proj.weight, self.out_proj.bias)
        if queries.batched:
            return output, weights
        return output[0], None if weights is None else weights[0]

    def _with_extra_keys(self, x: Tensor, bias: Tensor | None, mask: PaddedMask) -> Tensor:
        """Appends `bias` [1, 1, E] and zeros to each sequence's keys or values [..., H, D]."""
        dim = 1 if mask.batch_first else 0
        shape = list(x.shape)
        shape[dim] = 1
        parts = [x]
        if bias is not None:
            parts.append(bias.to(x.dtype).unflatten(-1, (self.num_heads, self.head_dim)).expand(shape))
        if self.add_zero_attn:
            parts.append(x.new_zeros(shape))
        return torch.cat(parts, dim)


def project(module: torch.nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Projects [..., E] inputs to heads [..., H, D]; inputs that are the same tensor share one matmul."""
    for name, x, dim in (("query", query, module.embed_dim), ("key", key, module.kdim), ("value", value, module.vdim)):
        if x.shape[-1] != dim:
            # torch asserts that key and value are alike, and leaves it to the matmul whether they fit the weight.
            alike = name == "key" and module._qkv_same_embed_dim and key.shape == value.shape
            raise (BadArgument if alike else AssertedArgument)(
                f"{name}: expected [..., {dim}], got shape {tuple(x.shape)}"
            )
    heads = (module.num_heads, module.head_dim)
    weight = module.in_proj_weight
    bias: Tensor | None = module.in_proj_bias
    if bias is not None:
        # torch's layers take a bias of another dtype than their weights.
        bias = bias.to(module.q_proj_weight.dtype if weight is None else weight.dtype)
    if weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = zip((query, key, value), weights, biases, strict=True)
        return tuple(F.linear(x, w, b).unflatten(-1, heads) for x, w, b in inputs)
    if query is key and key is value:
        return ops.split_heads(F.linear(query, weight, bias), 3, module.num_heads)
    sizes = (module.embed_dim, 2 * module.embed_dim)
    query_weight, other_weight = weight.split(sizes)
    query_bias, other_bias = (None, None) if bias is None else bias.split(sizes)
    q = F.linear(query, query_weight, query_bias).unflatten(-1, heads)
    if key is value:
        return q, *ops.split_heads(F.linear(key, other_weight, other_bias), 2, module.num_heads)
    biases = (None, None) if other_bias is None else other_bias.chunk(2)
    inputs = zip((key, value), other_weight.chunk(2), biases, strict=True)
    return q, *(F.linear(x, w, b).unflatten(-1, heads) for x, w, b in inputs)


def attend(
    module: torch.nn.MultiheadAttention,
    query: Tensor,
    memory: Tensor,
    mask: AttentionMask,
    seed: Tensor | None,
    site: int,
) -> Tensor:
    """Runs the multi-head attention of a layer: [..., E] queries over [..., E] memory, padded or packed as `mask` says.

    The bias of `module.out_proj` is left out: the norm that follows adds it.
    """
    q, k, v = project(module, query, memory, memory)
    output = mask.attention(q, k, v, attention_dropout(module), seed, site)
    return F.linear(output, module.out_proj.weight)


def attention_dropout(module: torch.nn.MultiheadAttention) -> float:
    """Returns the probability with which `module` drops softmax weights now."""
    return module.dropout if module.training else 0.0


def _check_dimensions(query: Tensor, key: Tensor, value: Tensor) -> None:
    wanted, came = query.dim(), (key.dim(), value.dim())
    if came != (wanted, wanted):
        words = f"{wanted}-D but found {came[0]}-D and {came[1]}-D tensors respectively"
        raise AssertedArgument(f"key, value: for {wanted}-D `query`, expected `key` and `value` to be {words}")


def _seeing_extra_keys(
    module: torch.nn.MultiheadAttention,
    mask: PaddedMask,
    attn_mask: Tensor | None,
    queries: SequenceInput,
    keys: SequenceInput,
) -> PaddedMask:
    """Returns `mask` with the module's own keys behind, which every query sees: in torch under masks, not the hint."""
    seen = mask.attn_mask
    if mask.is_causal:
        shape = (queries.shape[0], module.num_heads, queries.shape[1], keys.shape[1])
        if attn_mask is None:
            attn_mask = torch.ones(shape[2:], dtype=torch.bool, device=queries.x.device).triu(1)
        seen = merge_masks(attn_mask, keys.padding_mask, shape, queries.batched)
    if seen is not None:
        extra = (module.bias_k is not None) + module.add_zero_attn
        seen = F.pad(seen, (0, extra), value=seen.dtype == torch.bool)
    return PaddedMask(mask.batch_first, seen)
