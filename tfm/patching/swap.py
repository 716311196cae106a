"""accelerate() and restore(): a model that exists runs on tfm's operations, in place, and as before again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import Module

from tfm.patching import torch_modules
from tfm.patching.fusion import LOSS, MODEL, Change, Fusion, fusion_of, fusions, plain_kind, unfuse
from tfm.patching.replay import graphed, is_graphed, plain_class, ungraph
from tfm.patching.report import Left, Report, Swapped
from tfm.patching.selection import NOT_ASKED_FOR, Selection
from tfm.patching.torch_modules import MARK, ORIGINALS, STACKS


def accelerate(
    model: Module,
    *,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    fuse_loss: bool = False,
    graphs: bool = False,
) -> Report:
    """Has a model run on tfm's operations, in place: torch.nn's Transformer modules and Hugging Face's models.

    Modules whose class is exactly torch.nn's become tfm.nn's, by their `__class__`. Of Hugging Face's models,
    attention, norms, feed-forward networks, residual connections, experts, recurrences and the loss run fused: by what
    a module is and does, found by trials, in any family of transformers 5.17 and newer. Nothing is copied; parameters,
    state_dict, hooks, optimisers, names and pickles stay as they are. User subclasses and TorchScript are left. A
    second call changes nothing more, `restore` undoes all.

    A call that could not be right or faster runs as before (tensors of other classes, adapters put into a layer, hooks
    where a layer's parts are used without calling it, devices and dtypes without kernels): `report.stats()` counts
    both.

    Args:
        model: any module.
        only: what to change: kinds of work ("layer", "attention", "norm", "residual", "feed_forward", "experts",
            "recurrence", "embedding", "cross_entropy") and paths of modules, as named_modules() gives them, * for
            anything; None for all.
        exclude: what to leave, by the same names.
        fuse_loss: have Hugging Face's models compute their loss in training without ever holding the logits, which then
            are computed only if something asks for them.
        graphs: have each Transformer of torch.nn, stack or layer, the outermost, replay CUDA graphs on a GPU: see
            `tfm.graphed`.

    Returns:
        What was changed, and what was left and why; print it.

    Raises:
        TypeError: `model` is no torch.nn.Module.
        ValueError: `only` or `exclude` name what is not there.
    """
    _check_module("accelerate", model)
    selection = Selection(model, only, exclude)
    swapped, left, unchanged = [], [], 0
    modules = list(_walk(model))
    finders: list[Callable[[Module], Change | None]] = [torch_modules.change_of]
    is_huggingface = any(_is_of_transformers(module) for _, module in modules)
    if is_huggingface:
        from tfm.patching import huggingface

        if fuse_loss:
            finders.append(huggingface.heads_of(model))
        finders.append(huggingface.change_of)
        attention = huggingface.accelerate_attention(model, selection)
        swapped += attention.swapped
        left += attention.left
    now = {one.name for one in swapped}
    for name, module in modules:
        kind = type(module)
        if plain_class(module) in ORIGINALS or plain_kind(module) is not kind:
            unchanged += name not in now
            continue
        reason = _why_foreign(module) or torch_modules.why_left(module)
        if reason:
            left.append(Left(name, kind.__name__, reason))
            continue
        change = next(filter(None, (finder(module) for finder in finders)), None)
        if change is None:
            continue
        reason = "" if change.what == LOSS else selection.why_left(change.what, name) or change.why_left
        if not reason:
            change.make(module)
            swapped.append(Swapped(name, change.becomes))
        elif reason != NOT_ASKED_FOR:
            left.append(Left(name, kind.__name__, reason))
    # Only now, as a layer's children have all changed.
    if is_huggingface:
        huggingface.accelerate_masks(model)
        packed = huggingface.pack_stacks(model, selection)
        swapped += packed[0]
        left += packed[1]
    places = dict(modules)
    changed = tuple(Swapped(one.name, one.kind, torch_modules.note(places[one.name])) for one in swapped)
    stacks = dict(_outermost_stacks(model)) if graphs else {}
    for module in stacks.values():
        graphed(module)
    fused = {name: fusion for name, _, fusion in fusions(model) if fusion.what != MODEL}
    return Report("replaced", changed, tuple(left), unchanged, tuple(stacks), fused)


def restore(model: Module) -> Report:
    """Undoes what accelerate() and graphed() did to `model`; modules that were made as tfm.nn's stay.

    Returns:
        What was restored; print it.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    _check_module("restore", model)
    swapped, left = [], []
    stacks = {name: module for name, module in model.named_modules() if is_graphed(module)}
    for module in stacks.values():
        ungraph(module)
    for name, module in _walk(model):
        kind = type(module)
        fusion = fusion_of(module)
        if fusion is not None:
            reason = _undo(module, fusion)
            if reason:
                left.append(Left(name, kind.__name__, reason))
            elif kind is not type(module) and fusion.what != MODEL:
                swapped.append(Swapped(name, plain_kind(module).__name__))
        elif MARK in module.__dict__:
            if kind not in ORIGINALS:
                left.append(Left(name, kind.__name__, "its class was changed again after accelerate()"))
                continue
            module.__class__ = ORIGINALS[kind]
            delattr(module, MARK)
            swapped.append(Swapped(name, f"torch.nn.{kind.__name__}"))
        elif kind in ORIGINALS:
            left.append(Left(name, kind.__name__, "made as a tfm.nn module, not by accelerate()"))
    return Report("restored", tuple(swapped), tuple(left), graphed=tuple(stacks))


def _undo(module: Module, fusion: Fusion) -> str:
    """Gives a module of transformers back what it had; says why it cannot, where its class is no longer ours."""
    if fusion.before is not None:
        from tfm.patching import huggingface

        huggingface.restore_implementation(module)
    if plain_kind(module) is type(module) and fusion.what != MODEL:
        return "its class was changed again after accelerate()"
    unfuse(module)
    return ""


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"{function}: expected a torch.nn.Module, got {type(model).__name__}")


def _walk(module: Module, name: str = "", seen: set[Module] | None = None) -> Iterator[tuple[str, Module]]:
    """Yields each module once, under its first name; what is inside TorchScript stays out."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    # Children are listed before the caller may change the module's class.
    children = [] if _why_foreign(module) else list(module._modules.items())
    yield name, module
    for child_name, child in children:
        if child is not None:
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)


def _outermost_stacks(module: Module, name: str = "") -> Iterator[tuple[str, Module]]:
    """Yields the modules that accelerate(graphs=True) has replay graphs, and do not yet."""
    if is_graphed(module) or _why_foreign(module):
        return
    if type(module) in STACKS and "forward" not in vars(module):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost_stacks(child, f"{name}.{child_name}" if name else child_name)


def _is_of_transformers(module: Module) -> bool:
    return type(module).__module__.split(".")[0] == "transformers"


def _why_foreign(module: Module) -> str:
    return "compiled by TorchScript, it no longer runs Python" if isinstance(module, torch.jit.ScriptModule) else ""
