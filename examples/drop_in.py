"""`tfm.accelerate` on a model that exists already: the same weights, the same results, in place.

The model is plain torch and stays so in its own file; one call puts tfm's layers in place of torch's. Prints what was
replaced and what was left and why, how far the outputs differ, and the time of a training step before and after.
"""

import time

import torch
from torch import Tensor, nn

import tfm


class ScaledNorm(nn.LayerNorm):
    """A subclass of the user's, whose own code must not be lost: accelerate() leaves it."""

    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


class Classifier(nn.Module):
    """Sentences of embedded tokens to one of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=3)
        self.norm = ScaledNorm(128)
        self.classes = nn.Linear(128, 10)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y = self.norm(self.encoder(x, src_key_padding_mask=padding))
        return self.classes(y.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True))


def milliseconds(model: nn.Module, x: Tensor, padding: Tensor, steps: int = 5) -> float:
    """Returns the time of the fastest forward and backward."""
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        model(x, padding).square().mean().backward()
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


def main() -> None:
    torch.manual_seed(0)
    model = Classifier()
    x, lengths = torch.randn(64, 40, 128), torch.randint(5, 41, (64, 1))
    padding = torch.arange(40) >= lengths
    before, slow = model(x, padding), milliseconds(model, x, padding)
    print(tfm.accelerate(model))
    after, fast = model(x, padding), milliseconds(model, x, padding)
    print(f"largest difference {(after - before).abs().max().item():.1e}")
    print(f"{slow:.1f} ms a step before, {fast:.1f} ms after")


if __name__ == "__main__":
    main()
