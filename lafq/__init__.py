"""lafq: layer-adaptive quantization of a diffusion model by Fisher information.

The notebooks tell the story; this package holds the few functions they call.
"""

import torch

__version__ = "0.1.0"


def _declare_torchvision_operators() -> None:
    """Declare torchvision's two native operators where its wheel was built against another torch.

    The published torchvision wheel beside a CPU-only torch cannot load its extension, and then fails on import
    although nothing here calls these operators. Where they exist this does nothing.
    """
    if not hasattr(torch.ops.torchvision, "nms"):
        for schema in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        ):
            _LIBRARY.define(schema)


_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
_declare_torchvision_operators()
