"""A process that launches kernels into nothing, the ordinary way and by plans, and prints what the launcher got."""

from __future__ import annotations

import gc
import json
from typing import Any

import torch

from tools.host import stand_in, timing

timing.use_launcher()

from triton.backends.nvidia.driver import CudaLauncher  # noqa: E402

import tfm  # noqa: E402
from tfm import ops  # noqa: E402
from tfm.kernels.plan import Plan  # noqa: E402

ADDRESS = 1 << 32
# Of the launcher's arguments, those that a plan leaves out: what profilers are told.
METADATA = slice(6, 9)
launches: list[list[Any]] = []
launcher = CudaLauncher.__call__


def taken_down(self: CudaLauncher, *arguments: Any) -> Any:
    """Keeps the arguments; addresses by their order within the launch."""
    names: dict[int, str] = {}

    def written(x: Any) -> Any:
        if isinstance(x, tuple):
            return [written(field) for field in x]
        if isinstance(x, torch.Tensor):
            return written(x.data_ptr())
        if isinstance(x, int) and x > ADDRESS:
            return names.setdefault(x, f"address {len(names)}")
        return x if isinstance(x, (int, float, str, bool)) else str(type(x))

    given = list(arguments)
    del given[METADATA]
    launches.append([written(x) for x in given])
    return launcher(self, *arguments)


def work(tensors: list[torch.Tensor]) -> None:
    x, residual, weight, query, key, value, *longer = tensors
    rules = {"dropout_p": 0.1, "seed": torch.tensor(5), "site": 3}
    y, h = ops.residual_layer_norm(x, residual, weight, None, **rules)
    torch.autograd.grad((y, h), (x, residual, weight), (y.detach(), h.detach()))
    for heads, options in (((query, key, value), rules | {"is_causal": True}), (longer, {})):
        out = ops.attention(*heads, **options)
        torch.autograd.grad(out, heads, out.detach())


def main() -> None:
    half = {"dtype": torch.bfloat16}
    rows = [torch.randn(16, 64, **half) for _ in range(2)]
    heads = [torch.randn(2, 2, length, 64, **half) for length in (9, 9, 9, 300, 300, 300)]
    tensors = [x.requires_grad_() for x in (*rows, torch.ones(64), *heads)]
    CudaLauncher.__call__ = taken_down
    rounds = []
    with stand_in.as_on_gpu(), tfm.use("triton"):
        for _ in range(3):
            launches.clear()
            work(tensors)
            rounds.append(list(launches))
        plans = len({id(found) for found in gc.get_objects() if type(found) is Plan})
    print(json.dumps({"rounds": rounds, "plans": plans}))


if __name__ == "__main__":
    main()
