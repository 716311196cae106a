"""The attention that a model's configs name: "tfm" while it is accelerated, what it was before after restore()."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.nn import Module
from transformers import PreTrainedModel

from tfm.patching.fusion import FUSION, MODEL, Fusion, fuse, fusion_of, global_names, plain_kind, unfuse
from tfm.patching.huggingface.attention import FusedAttention, attention_modules, rotations_in, why_attention_left
from tfm.patching.huggingface.masks import EAGER_MASKS, NAME
from tfm.patching.huggingface.position_bias import has_position_bias
from tfm.patching.report import Left, Swapped
from tfm.patching.selection import NOT_ASKED_FOR, Selection


class Attention(NamedTuple):
    """What became of the attention of a model: modules changed, modules left."""

    swapped: list[Swapped]
    left: list[Left]


def accelerate_attention(model: Module, selection: Selection) -> Attention:
    """Has every attention inside `model` that asks transformers' interface find ours, where it may.

    Modules of one config find the same: what is left of them while others are served runs as before inside ours.
    """
    done = Attention([], [])
    owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    reasons: dict[str, str] = {}
    modules: dict[str, Any] = dict(attention_modules(model))
    for name, module in modules.items():
        reasons[name] = why_attention_left(module, _owner(owners, name)) or selection.why_left("attention", name)
    reasons |= _beside_attention_of_its_own(model, owners, reasons)
    configs = {id(modules[name].config): modules[name].config for name, reason in reasons.items() if not reason}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for name, module in modules.items():
        config, reason, known = module.config, reasons[name], fusion_of(module)
        if known is not None and (reason or not known.always_plain):
            continue
        if reason and reason != NOT_ASKED_FOR:
            done.left.append(Left(name, plain_kind(module).__name__, reason))
        if id(config) in configs:
            name_before = before[id(config)] if known is None else known.before
            if known is not None:
                unfuse(module)
            options = (
                {} if reason else {"rotations": rotations_in(module), "has_position_bias": has_position_bias(module)}
            )
            fuse(module, "attention", FusedAttention, name_before, **options)
            vars(module)[FUSION].always_plain = reason
            if not reason:
                done.swapped.append(Swapped(name, "attention"))
    for name in (name for name, reason in reasons.items() if not reason):
        owner: Any = _owner(owners, name)
        if owner is not None and id(owner.config) not in configs and fusion_of(owner) is None:
            setattr(owner, FUSION, Fusion(MODEL, owner.config._attn_implementation))
            owner.config._attn_implementation_internal = NAME
    for config in configs.values():
        config._attn_implementation_internal = NAME
    return done


def _beside_attention_of_its_own(
    model: Module, owners: dict[str, PreTrainedModel], reasons: dict[str, str]
) -> dict[str, str]:
    """Returns reasons for attention whose config other attention of the model reads too, but not ours.

    That one asks no interface: the masks that are made by such a config would be masks that it does not know.
    """
    named = dict(model.named_modules())
    strangers: dict[int, str] = {}
    for name, module in named.items():
        kind = plain_kind(module)
        is_attention = "Attention" in kind.__name__ and not isinstance(module, PreTrainedModel)
        holds_other = any(other.startswith(f"{name}.") for other in reasons)
        if (
            is_attention
            and name not in reasons
            and not holds_other
            and not _is_inside(name, reasons)
            and module._parameters | module._modules
        ):
            owner = _owner(owners, name)
            if owner is not None:
                strangers[id(owner.config)] = kind.__name__
    found = {}
    for name in reasons:
        owner = _owner(owners, name)
        of_both = {id(named[name].config), *([] if owner is None else [id(owner.config)])}
        stranger = next((strangers[key] for key in of_both if key in strangers), "")
        if stranger and not reasons[name]:
            found[name] = f"its model has a {stranger} that computes attention itself"
        elif owner is not None and _denies_its_masks(
            owner, [named[other] for other in reasons if _owner(owners, other) is owner]
        ):
            found.setdefault(
                name, reasons[name] or "its model asks for causal masks, and none of its attention is causal"
            )
    return found


def _denies_its_masks(owner: PreTrainedModel, modules: list[Module]) -> bool:
    """Tells whether only dense masks make a model causal, which torch's own attention is not asked to be."""
    makes_causal = "create_causal_mask" in global_names(plain_kind(owner).forward)
    # Stacks that are encoders or decoders by their config make the masks of what they are.
    is_decoder = getattr(owner.config, "is_decoder", True) or "Decoder" in plain_kind(owner).__name__
    says_nothing = owner._supports_sdpa or getattr(owner.config, "model_type", "") in EAGER_MASKS
    return makes_causal and is_decoder and not says_nothing and not any(getattr(x, "is_causal", True) for x in modules)


def _is_inside(name: str, outer: dict[str, str]) -> bool:
    return any(name.startswith(f"{other}.") for other in outer)


def restore_implementation(module: Any) -> None:
    """Has the config of a module name the attention that it named before, if nobody has changed it since."""
    if module.config._attn_implementation == NAME:
        module.config._attn_implementation_internal = fusion_of(module).before  # type: ignore[union-attr]


def _owner(owners: dict[str, PreTrainedModel], name: str) -> PreTrainedModel | None:
    """Returns the innermost model of transformers that a module lies in."""
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
    return next((owners[path] for path in paths if path in owners), None)
