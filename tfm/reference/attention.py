"""Masked softmax attention ("Attention Is All You Need", section 3.2.1, equation 1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.reference.dropout import keep_mask, keep_scale
from tfm.sequences import Layout
from tfm.tracing import tracing
from tfm.transforms import transforming


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    query_start: int | Tensor,
    window_size: tuple[int, int],
    softcap: float | None,
    sinks: Tensor | None,
    relative_bias: Tensor | None,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    return_lse: bool,
    return_weights: bool,
    seed: Tensor | None,
    site: int,
) -> Any:
    """Computes tfm.ops.attention, which fills in the defaults and has checked the arguments."""
    allowed = allowed_keys(query, key, attn_mask, is_causal, query_start, window_size, key_lengths, key_mask)
    bias = added_to_scores(query, key, attn_mask, relative_bias, query_start)
    if allowed is not None:
        # Causality alone leaves every query its first key. A compiled graph must do for starts of either sign.
        starts_inside = isinstance(query_start, int) and not torch.compiler.is_compiling() and query_start >= 0
        has_holes = attn_mask is not None or key_lengths is not None or key_mask is not None or max(window_size) >= 0
        every_query_attends = starts_inside and not has_holes
        query, key, value = _shield(query, key, value, allowed, every_query_attends)
    return _attend(
        query, key, value, allowed, bias, dropout_p, scale, softcap, sinks, return_lse, return_weights, seed, site
    )


def _shield(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, every_query_attends: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Puts zeros where nobody may attend: there 0 times NaN would be NaN."""
    unreachable = ~allowed.any(dim=-2)[..., None]
    if unreachable.shape[1] not in (1, key.shape[1]):
        unreachable = unreachable.unflatten(1, (key.shape[1], -1)).all(dim=2)
    key, value = key.masked_fill(unreachable, 0), value.masked_fill(unreachable, 0)
    if not every_query_attends:
        query = query.masked_fill(~allowed.any(dim=-1, keepdim=True), 0)
    return query, key, value


def allowed_keys(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    query_start: int | Tensor,
    window_size: tuple[int, int],
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor | None:
    """Returns which keys each query may attend to: bool, [B|1, Hq|1, Sq|1, Sk]; None = all.

    Causality, masks, lengths and window combine by AND. A float mask forbids where it is -inf.
    """
    device = query.device
    parts = []
    left, right = window_size
    if is_causal or left >= 0 or right >= 0:
        start = query_start.view(-1, 1, 1, 1) if isinstance(query_start, Tensor) else query_start
        row = torch.arange(query.shape[-2], device=device)[:, None] + start
        column = torch.arange(key.shape[-2], device=device)
        if is_causal:
            parts.append(column <= row)
        if left >= 0:
            parts.append(column >= row - left)
        if right >= 0:
            parts.append(column <= row + right)
    if key_lengths is not None:
        parts.append(torch.arange(key.shape[-2], device=device) < key_lengths.view(-1, 1, 1, 1))
    if key_mask is not None:
        parts.append(key_mask[:, None, None])
    if attn_mask is not None:
        parts.append(attn_mask if attn_mask.dtype == torch.bool else attn_mask != float("-inf"))
    if not parts:
        return None
    allowed = parts[0]
    for part in parts[1:]:
        allowed = allowed & part
    return allowed.view(*[1] * (4 - allowed.dim()), *allowed.shape)


def added_to_scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    relative_bias: Tensor | None,
    query_start: int | Tensor,
) -> Tensor | None:
    """Returns the sum of a float mask and a bias by distance, broadcastable to [B, Hq, Sq, Sk]; None where neither is.

    (Shaw et al., "Self-Attention with Relative Position Representations", 2018, section 3.2, clips distances alike.)
    """
    mask = attn_mask if attn_mask is not None and attn_mask.dtype != torch.bool else None
    if relative_bias is None:
        return mask
    farthest = relative_bias.shape[1] // 2
    start = query_start.view(-1, 1, 1) if isinstance(query_start, Tensor) else query_start
    row = torch.arange(query.shape[-2], device=query.device)[:, None] + start
    distance = torch.arange(key.shape[-2], device=query.device) - row
    relative = relative_bias[:, distance.clamp(-farthest, farthest) + farthest]
    if relative.dim() == 4:
        relative = relative.transpose(0, 1)
    if mask is None:
        return relative
    wide = torch.promote_types(torch.promote_types(mask.dtype, relative.dtype), torch.float32)
    return mask.to(wide) + relative.to(wide)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
    return_weights: bool,
    seed: Tensor | None,
    site: int,
) -> Any:
    grouped = False
    if query.shape[1] != key.shape[1]:  # a branch: dynamo would keep bool(...) symbolic, which torch's kernel refuses
        grouped = True
    # Of heads of no columns torch 2.12's kernels give 0 where all keys have one score.
    has_columns = query.shape[-1] > 0
    plain = dropout_p == 0.0 and bias is None and softcap is None and sinks is None and has_columns
    plain = plain and not (return_lse or return_weights)
    # torch's CPU kernel gives 0 and finite gradients for fully masked rows; others, on which a trace may run, need not.
    safe = (query.device.type == "cpu" and not tracing()) or allowed is None
    # Those kernels have no second derivatives and no tangents.
    if plain and safe and query.dtype != torch.float64 and not transforming():
        return F.scaled_dot_product_attention(query, key, value, allowed, scale=scale, enable_gqa=grouped)
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    batch, query_heads, query_length, _ = query.shape
    group = query_heads // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query * scale) @ key.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(batch, -1, query_length, 1)
        scores = torch.cat((scores, sink), dim=-1)
    probabilities = scores.softmax(dim=-1)
    if sinks is not None:
        probabilities = probabilities[..., :-1]
    if allowed is not None:
        probabilities = probabilities.masked_fill(~allowed, 0.0)
    if dropout_p > 0.0:
        assert seed is not None
        device = query.device
        groups = torch.arange(batch * query_heads, device=device).view(batch, query_heads, 1)
        rows = torch.arange(query_length, device=device).expand(batch, query_heads, -1)
        keep = keep_mask(rows, key.shape[-2], groups, dropout_p, seed, site)
        probabilities = torch.where(keep, probabilities * keep_scale(dropout_p), 0)
    results = [(probabilities @ value).to(dtype)]
    if return_lse:
        results.append(_logsumexp(scores).to(torch.promote_types(dtype, torch.float32)))
    if return_weights:
        results.append(probabilities.to(dtype))
    return results[0] if len(results) == 1 else tuple(results)


def _logsumexp(scores: Tensor) -> Tensor:
    """Computes log Σ exp over the last dimension; its gradient is a softmax, where torch's is of a rounded lse."""
    near = scores.detach().logsumexp(dim=-1, keepdim=True)
    is_empty = near == float("-inf")
    total = (scores - near.masked_fill(is_empty, 0.0)).exp().sum(dim=-1, keepdim=True)
    return (near + total.masked_fill(is_empty, 1.0).log()).squeeze(-1)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    query_start: int | Tensor,
    window_size: tuple[int, int],
    softcap: float | None,
    sinks: Tensor | None,
    relative_bias: Tensor | None,
    return_lse: bool,
    seed: Tensor | None,
    site: int,
) -> Any:
    """Computes tfm.ops.varlen_attention: pads, attends and packs again; a batch's sentences are of similar length."""
    query_layout = Layout.of(cu_seq_q, max_q, query.shape[0])
    same = cu_seq_k is cu_seq_q and max_k == max_q
    key_layout = query_layout if same else Layout.of(cu_seq_k, max_k, key.shape[0])
    query, key, value = (
        layout.unpack(x).transpose(1, 2)
        for layout, x in ((query_layout, query), (key_layout, key), (key_layout, value))
    )
    # Keys at padding are 0, so they need a mask but no shield; behind a causal diagonal not even a mask, since queries
    # at padding are dropped.
    diagonal = is_causal and same and isinstance(query_start, int) and query_start == 0
    key_lengths = None if key_layout.is_rectangular or diagonal else cu_seq_k.diff()
    allowed = allowed_keys(query, key, attn_mask, is_causal, query_start, window_size, key_lengths, None)
    bias = added_to_scores(query, key, attn_mask, relative_bias, query_start)
    only_padding_is_unreachable = attn_mask is None and max(window_size) < 0 and (diagonal or not is_causal)
    if allowed is not None and not only_padding_is_unreachable:
        query, key, value = _shield(query, key, value, allowed, every_query_attends=False)
    result = _attend(query, key, value, allowed, bias, dropout_p, scale, softcap, sinks, return_lse, False, seed, site)
    output, lse = result if return_lse else (result, None)
    packed = query_layout.pack(output.transpose(1, 2))
    return packed if lse is None else (packed, query_layout.pack(lse.transpose(1, 2)))
