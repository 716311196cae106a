"""RWKV's time mix and channel mix: each step mixed with the one before, and attention by exponential decay.

A mix with the step before is a convolution over two steps, whose state is that step. Weights are read at each call:
RWKV rescales them in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, Module, ZeroPad2d

from tfm import ops
from tfm.patching.fusion import Change, Fused, fusing, why_altered, why_no_kernel
from tfm.patching.huggingface.trial import does_the_same, twin_of

# A model's state: the last step of the channel mix, that of the time mix, numerator, denominator and maximum; each
# [B, D, layers], changed in place.
State = list[Tensor] | None
CHANNEL_MIX, TIME_MIX, SUMS = 0, 1, 2


class FusedTimeMix(Fused):
    """output(sigmoid(receptance) * wkv(key, value)), each of the three a product of a mix."""

    def forward(self, hidden: Tensor, state: State = None, use_cache: bool = False) -> tuple[Tensor, State]:
        """Returns the shape of `hidden` [B, S, D], and the state."""
        reason = _why_not(hidden, state) or why_no_kernel("wkv", hidden)
        if reason:
            return self.plainly(reason, hidden, state=state, use_cache=use_cache)
        self.fusedly()
        weights = (self.time_mix_key, self.time_mix_value, self.time_mix_receptance)
        key, value, receptance = _mixed(hidden, weights, state, TIME_MIX, self.layer_id)
        key, value, receptance = self.key(key), self.value(value), torch.sigmoid(self.receptance(receptance))
        before = None if state is None else torch.stack([x[:, :, self.layer_id] for x in state[SUMS:]])
        y, after = ops.wkv(
            self.time_decay, self.time_first, key, value, initial_state=before, return_final_state=True
        )  # fmt: skip
        if state is not None:
            for whole, part in zip(state[SUMS:], after.unbind(), strict=True):
                whole[:, :, self.layer_id] = part
        return self.output(receptance * y), state


class FusedChannelMix(Fused):
    """sigmoid(receptance) * value(relu(key)²), with the network in one operation."""

    def forward(self, hidden: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Returns the shape of `hidden` [B, S, D], and the state."""
        reason = _why_not(hidden, state) or why_no_kernel("feed_forward", hidden)
        for name in ("key", "value"):
            reason = reason or why_altered(name, self._modules.get(name), (Linear,))
        if reason:
            return self.plainly(reason, hidden, state=state)
        self.fusedly()
        weights = (self.time_mix_key, self.time_mix_receptance)
        key, receptance = _mixed(hidden, weights, state, CHANNEL_MIX, self.layer_id)
        if _is_step(hidden):
            value = self.value(torch.relu(self.key(key)).square())
        else:
            value = ops.feed_forward(
                key, self.key.weight, self.key.bias, self.value.weight, self.value.bias, activation="relu_squared"
            )  # fmt: skip
        return torch.sigmoid(self.receptance(receptance)) * value, state


class Mix(NamedTuple):
    """What a module consists of, beside the shift by a step, and what it becomes."""

    parameters: tuple[str, ...]
    linears: tuple[str, ...]
    what: str
    forward: type[Fused]


MIXES = (
    Mix(
        ("time_decay", "time_first", "time_mix_key", "time_mix_value", "time_mix_receptance"),
        ("key", "value", "receptance", "output"), "recurrence", FusedTimeMix,
    ),
    Mix(("time_mix_key", "time_mix_receptance"), ("key", "receptance", "value"), "feed_forward", FusedChannelMix),
)  # fmt: skip


def change_of(module: Module) -> Change | None:
    """Returns what a time mix or a channel mix would become; None for any other module."""
    for mix in MIXES:
        if _consists_of(module, mix) and does_the_same(module, mix.forward, lambda: _twin(module), _tried):
            return fusing(mix.what, mix.forward)
    return None


def _mixed(hidden: Tensor, weights: tuple[Tensor, ...], state: State, part: int, layer: int) -> list[Tensor]:
    """Returns weight * hidden + (1 - weight) * the step before, for each of these weights; moves the state on."""
    if state is not None and _is_step(hidden):
        last = state[part][:, None, :, layer]
        change = hidden - last
        mixed = [torch.addcmul(last, change, weight) for weight in weights]
    else:
        now = torch.cat(weights).flatten(1)
        taps = torch.stack((1 - now, now), -1)
        before = None if state is None else state[part][:, :, layer, None]
        steps = hidden.transpose(1, 2)
        mixed = [ops.causal_conv1d(steps, one, initial_state=before).transpose(1, 2) for one in taps.unbind()]
    if state is not None:
        state[part][:, :, layer] = hidden[:, -1]
    return mixed


def _is_step(hidden: Tensor) -> bool:
    """Tells whether there is one step alone, for which torch's own operations are as fast."""
    return hidden.shape[1] == 1


def _why_not(hidden: Tensor, state: State) -> str:
    if state is not None and hidden.shape[0] > 1 and hidden.shape[1] == 1:
        return "transformers takes one step of several sequences for several steps"
    return why_no_kernel("causal_conv1d", hidden)


def _consists_of(module: Module, mix: Mix) -> bool:
    if sorted(module._parameters) != sorted(mix.parameters):
        return False
    shift = module._modules.get("time_shift")
    is_shift = type(shift) is ZeroPad2d and shift.padding == (0, 0, 1, -1)
    return is_shift and sorted(module._modules) == sorted(("time_shift", *mix.linears))


def _twin(module: Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: torch.randn((1, 1, 4) if x is not None and x.dim() == 3 else (4,), generator=generator)
        for name, x in module._parameters.items()
    }
    children: dict[str, Module] = {"time_shift": ZeroPad2d((0, 0, 1, -1))}
    for name in module._modules:
        if name != "time_shift":
            linear = Linear(4, 4, bias=False)
            linear.weight.data = torch.randn(4, 4, generator=generator)
            children[name] = linear
    return twin_of(module, parameters, children, layer_id=1)


def _tried(twin: Any) -> list[Tensor]:
    """Returns what comes of several steps, and of more upon their state."""
    generator = torch.Generator().manual_seed(1)
    steps, more = (torch.randn(2, count, 4, generator=generator) for count in (5, 3))
    state = [torch.rand(2, 4, 2, generator=generator) + 0.5 for _ in range(5)]
    one = [x[:1].clone() for x in state]
    given = ((steps, None), (more, state), (more[:1, :1], one))
    return [*(type(twin).forward(twin, x, state=before)[0] for x, before in given), *state, *one]
