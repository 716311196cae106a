"""The state of training in one file: weights, Adam's moments, random numbers and the place in the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from tfm.checkpoint import check_tensors, layout, load_tensors, save_tensors
from tfm.config import TransformerConfig
from tfm.errors import UserError
from tfm.model import Transformer
from tfm.records import Place, check

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False)
class State:
    """The contents of a state file, checked.

    Attributes:
        tensors: by the names that `describe` gives.
        place: in the data.
    """

    tensors: dict[str, Tensor]
    place: Place

    def restore(self, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        """Puts weights, moments and random numbers where they were."""
        device, tensors = model.embedding.device, self.tensors
        prefix = "model."
        model.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        for name, parameter in model.named_parameters():
            keys = ("step", *MOMENTS)
            optimizer.state[parameter] = {key: tensors[f"optimizer.{name}.{key}"].to(device) for key in keys}
        torch.set_rng_state(tensors["random.cpu"])
        if device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], device)


def write(path: Path, model: Transformer, optimizer: torch.optim.Optimizer, loss_sum: Tensor, place: Place) -> None:
    """Writes everything that `read` gives back."""
    moments = {parameter: optimizer.state[parameter] for parameter in model.parameters()}
    save_tensors(path, describe(model, moments, loss_sum), asdict(place))


def read(path: Path, config: TransformerConfig) -> State:
    """Returns the state of a model of this shape.

    Raises:
        UserError: the file is missing, damaged, or another model's. Adam's fused kernel trusts its shapes.
    """
    tensors, described = load_tensors(path)
    place = check(Place, described, path)
    model, step = layout(config), torch.zeros(())
    moments = {p: {"step": step, **dict.fromkeys(MOMENTS, p)} for p in model.parameters()}
    expected = describe(model, moments, torch.zeros((), dtype=torch.float64))
    cuda = {name: tensor for name, tensor in tensors.items() if name == "random.cuda"}
    check_tensors(path, tensors, expected | {name: torch.zeros(16, dtype=torch.uint8) for name in cuda})
    for name, _ in model.named_parameters():
        if tensors[f"optimizer.{name}.step"] != place.step:
            raise UserError(f"{path}: optimizer.{name}.step: expected {place.step}, where the run stands")
    try:
        torch.Generator().set_state(tensors["random.cpu"])
    except RuntimeError as error:
        raise UserError(f"{path}: random.cpu: not a state of torch's generator ({error})") from None
    return State(tensors, place)


def describe(
    model: Transformer, moments: Mapping[torch.nn.Parameter, Mapping[str, Tensor]], loss_sum: Tensor
) -> dict[str, Tensor]:
    """Returns the tensors of a state, by name; the GPU's random numbers too, where the model is there."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, tensor in moments[parameter].items():
            state[f"optimizer.{name}.{key}"] = tensor
    state["random.cpu"] = torch.get_rng_state()
    if model.embedding.device.type == "cuda":
        state["random.cuda"] = torch.cuda.get_rng_state(model.embedding.device)
    return state | {"loss_sum": loss_sum}
