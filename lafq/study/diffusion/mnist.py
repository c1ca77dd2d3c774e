"""MNIST as the model sees it: zero-padded to 32x32, one channel; splits named once.

The archives in data/MNIST/raw are checked and read as they are: nothing is extracted beside them.
"""

import gzip
import hashlib
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lafq.study import workspace

# The archives in their canonical form, images and labels, with their md5.
ARCHIVES = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
SHAPE = (1, 32, 32)
PADDING = 2
REFERENCE = slice(0, 5000)
HELD_OUT = slice(5000, 10000)


def mnist(train: bool, root: Path = workspace.DATA) -> tuple[Tensor, Tensor]:
    """The training (60,000) or test (10,000) digits, uint8 (N, 1, 32, 32), and labels, int64 (N,);
    ValueError naming the archive that is missing or damaged.
    """
    raw, names = root / "MNIST" / "raw", list(ARCHIVES)
    images, labels = (_read(raw / name) for name in (names[:2] if train else names[2:]))
    return F.pad(images.view(-1, 1, 28, 28), (PADDING,) * 4), labels.long()


def unpadded(images: Tensor) -> Tensor:
    """The digits without their padding, (N, 1, 28, 28)."""
    return images[:, :, PADDING:-PADDING, PADDING:-PADDING]


@cache
def _read(archive: Path) -> Tensor:
    packed = archive.read_bytes() if archive.is_file() else b""
    if hashlib.md5(packed).hexdigest() != ARCHIVES[archive.name]:
        remedy = "restore it with `git checkout -- data/MNIST/raw`"
        raise ValueError(f"the MNIST archive {archive} is missing or damaged: {remedy}")
    content = gzip.decompress(packed)
    # The header has four bytes for the kind, and four for each dimension.
    return torch.frombuffer(bytearray(content[4 + 4 * content[3] :]), dtype=torch.uint8)
