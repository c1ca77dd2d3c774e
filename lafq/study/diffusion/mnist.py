"""MNIST as the model sees it: zero-padded to 32x32, one channel; splits named once.

The archives in data/MNIST/raw are checked and read as they are: nothing is extracted beside them.
"""

import gzip
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity

from lafq.study import workspace

SHAPE = (1, 32, 32)
PADDING = 2
REFERENCE = slice(0, 5000)
HELD_OUT = slice(5000, 10000)
REMEDY = "restore it with `git checkout -- data/MNIST/raw`"


def mnist(train: bool, root: Path = workspace.DATA) -> tuple[Tensor, Tensor]:
    """The training (60,000) or test (10,000) digits.

    Returns images, uint8 (N, 1, 32, 32), zero-padded from 28x28, and labels, int64 (N,).
    Raises FileNotFoundError or ValueError naming the archive that is missing or damaged.
    """
    split = "train" if train else "t10k"
    images, labels = (
        _read(root / "MNIST" / "raw" / name, md5)
        for name, md5 in MNIST.resources
        if name.startswith(split)
    )
    return F.pad(images.view(-1, 1, 28, 28), (PADDING,) * 4), labels.long()


def unpadded(images: Tensor) -> Tensor:
    """The digits without their padding, (N, 1, 28, 28)."""
    return images[:, :, PADDING:-PADDING, PADDING:-PADDING]


def _read(archive: Path, md5: str) -> Tensor:
    """The bytes of an archive behind its header: four for its kind, and four for each dimension."""
    if not archive.is_file():
        raise FileNotFoundError(f"the MNIST archive {archive} is missing: {REMEDY}")
    if not check_integrity(str(archive), md5):
        raise ValueError(f"the MNIST archive {archive} is damaged (its md5 is not {md5}): {REMEDY}")
    content = gzip.decompress(archive.read_bytes())
    return torch.frombuffer(bytearray(content[4 + 4 * content[3] :]), dtype=torch.uint8)
