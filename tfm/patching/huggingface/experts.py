"""Mixtures of experts as one operation each, found by their parts and a trial on a small twin.

Stacked experts are two parameters, [E, 2 I, H] and [E, H, I] (Mixtral, Qwen2MoE, DeepSeek-V3, Jamba). Separate ones are
networks in a ModuleDict (Switch Transformers, NLLB-MoE), whose weights are read where they lie.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Dropout, Linear, Module, ModuleDict

from tfm import ops
from tfm.nn.fusible import PLAIN_PARAMETERS
from tfm.patching.fusion import Change, Fused, fusing, why_altered, why_no_kernel
from tfm.patching.huggingface.feed_forward import activation_of
from tfm.patching.huggingface.trial import does_the_same, twin_of

STACKED = ("gate_up_proj", "down_proj")


class FusedExperts(Fused):
    """Stacked gated experts."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns the shape of `hidden_states` [T, H], from the experts of each token [T, K] and their weights."""
        reason = _why_not_stacked(self, hidden_states)
        if reason:
            return self.plainly(reason, hidden_states, top_k_index, top_k_weights)
        self.fusedly()
        weights, activation = (self.gate_up_proj, self.down_proj), activation_of(self.act_fn) or ""
        return ops.experts(hidden_states, top_k_index, top_k_weights, *weights, activation=activation)


def _why_not_stacked(module: Any, x: Tensor) -> str:
    for name in STACKED:
        parameter = module._parameters[name]
        if type(parameter) not in PLAIN_PARAMETERS or parameter.dtype != x.dtype:
            return f"its {name} is no plain parameter of {x.dtype}"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts lie on several devices"
    if module.act_fn._forward_hooks or activation_of(module.act_fn) is None:
        return "its activation is none of ours"
    return why_no_kernel("experts", x)


class FusedSeparateExperts(Fused):
    """Experts that are networks of their own: two linear layers, an activation and dropout between them.

    Attributes:
        layers: the names of the two linear layers.
        is_one_hot: the choice comes as rows [T, K, E] of which one is set, or none; else as indices [T, K].
    """

    layers: ClassVar[tuple[str, str]]
    is_one_hot: ClassVar[bool]

    def forward(self, hidden_states: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        """Returns the shape of `hidden_states` [T, H], from the choice of experts and their weights [T, K]."""
        reason = _why_not_separate(self, hidden_states)
        if reason:
            return self.plainly(reason, hidden_states, selected, weights)
        self.fusedly()
        networks: list[Any] = list(self._modules.values())[: self.num_experts]
        first, second = ([getattr(one, name) for one in networks] for name in self.layers)
        # A token without an expert, beyond its capacity, has no row set.
        index = torch.where(selected.sum(-1) > 0, selected.argmax(-1), -1) if self.is_one_hot else selected.long()
        biases: dict[str, Any] = {
            name: None if layers[0].bias is None else [layer.bias for layer in layers]
            for name, layers in (("first_bias", first), ("second_bias", second))
        }
        y = ops.experts(
            hidden_states, index, weights.to(hidden_states.dtype), [x.weight for x in first],
            [x.weight for x in second], **biases, activation=activation_of(networks[0].act) or "", gated=False,
        )  # fmt: skip
        # NLLB-MoE drops whole tokens in training, and scales in evaluation.
        kept = 1 - getattr(self, "moe_token_dropout", 0.0)
        return y if kept == 1 else y * kept


class FusedSwitchExperts(FusedSeparateExperts):
    """Switch Transformers': one expert a token, or none beyond its capacity."""

    layers, is_one_hot = ("wi", "wo"), True


class FusedNllbExperts(FusedSeparateExperts):
    """NLLB-MoE's, which take a mask of experts for their indices: only the first two ever run, and so it stays."""

    layers, is_one_hot = ("fc1", "fc2"), False


def _why_not_separate(module: Any, x: Tensor) -> str:
    networks: list[Any] = list(module._modules.values())[: module.num_experts]
    if module.training and getattr(module, "moe_token_dropout", 0.0) > 0:
        return "it drops tokens"
    for name, one in zip(module._modules, networks, strict=False):
        if one._forward_hooks or one._forward_pre_hooks:
            return f"{name} carries hooks"
        for layer in module.layers:
            reason = why_altered(f"{name}.{layer}", one._modules.get(layer), (Linear,))
            if reason:
                return reason
            if one._modules[layer].weight.dtype != x.dtype:
                return f"weights of another dtype than {x.dtype}"
        if one.training and one.dropout.p > 0:
            return "experts drop some of what they hide"
    return why_no_kernel("experts", x)


def change_of(module: Module) -> Change | None:
    """Returns what a mixture of experts would become; None for any other module."""
    if isinstance(module, ModuleDict):
        return _change_of_separate(module)
    parameters = module._parameters
    if sorted(parameters) != sorted(STACKED) or any(x is None or x.dim() != 3 for x in parameters.values()):
        return None
    activation = module._modules.get("act_fn")
    if activation is None or len(module._modules) != 1 or activation_of(activation) is None:
        return None
    # Rows of 16 bytes, as torch's grouped products ask for.
    first, second = _numbers(3, 16, 4), _numbers(3, 4, 8)

    def make() -> Module:
        return twin_of(module, {"gate_up_proj": first, "down_proj": second}, {"act_fn": activation}, num_experts=3)

    index = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [2, 1], [1, 0]])
    same = does_the_same(module, FusedExperts, make, lambda twin: [twin(_numbers(6, 4), index, _numbers(6, 2).abs())])
    return fusing("experts", FusedExperts) if same else None


def _change_of_separate(module: Any) -> Change | None:
    count = getattr(module, "num_experts", 0)
    networks: list[Any] = list(module._modules.values())[:count]
    for forward in (FusedSwitchExperts, FusedNllbExperts):
        parts = {*forward.layers, "act", "dropout"}
        if networks and all(set(one._modules) == parts for one in networks) and _is_separate(module, forward):
            return fusing("experts", forward)
    return None


def _is_separate(module: Any, forward: type[FusedSeparateExperts]) -> bool:
    """Tells whether three small networks under the module's own forward give what ours give."""
    network = next(iter(module._modules.values()))
    if activation_of(network.act) is None:
        return False
    small: dict[str, Module] = {}
    for expert in range(3):
        linears = {}
        for name, sizes in zip(forward.layers, ((4, 5), (5, 4)), strict=True):
            linears[name] = Linear(*sizes, bias=getattr(network, name).bias is not None)
            for parameter in linears[name].parameters():
                parameter.data = _numbers(*parameter.shape, seed=expert)
        small[f"expert_{expert}"] = twin_of(
            network, {}, {**linears, "act": network.act, "dropout": Dropout(0.0).eval()}
        )
    others: dict[str, Any] = {name: x for name, x in module._modules.items() if not name.startswith("expert_")}
    selected = torch.nn.functional.one_hot(torch.tensor([[0], [2], [1], [0], [2], [1]]), 3)
    selected[4] = 0
    if not forward.is_one_hot:
        selected = selected[:, 0]
    weights = _numbers(6, 1 if forward.is_one_hot else 3).abs()
    return does_the_same(
        module, forward, lambda: twin_of(module, {}, {**small, **others}, num_experts=3),
        lambda twin: [twin(_numbers(6, 4), selected, weights)],
    )  # fmt: skip


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
