"""Recording of calls that shall run without tfm: the record holds torch's own operations alone, the reference's."""

from __future__ import annotations

import warnings

import torch

# As in torch's own modules, the sizes that a trace asks about decide what is refused, not what is computed.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"tfm\.")


def tracing() -> bool:
    """Tells whether torch.jit.trace or torch.onnx.export records this call. Neither knows operators of others."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
