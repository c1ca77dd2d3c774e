"""MNIST as the model sees it: zero-padded to 32x32, one channel; splits named once.

torchvision's dataset class reads the four archives in data/MNIST/raw, without any network.
"""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity

from lafq import paths

REFERENCE = slice(0, 5000)
HELD_OUT = slice(5000, 10000)
REMEDY = "restore it with `git checkout -- data/MNIST/raw`"


def mnist(train: bool, root: Path = paths.DATA) -> tuple[Tensor, Tensor]:
    """The training (60,000) or test (10,000) digits.

    Returns images, uint8 (N, 1, 32, 32), zero-padded from 28x28, and labels, int64 (N,).
    Raises FileNotFoundError or ValueError naming the archive that is missing or damaged.
    """
    for name, md5 in MNIST.resources:
        archive = root / "MNIST" / "raw" / name
        if not archive.is_file():
            raise FileNotFoundError(f"the MNIST archive {archive} is missing: {REMEDY}")
        if not check_integrity(str(archive), md5):
            raise ValueError(f"the MNIST archive {archive} is damaged (its md5 is not {md5}): {REMEDY}")
    try:
        dataset = MNIST(str(root), train=train, download=True)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"an extracted file beside {archive} is damaged: delete the *-ubyte files there") from error
    return F.pad(dataset.data[:, None], (2, 2, 2, 2)), dataset.targets
