"""Fused kernels for encoder-decoder Transformers.

`tfm.nn` holds torch.nn's Transformer layers under the same names and state_dict keys, `tfm.accelerate(model)` puts them
into a model that already exists, `tfm.ops` is every operation as a function, and `tfm train` / `tfm translate` are the
bundled translation model.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a source checkout the kernels lie beside this package; setup.py installs them inside it.
if not (Path(__file__).parent / "kernels").exists():
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from tfm import nn, ops
    from tfm.ops.backends import use
    from tfm.patching import Report, accelerate, graphed, restore

# Imported on first use: torch takes seconds, which `tfm --help` need not wait for.
_HOMES = {"use": "tfm.ops.backends"} | dict.fromkeys(("Report", "accelerate", "graphed", "restore"), "tfm.patching")

try:
    __version__ = version("tfm")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+checkout"

__all__ = ["Report", "__version__", "accelerate", "graphed", "nn", "ops", "restore", "use"]


def __dir__() -> list[str]:
    """Lists the names that users need, those not imported yet among them."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]


def __getattr__(name: str) -> Any:
    if name in ("nn", "ops"):
        return import_module(f"tfm.{name}")
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value
    raise AttributeError(f"module 'tfm' has no attribute {name!r}")
