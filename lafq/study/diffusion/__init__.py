"""The paper's diffusion model: U-Net, noise schedule, training, sampling and MNIST.

It may import the root files of lafq alone; importing it makes torchvision importable beside a
CPU-only torch.
"""

from importlib.util import find_spec
from pathlib import Path

import torch


def _torchvision_operators() -> torch.library.Library | None:
    """Declare torchvision's two native operators where its own library cannot be loaded, before it
    is first imported.

    The published torchvision wheel beside a CPU-only torch cannot load its library, and then fails
    on import although nothing here calls these operators. Where the library loads it brings them
    itself, and this does nothing more.
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
