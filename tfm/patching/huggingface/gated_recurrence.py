"""RecurrentGemma's recurrent block: a short convolution and the RG-LRU, whose states the modules keep themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv1d, Identity, Linear, Module

from tfm import ops
from tfm.ops.causal_conv1d import WIDTHS
from tfm.patching.fusion import Change, Fused, fusing, why_altered, why_no_kernel
from tfm.patching.huggingface.trial import does_the_same, twin_of

UNIT = ("recurrent_param", "input_gate_weight", "input_gate_bias", "recurrent_gate_weight", "recurrent_gate_bias")
BLOCK = ("linear_y", "linear_x", "linear_out", "conv_1d", "rg_lru", "act_fn")


class FusedGatedRecurrence(Fused):
    """The RG-LRU: the gates' products, and all behind them in one operation."""

    recurrent_states: Tensor | None

    def forward(self, activations: Tensor, position_ids: Tensor) -> Tensor:
        """Returns the shape of `activations` [B, S, D]; a sequence begins anew at position 0."""
        reason = why_no_kernel("rg_lru", activations)
        if reason:
            return self.plainly(reason, activations, position_ids)
        self.fusedly()
        batch, steps, _ = activations.shape
        blocks = activations.reshape(batch * steps, self.num_attention_heads, self.block_width).transpose(0, 1)
        gates = [
            torch.baddbmm(bias[:, None], blocks, weight).transpose(0, 1).reshape(activations.shape)
            for bias, weight in (
                (self.input_gate_bias, self.input_gate_weight),
                (self.recurrent_gate_bias, self.recurrent_gate_weight),
            )
        ]
        state = self.recurrent_states
        y, self.recurrent_states = ops.rg_lru(
            activations, gates[0], gates[1], self.recurrent_param, reset=(position_ids == 0).expand(batch, steps),
            initial_state=None if state is None else state.to(activations.device), return_final_state=True,
        )  # fmt: skip
        return y


class FusedRecurrentBlock(Fused):
    """A recurrent block whose convolution is one operation, with its state."""

    conv1d_state: Tensor | None

    def forward(
        self, input_states: Tensor, position_ids: Tensor, attention_mask: Any, use_cache: bool = True, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Returns the shape of `input_states` [B, S, C], and None."""
        reason = why_altered("conv_1d", self._modules.get("conv_1d"), (Conv1d,))
        reason = reason or why_no_kernel("causal_conv1d", input_states)
        if reason:
            return self.plainly(reason, input_states, position_ids, attention_mask, use_cache, **kwargs)
        self.fusedly()
        y_branch = self.act_fn(self.linear_y(input_states))
        x_branch = self.linear_x(input_states)
        batch = len(input_states)
        if use_cache and (self.conv1d_state is None or len(self.conv1d_state) != batch):
            self._setup_cache(batch, x_branch.device, x_branch.dtype)
        if not use_cache:
            self.conv1d_state = self.rg_lru.recurrent_states = None
        # More than one step begin at the first of all.
        before = self.conv1d_state if position_ids.shape[1] == 1 else None
        x_branch, after = ops.causal_conv1d(
            x_branch.transpose(1, 2), self.conv_1d.weight[:, 0], self.conv_1d.bias, initial_state=before,
            return_final_state=True,
        )  # fmt: skip
        if use_cache:
            self.conv1d_state = after
        hidden_states = self.rg_lru(x_branch.transpose(1, 2), position_ids) * y_branch
        return self.linear_out(hidden_states), None


def change_of(module: Module) -> Change | None:
    """Returns what an RG-LRU or a block around one would become; None for any other module."""
    if sorted(module._parameters) == sorted(UNIT) and not module._modules:
        is_ours = does_the_same(module, FusedGatedRecurrence, lambda: _unit(module), _tried_unit)
        return fusing("recurrence", FusedGatedRecurrence) if is_ours else None
    if sorted(module._modules) == sorted(BLOCK) and not module._parameters:
        convolution: Any = module._modules["conv_1d"]
        is_known = type(convolution) is Conv1d and convolution.kernel_size[0] in WIDTHS
        is_ours = is_known and does_the_same(module, FusedRecurrentBlock, lambda: _block(module), _tried_block)
        return fusing("recurrence", FusedRecurrentBlock) if is_ours else None
    return None


def _unit(module: Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (2, 3, 3), "bias": (2, 3)}
    parameters = {
        name: torch.randn(shapes.get(name.rpartition("_")[2], (6,)), generator=generator) for name in UNIT
    }  # fmt: skip
    return twin_of(module, parameters, {}, num_attention_heads=2, block_width=3, recurrent_states=None)


def _tried_unit(twin: Any) -> list[Tensor]:
    """Returns what comes of several steps, some of which begin anew, and of one more."""
    generator, found = torch.Generator().manual_seed(1), []
    for positions in ([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]], [[2], [8]]):
        steps = torch.randn(2, len(positions[0]), 6, generator=generator)
        found += [type(twin).forward(twin, steps, torch.tensor(positions)), twin.recurrent_states]
    return found


class Doubling(Module):
    """Stands for the RG-LRU in the trial of a block."""

    recurrent_states: Tensor | None = None

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Returns 2 x."""
        return 2.0 * x


def _block(module: Module) -> Any:
    convolution = Conv1d(4, 4, 4, groups=4, padding=3)
    linears = {name: Linear(4, 4) for name in ("linear_y", "linear_x", "linear_out")}
    generator = torch.Generator().manual_seed(0)
    for child in (convolution, *linears.values()):
        for parameter in child.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    children = {**linears, "conv_1d": convolution, "rg_lru": Doubling(), "act_fn": Identity()}
    return twin_of(module, {}, children, lru_width=4, hidden_size=4, conv1d_width=4, conv1d_state=None)


def _tried_block(twin: Any) -> list[Tensor]:
    """Returns what comes of steps without a cache, of a few with one, of more, and of one upon them."""
    generator, found = torch.Generator().manual_seed(1), []
    for first, count, use_cache in ((0, 5, False), (0, 2, True), (0, 6, True), (6, 1, True)):
        steps, positions = torch.randn(2, count, 4, generator=generator), torch.arange(first, first + count)[None]
        found.append(type(twin).forward(twin, steps, positions, None, use_cache)[0])
        found += [] if twin.conv1d_state is None else [twin.conv1d_state]
    return found
