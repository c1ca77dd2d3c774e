"""lafq: quantize a network where its Fisher information says that it hurts least.

Six names serve a model of your own: `estimate_sensitivity`, `allocate`, `quantize`, `dequantize`,
`save_quantized`, `load_quantized`. `quantization`, `fisher` and `allocation` are the method;
`study` is the poster's experiment, which the method does not import.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_PUBLIC = {
    "estimate_sensitivity": "lafq.fisher.sensitivity",
    "allocate": "lafq.allocation.allocate",
    "quantize": "lafq.quantization.model",
    "dequantize": "lafq.quantization.model",
    "save_quantized": "lafq.quantization.checkpoint",
    "load_quantized": "lafq.quantization.checkpoint",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: only `allocate` needs pandas."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lafq' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
