"""Fused kernels for encoder-decoder Transformers.

`tfm.nn` holds torch.nn's Transformer layers under the same names and state_dict keys, `tfm.accelerate(model)` puts them
into a model that already exists, `tfm.ops` is every operation as a function, and `tfm train` / `tfm translate` are the
bundled translation model.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# In a source checkout the kernels lie beside this package; setup.py installs them inside it.
if not (Path(__file__).parent / "kernels").exists():
    __path__.append(str(Path(__file__).parent.parent))

from tfm import nn, ops
from tfm.ops.backends import use
from tfm.patching import Report, accelerate, restore

try:
    __version__ = version("tfm")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+checkout"

__all__ = ["Report", "__version__", "accelerate", "nn", "ops", "restore", "use"]
