"""lafq: quantize a network where its Fisher information says that it hurts least.

Seven names serve a model of your own: `estimate_sensitivity`, `allocate`, `allocate_coded`,
`quantize`, `dequantize`, `save_quantized`, `load_quantized`. The packages hold the study of the
paper: `quantization`, `fisher` and `allocation` are the method, `diffusion` the model,
`evaluation`, `paper` and `presentation` the study. Each may import those before it.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_PUBLIC = {
    "estimate_sensitivity": "lafq.fisher.sensitivity",
    "allocate": "lafq.allocation.allocate",
    "allocate_coded": "lafq.allocation.coded",
    "quantize": "lafq.quantization.model",
    "dequantize": "lafq.quantization.model",
    "save_quantized": "lafq.quantization.checkpoint",
    "load_quantized": "lafq.quantization.checkpoint",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: `allocate` brings scipy and pandas, which
    nothing else here needs.
    """
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lafq' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
