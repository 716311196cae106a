"""Dropout by coordinates, and the seeds it is drawn from."""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.operators.watching import is_watched
from tfm.ops.backends import exports_plainly
from tfm.ops.checks import check_columns, check_dropout, check_floating
from tfm.reference import dropout as reference
from tfm.taping import here
from tfm.transforms import transforming

_library = torch.library.Library("tfm", "FRAGMENT")
_library.define("draw_seed(Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def _draw_seed(device: torch.device) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


_library.impl("draw_seed", _draw_seed, "CompositeExplicitAutograd")
torch.library.register_fake(
    "tfm::draw_seed", lambda device: torch.empty((), dtype=torch.int64, device=device), lib=_library
)


def draw_seed(device: torch.device | str) -> Tensor:
    """Draws a dropout seed: an int64 scalar tensor on `device`, from that device's default generator.

    Ruled by `torch.manual_seed`; replayed by CUDA graphs, repeated by checkpoint recomputation.
    """
    device = torch.device(device)
    if not torch.compiler.is_compiling() and here.tape is not None:
        return here.tape.draw(lambda: _draw_seed(device))
    # torch does not ask an operator without tensors for the randomness that vmap was given.
    if not is_watched() or transforming() or exports_plainly():
        return _draw_seed(device)
    return torch.ops.tfm.draw_seed(device)


def seed_for(dropout_p: float, seed: Tensor | int | None, device: torch.device) -> Tensor | None:
    """Returns the seed that an operation uses, on `device`: the caller's or a fresh one; None if nothing is dropped."""
    check_dropout(dropout_p)
    if dropout_p == 0.0:
        return None
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: expected a number of 64 bits, got {seed}")
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.dim() != 0:
        raise ValueError(
            f"seed: expected an int or an int64 scalar tensor, got {seed.dtype} of shape {tuple(seed.shape)}"
        )
    return seed if seed.device == device else seed.to(device)


def dropout(x: Tensor, dropout_p: float, *, seed: Tensor | int | None = None, site: int = 0) -> Tensor:
    """Sets each element of `x` to 0 with probability `dropout_p`, and scales the others by about 1 / (1 - dropout_p).

    The mask is a pure function of the seed and the coordinates (Philox4x32-7; the probability is rounded to a multiple
    of 1/65536), the same on every backend. Runs on the reference.

    Args:
        x: [..., C], floating point; the last dimension gives the columns, the others together count the rows.
        dropout_p: in [0, 1]; 0 returns `x` itself and draws no seed.
        seed: an int or int64 scalar tensor; None draws one.
        site: which of the dropouts that share a seed this is.

    Returns:
        The result, in the shape and dtype of `x`.

    Raises:
        ValueError: an `x` that is no such tensor, a probability outside [0, 1], or a seed that is no int64 scalar.
    """
    check_columns(x)
    check_floating(x=x)
    return reference.dropout(x, dropout_p, seed_for(dropout_p, seed, x.device), site)
