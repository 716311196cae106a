"""Encoders on packed tokens: [1, N, H] of the N tokens that are no padding, between their first layer and their last.

All that an encoder does but attention is done to each token by itself, so a stack takes the valid tokens out of the
batch once and puts them back once. Its layers run as they are; the mask, which they hand on to `attend`, says where
sequences begin. Which stacks this is true of, is found by a trial of a stack with its first layer alone.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, Module, ModuleList
from torch.nn.modules.module import _has_any_global_hook
from transformers.utils.output_capturing import _active_collector

from tfm import ops
from tfm.patching.fusion import FUSION, Fused, fuse, fusion_of, fusions, plain_kind, why_no_kernel
from tfm.patching.huggingface.masks import EAGER_MASKS, NAME
from tfm.patching.huggingface.position_bias import why_dense
from tfm.patching.report import Left, Swapped
from tfm.patching.selection import NOT_ASKED_FOR, Selection
from tfm.sequences import Layout, RowIndices, offsets
from tfm.transforms import is_readable

# Taking tokens out and putting them back costs about as much as this share of a layer's work.
LEAST_PADDING = 0.05
# What a config has for layers that see a part of the tokens.
WINDOWS = ("sliding_window", "layer_types", "local_attention", "attention_window", "attention_chunk_size")
# How a stack's tokens come to be packed: its input is; its first layer does it; its token ids are.
HIDDEN, LAYERS, TOKENS = "hidden states", "layers", "tokens"


@dataclass(frozen=True, eq=False)
class ValidRows(Layout):
    """The layout of the valid tokens of a padded batch, wherever in its rows they lie.

    Attributes:
        valid: bool [B, S], True where a token is no padding.
    """

    valid: Tensor

    def _find_indices(self) -> RowIndices:
        valid = self.valid.flatten()
        to_padded = torch.where(valid, valid.cumsum(0) - 1, 0)
        return RowIndices(valid.nonzero().squeeze(1), to_padded, (~valid).nonzero().squeeze(1))


class PackedMask(Tensor):
    """A mask of masks.py, bool [B, 1, 1, S], that also says where sequences lie once only its True rows are there."""

    sequences: ValidRows

    @staticmethod
    def __new__(cls, layout: ValidRows) -> PackedMask:
        """Returns the mask of a layout."""
        made = Tensor._make_subclass(cls, layout.valid[:, None, None])
        made.sequences = layout
        return made

    def covers(self, x: Tensor) -> bool:
        """Tells whether x [1, N, ...] are its packed rows, of which there are fewer than padded ones."""
        return x.shape[0] == 1 and x.shape[1] == self.sequences.rows

    def packed(self, x: Tensor) -> Tensor:
        """Packs [B, S, H] into [1, N, H]; returns what is packed as it is."""
        return x if self.covers(x) else self.sequences.pack(x)[None]

    def padded(self, x: Tensor) -> Tensor:
        """Unpacks [1, N, H] into [B, S, H], 0 at padding; returns what is padded as it is."""
        return self.sequences.unpack(x[0]) if self.covers(x) else x


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, dropout_p: float, scale: float | None, **rules: Any
) -> Tensor:
    """Computes attention within each sequence of packed query, key and value [1, H, N, D].

    Returns:
        [1, N, Hq, Dv].
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    found: Tensor = ops.varlen_attention(
        query, key, value, layout.cu_seq, layout.cu_seq, layout.max_length, layout.max_length, dropout_p, False, scale,
        **rules,
    )  # fmt: skip
    return found[None]


class Tried(NamedTuple):
    """What a trial of a stack has shown.

    Attributes:
        layers: the name of the list of layers.
        kind: their class.
        way: how tokens come to be packed.
    """

    layers: str
    kind: type[Module]
    way: str


class PackedStack(Fused):
    """A stack of layers that runs on packed tokens, as it was tried."""

    _tried: Tried

    def forward(self, first: Any = None, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Runs the stack; `first` are hidden states or token ids, under the name that its own forward has for them."""
        name = FIRST[self._tried.way]
        first = kwargs.pop(name, None) if first is None else first
        layout, reason = None, _why_padded(self, first, attention_mask, args, kwargs)
        if not reason:
            layout, reason = _layout_of(attention_mask)
        if layout is None:
            return self.plainly(reason, first, attention_mask, *args, **kwargs)
        self.fusedly()
        return run_packed(self, self._plain_kind, self._tried.way, first, PackedMask(layout), kwargs)


FIRST = {HIDDEN: "hidden_states", LAYERS: "input_ids", TOKENS: "input_ids"}


def run_packed(
    stack: Module, kind: type[Module], way: str, first: Tensor | None, mask: PackedMask, kwargs: dict[str, Any]
) -> Any:
    """Runs the forward of `kind` on packed tokens, and pads what it returns."""
    if way != LAYERS:
        first = None if first is None else mask.packed(first)
        embeds = kwargs.get("inputs_embeds")
        kwargs = kwargs if embeds is None else kwargs | {"inputs_embeds": mask.packed(embeds)}
    result = kind.forward(stack, first, mask, **kwargs)
    if isinstance(result, tuple):
        return (mask.padded(result[0]), *result[1:])
    if isinstance(result, Tensor):
        return mask.padded(result)
    result.last_hidden_state = mask.padded(result.last_hidden_state)
    return result


def _why_padded(stack: Any, first: Any, mask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Says why a call is not for packed tokens; empty where it may be."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "compiled or traced"
    if any(x is not None for x in args):
        return "called by position"
    for name, value in kwargs.items():
        if name != "inputs_embeds" and not isinstance(value, (bool, int, float, str, type(None))):
            return f"given {name}"
    if kwargs.get("is_causal"):
        return "causal"
    wanted = ("output_attentions", "output_hidden_states")
    config = getattr(stack, "config", None)
    if _active_collector.get() or any(kwargs.get(x) or getattr(config, x, False) for x in wanted):
        return "what is inside is asked for"
    x = kwargs.get("inputs_embeds") if first is None else first
    if not isinstance(mask, Tensor) or not isinstance(x, Tensor):
        return "nothing is padding"
    expected = (x.shape[0], 1, 1, x.shape[1]) if stack._tried.way == HIDDEN else x.shape[:2]
    if mask.shape != expected or (stack._tried.way == HIDDEN and mask.dtype != torch.bool):
        return "a mask of another kind"
    if not is_readable(mask):
        return "to count tokens, the host would have to wait for the device"
    return _why_altered(stack) or why_no_kernel("varlen_attention", next(stack.parameters()))


def _why_altered(stack: Any) -> str:
    """Says what of the modules inside could notice; empty where nothing does."""
    if _has_any_global_hook():
        return "hooks for all modules are set"
    for layer in stack._modules[stack._tried.layers]:
        if plain_kind(layer) is not stack._tried.kind:
            return f"a layer is a {type(layer).__name__}"
    for module in stack.modules():
        own = vars(module)
        if module is not stack and (_is_hooked(module) or "forward" in own):
            return f"a {type(module).__name__} inside has hooks"
        if own.get("gradient_checkpointing") and module.training:
            return "activations are checkpointed"
        if own.get("chunk_size_feed_forward"):
            return "the feed-forward network runs in chunks"
        fusion = own.get(FUSION)
        if fusion is not None and fusion.what == "attention":
            reason = fusion.always_plain or why_dense(module)
            if reason or own["config"]._attn_implementation != NAME:
                return reason or "attention is no longer ours"
    return ""


def _is_hooked(module: Module) -> bool:
    """Tells whether hooks see what goes in or out; transformers' own, which stay after collecting, do not count."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return any(hook.__module__ != _active_collector.__module__ for hook in module._forward_hooks.values())


def _layout_of(mask: Tensor) -> tuple[ValidRows | None, str]:
    """Returns the layout of the valid tokens; or None, and why padding is as good."""
    valid = mask[:, 0, 0] if mask.dim() == 4 else mask.bool()
    lengths = valid.sum(1)
    rows = int(lengths.sum())
    if rows == 0 or rows > (1 - LEAST_PADDING) * valid.numel():
        return None, "too little padding"
    begins = valid[:, 0].long() + (valid[:, 1:] & ~valid[:, :-1]).sum(1)
    if bool((begins > 1).any()):
        return None, "tokens of a sequence lie apart"
    layout = Layout.of(offsets(lengths), valid.shape[1], rows)
    return ValidRows(layout.cu_seq, layout.max_length, layout.positions, valid), ""


def pack_stacks(model: Module, selection: Selection) -> tuple[list[Swapped], list[Left]]:
    """Has every encoder inside `model` run on packed tokens, where it may; its layers have become ours already."""
    swapped: list[Swapped] = []
    left: list[Left] = []
    outer: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, PackedStack):
            outer.append(name)
        is_inside = any(name.startswith(f"{stack}.") for stack in outer)
        layers = "" if is_inside else _layers_of(module)
        way = _way_of(module, layers) if layers else ""
        if not way:
            continue
        reason = selection.why_left("layer", name)
        if not reason:
            kind = plain_kind(module.get_submodule(f"{layers}.0"))
            fuse(module, "layer", PackedStack, _tried=Tried(layers, kind, way))
            swapped.append(Swapped(name, "layer"))
            outer.append(name)
        elif reason != NOT_ASKED_FOR:
            left.append(Left(name, type(module).__name__, reason))
    return swapped, left


def _layers_of(module: Any) -> str:
    """Returns the name of a module's one list of layers, all of one class, whose attention is ours and not causal."""
    lists = [name for name, child in module._modules.items() if isinstance(child, ModuleList) and len(child)]
    config = getattr(module, "config", None)
    # Windows are masks of their own, which a stack makes of what it is given, and no trial so short would show.
    has_windows = any(getattr(config, name, None) for name in WINDOWS)
    reads_mask = getattr(config, "model_type", "") in EAGER_MASKS
    if len(lists) != 1 or fusion_of(module) is not None or reads_mask or has_windows:
        return ""
    layers = module._modules[lists[0]]
    if len({plain_kind(layer) for layer in layers}) != 1:
        return ""
    fused = [(one, fusion) for _, one, fusion in fusions(layers) if fusion.what == "attention"]
    is_served = fused and all(not fusion.always_plain for _, fusion in fused)
    return lists[0] if is_served and not any(getattr(one, "is_causal", True) for one, _ in fused) else ""


def _way_of(stack: Module, layers: str) -> str:
    """Returns the way in which a stack gives the same on packed tokens, by a trial; empty where it does in none."""
    kind = plain_kind(stack)
    names = list(inspect.signature(kind.forward).parameters)[1:3]
    ways = [way for way in (HIDDEN, TOKENS, LAYERS) if names == [FIRST[way], "attention_mask"]]
    return next((way for way in ways if _is_same(stack, kind, layers, way)), "")


def _is_same(stack: Any, kind: Any, layers: str, way: str) -> bool:
    generator = torch.Generator().manual_seed(0)
    valid = torch.tensor([[False, True, True, True, False], [True] * 5])
    layout, _ = _layout_of(valid)
    assert layout is not None
    try:
        twin = _twin(stack, kind, layers, generator)
        if way == HIDDEN:
            width = next(one.in_features for one in twin.modules() if isinstance(one, Linear))
            first, mask = torch.randn(2, 5, width, generator=generator), valid[:, None, None]
        else:
            ids = twin.get_input_embeddings().num_embeddings
            first, mask = torch.randint(ids, (2, 5), generator=generator), valid.long()
        with torch.no_grad():
            results = kind.forward(twin, first, mask), run_packed(twin, kind, way, first, PackedMask(layout), {})
    except Exception:
        return False
    theirs, ours = (result if isinstance(result, Tensor) else result[0] for result in results)
    return theirs.shape == ours.shape and torch.allclose(theirs[valid], ours[valid], rtol=1e-4, atol=1e-4)


def _twin(stack: Any, kind: Any, layers: str, generator: torch.Generator) -> Any:
    """Returns a stack of one layer, in evaluation on the CPU, with random numbers as parameters."""
    twin = kind.__new__(kind)
    vars(twin).update(vars(stack))
    children = {**stack._modules, layers: ModuleList([stack._modules[layers][0]])}
    vars(twin)["_modules"] = copy.deepcopy(children)
    twin.to("cpu", torch.float32).eval()
    for parameter in twin.parameters():
        parameter.data.normal_(std=max(parameter.shape[-1], 1) ** -0.5, generator=generator)
    return twin
