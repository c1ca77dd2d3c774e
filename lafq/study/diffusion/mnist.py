"""MNIST as the model sees it: zero-padded to 32x32, one channel; splits named once.

The archives in data/MNIST/raw are checked and read as they are: nothing is extracted beside them.
"""

import gzip
import hashlib
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
REMEDY = "restore it with `git checkout -- data/MNIST/raw`"


def mnist(train: bool, root: Path = workspace.DATA) -> tuple[Tensor, Tensor]:
    """The training (60,000) or test (10,000) digits.

    Returns images, uint8 (N, 1, 32, 32), zero-padded from 28x28, and labels, int64 (N,).
    Raises FileNotFoundError or ValueError naming the archive that is missing or damaged.
    """
    split = "train" if train else "t10k"
    images, labels = (
        _read(root / "MNIST" / "raw" / name, md5)
        for name, md5 in ARCHIVES.items()
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
    packed = archive.read_bytes()
    if hashlib.md5(packed).hexdigest() != md5:
        raise ValueError(f"the MNIST archive {archive} is damaged (its md5 is not {md5}): {REMEDY}")
    content = gzip.decompress(packed)
    return torch.frombuffer(bytearray(content[4 + 4 * content[3] :]), dtype=torch.uint8)
