"""lafq: layer-adaptive quantization of a diffusion model by Fisher information.

The notebooks tell the story; this package holds the few functions they call.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

__version__ = "0.1.0"


def _torchvision_operators() -> torch.library.Library | None:
    """Declare torchvision's two native operators where its own library cannot be loaded, before it is first imported.

    The published torchvision wheel beside a CPU-only torch cannot load its library, and then fails on import although
    nothing here calls these operators. Where the library loads it brings them itself, and this does nothing more.
    """
    folder = Path(find_spec("torchvision").submodule_search_locations[0])
    try:
        for library in [*folder.glob("_C.*"), *folder.glob("_C_stable.*")]:
            torch.ops.load_library(str(library))
    except OSError:
        pass
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    declared = torch.library.Library("torchvision", "FRAGMENT")
    declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return declared


_DECLARED = _torchvision_operators()


def __getattr__(name: str) -> Any:
    """`lafq.allocate` and `lafq.Allocation`, imported when first asked for: they bring scipy and pandas, needed nowhere else."""
    if name not in ("allocate", "Allocation"):
        raise AttributeError(f"module 'lafq' has no attribute {name!r}")
    return getattr(import_module("lafq.allocation"), name)
