"""Attention of all modules that ask transformers' AttentionInterface for it, some 32 families of 44.

The modules keep their forwards: their config names "tfm" as the implementation, and `attend` is what they find under
that name. Those whose forwards rotate queries and keys get a copy of it that finds ours under that name too.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import _active_collector

from tfm import ops
from tfm.patching.fusion import Fused, fusion_of, global_names, plain_kind, rebound, why_no_kernel
from tfm.patching.huggingface.masks import NAME, dense_mask
from tfm.patching.huggingface.masks import register as register_masks
from tfm.patching.huggingface.packing import PackedMask, attend_packed
from tfm.patching.huggingface.position_bias import compute_bias, dense_bias, no_bias, split_bias
from tfm.patching.huggingface.rotary import rotation_of

# What can be replaced; the other implementations are kernels that a user has chosen.
REPLACED = ("sdpa", "eager")
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
# Arguments that change what attention means, and that `attend` does not know: a call with one runs as before.
UNKNOWN_RULES = ("score_mod", "block_mask", "head_mask", "sinks")
# The arguments of a model's own attention function that `attend` takes, or that are no rule of attention.
KNOWN_ARGUMENTS = frozenset(
    [
        "module",
        "query",
        "key",
        "value",
        "attention_mask",
        "scaling",
        "dropout",
        "is_causal",
        "sliding_window",
        "softcap",
        "s_aux",
        "position_bias",
        "cache",
        "output_attentions",
        "kwargs",
    ]
)


class FusedAttention(Fused):
    """A module that calls `attend`, and, as its options say, other functions of ours where it calls its own.

    Options: `rotations`, by name; `has_position_bias`, of T5's kind, for position_bias.py.
    """

    @classmethod
    def attributes(cls, kind: type[Module], **options: Any) -> dict[str, Any]:
        """Returns the forward, which finds the functions that rotate under their names, and the method for biases."""
        rotations = dict(options.get("rotations", ()))
        made = {"_forward": staticmethod(rebound(kind.forward, rotations) if rotations else kind.forward)}
        if not options.get("has_position_bias"):
            return made
        takes_bias = "position_bias" in inspect.signature(kind.forward).parameters
        return made | {"compute_bias": compute_bias, "_takes_bias": takes_bias}

    _forward: Callable[..., Any]
    _takes_bias = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's own forward, or its copy."""
        if self._takes_bias and not self.has_relative_attention_bias and kwargs.get("position_bias") is None:
            kwargs["position_bias"] = no_bias(self)
        return self._forward(self, *args, **kwargs)


def attend(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes attention as transformers' AttentionInterface asks for it.

    Args:
        module: the caller; its `is_causal` and `sliding_window` hold where the arguments do not say.
        query: [B, Hq, Sq, D].
        key, value: [B, Hkv, Sk, D] and [B, Hkv, Sk, Dv], from the cache too.
        attention_mask: of masks.py, or any that stock takes, which then holds all there is to say.
        dropout, scaling, softcap: as `tfm.ops.attention`.
        is_causal: None for the module's.
        sliding_window: how many keys a query sees, itself included; None for the module's.
        s_aux: [Hq], logits of sinks.
        position_bias: [1 or B, Hq, Sq, Sk], added to the scores, with its gradient; or of position_bias.py.
        **others: `output_attentions`, and what does not concern attention.

    Returns:
        [B, Sq, Hq, Dv], and the weights [B, Hq, Sq, Sk] or None.
    """
    queries, keys = query.shape[2], key.shape[2]
    packed = attention_mask if isinstance(attention_mask, PackedMask) else None
    if packed is not None and not packed.covers(query.transpose(1, 2)):
        # In a layer before the first that packs.
        attention_mask, packed = packed.as_subclass(Tensor), None
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is not None:
        # The mask knows better than some modules, whose flag stock never reads beside one.
        causal = attention_mask.dtype == torch.uint8
    window = sliding_window or getattr(module, "sliding_window", None) or None
    window = window if causal else None
    relative_bias, position_bias = split_bias(position_bias)
    fusion = fusion_of(module)
    reason = (fusion.always_plain if fusion is not None else "") or _why_plain(query, others)
    if fusion is not None:
        fusion.count(reason)
    if reason:
        if relative_bias is not None:
            position_bias = dense_bias(relative_bias, queries, keys)
        mask = dense_mask(attention_mask, queries, keys, causal, window, query.device)
        rules = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux, "position_bias": position_bias}
        given = {name: rule for name, rule in rules.items() if rule is not None}
        return _stock(module, query, key, value, mask, dropout, scaling, **given, **others)
    if packed is not None:
        rules = {"softcap": softcap, "sinks": s_aux, "relative_bias": relative_bias}
        return attend_packed(query, key, value, packed.sequences, dropout, scaling, **rules), None
    # One query sees all keys before it: nothing to say but the window.
    causal = causal and (queries > 1 or window is not None)
    mask, key_mask = _masks(attention_mask, position_bias)
    found = ops.attention(
        query, key, value, mask, dropout, causal, scaling,
        query_start=keys - queries if causal or relative_bias is not None else 0,
        window_size=(-1 if window is None else window - 1, -1), softcap=softcap, sinks=s_aux,
        relative_bias=relative_bias, key_mask=key_mask, return_weights=wants_weights(module, others),
    )  # fmt: skip
    output, weights = found if isinstance(found, tuple) else (found, None)
    return output.transpose(1, 2), weights


def _masks(mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns what is added to the scores, or says which hold, and which keys there are: tfm.ops.attention's two."""
    if mask is None:
        return bias, None
    is_of_keys = mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1 and mask.dtype in (torch.bool, torch.uint8)
    if is_of_keys:
        return bias, mask[:, 0, 0, :].bool()
    if bias is None:
        return mask, None
    # A float mask adds; where a bool one is False, nothing else counts.
    return bias + mask if mask.is_floating_point() else bias.masked_fill(~mask, float("-inf")), None


def _why_plain(query: Tensor, others: dict[str, Any]) -> str:
    if others.get("cache") is not None:
        return "continuous batching keeps its keys in pages"
    for name in UNKNOWN_RULES:
        if others.get(name) is not None:
            return f"a {name} is given"
    return why_no_kernel("attention", query)


def wants_weights(module: Module, others: dict[str, Any]) -> bool:
    """Tells whether the caller asks for the weights; some modules do not pass the question on."""
    if "output_attentions" in others:
        return bool(others["output_attentions"])
    collected = _active_collector.get()
    if collected is not None:
        return any("attentions" in name for name in collected)
    return bool(getattr(getattr(module, "config", None), "output_attentions", False))


def _stock(
    module: Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **named: Any
) -> Any:
    """Runs the attention that the module had before."""
    fusion = fusion_of(module)
    before = fusion.before if fusion is not None else "sdpa"
    eager = getattr(sys.modules[plain_kind(module).__module__], "eager_attention_forward", None)
    if before == "eager" and eager is not None:
        if mask is not None and not mask.is_floating_point():
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
        return eager(module, query, key, value, mask, dropout=args[0], scaling=args[1], **named)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, *args, **named)


def attention_modules(model: Module) -> Iterator[tuple[str, Module]]:
    """Yields the modules that ask the interface for their attention."""
    for name, module in model.named_modules():
        if getattr(module, "config", None) is not None and INTERFACE in global_names(plain_kind(module).forward):
            yield name, module


def rotations_in(module: Module) -> tuple[tuple[str, Callable[..., Any]], ...]:
    """Returns ours for the functions that rotate queries and keys in a module's forward, by name."""
    scope = vars(sys.modules[plain_kind(module).__module__])
    found = []
    for name in sorted(global_names(plain_kind(module).forward)):
        if name.startswith("apply_rotary_pos_emb") and name in scope:
            ours = rotation_of(scope[name])
            if ours is not None:
                found.append((name, ours))
    return tuple(found)


def why_attention_left(module: Any, owner: PreTrainedModel | None) -> str:
    """Says why a module, of the model `owner` if of any, keeps the attention it has; empty where it may take ours."""
    config = getattr(module, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in (*REPLACED, NAME):
        return f"uses {implementation}"
    scope = sys.modules[plain_kind(module).__module__]
    names = global_names(plain_kind(module).forward)
    windowed = any(name.startswith("create_sliding_window") for name in vars(scope))
    names |= _words(module) | frozenset(plain_kind(module).__init__.__code__.co_names)
    if windowed and "sliding_window" not in names:
        return "its masks have windows of which it does not tell its attention"
    # Models that run on torch's own function ask for nothing else.
    return "" if owner is not None and owner._supports_sdpa else _why_otherwise(module, scope)


def _words(module: Module) -> frozenset[str]:
    """Returns the strings in a module's forward, names of keyword arguments among them."""
    found: set[str] = set()
    for constant in inspect.unwrap(plain_kind(module).forward).__code__.co_consts:
        found.update(constant if isinstance(constant, tuple) else (constant,))
    return frozenset(x for x in found if isinstance(x, str))


def _why_otherwise(module: Any, scope: Any) -> str:
    """Says how the model's own attention function differs from ours, by a trial; empty where it does not."""
    eager = getattr(scope, "eager_attention_forward", None)
    if eager is None:
        return ""
    others = sorted(set(inspect.signature(eager).parameters) - KNOWN_ARGUMENTS)
    if others:
        return f"its attention function takes {', '.join(others)}"
    generator = torch.Generator().manual_seed(0)
    groups = getattr(module, "num_key_value_groups", 1)
    sinks = getattr(module, "sinks", None)
    key_heads = 2 if sinks is None else len(sinks) // groups
    query = torch.randn(1, key_heads * groups, 3, 8, generator=generator)
    key, value = torch.randn(2, 1, key_heads, 3, 8, generator=generator)
    mask = torch.full((1, 1, 3, 3), torch.finfo(torch.float32).min).triu(1)
    if sinks is not None:
        sinks = sinks.detach().float().cpu()
    try:
        theirs = eager(_Twin(module), query, key, value, mask, scaling=0.3, dropout=0.0, s_aux=sinks)[0]
    except Exception as error:
        return f"its attention function could not be tried: {type(error).__name__}"
    ours = ops.attention(query, key, value, mask, scale=0.3, sinks=sinks, impl="reference").transpose(1, 2)
    is_same = theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5)
    return "" if is_same else "its attention function computes something else than softmax(scale q k + mask) v"


class _Twin:
    """A module in evaluation, as far as an attention function looks at it."""

    training = False

    def __init__(self, module: Module) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def register() -> None:
    """Makes attention and masks known to transformers under their name: all that is changed of the process."""
    register_masks()
    AttentionInterface.register(NAME, attend)
