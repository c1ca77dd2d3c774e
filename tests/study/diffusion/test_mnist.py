import shutil

import pytest
import torch

from lafq.rng import generator
from lafq.study import workspace
from lafq.study.diffusion.ddpm import unit_interval
from lafq.study.diffusion.mnist import mnist


def test_shapes_padding_and_labels():
    images, labels = mnist(train=False)
    assert images.shape == (10_000, 1, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.bincount().min() > 800
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert images[:, 0, border].max() == 0
    assert unit_interval(images).max() == 1


@pytest.fixture
def archives(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (workspace.DATA / "MNIST" / "raw").glob("*.gz"):
        shutil.copy(path, raw)
    return raw


def test_missing_archive(archives):
    (archives / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"train-labels.* is missing or damaged: restore it"):
        mnist(train=True, root=archives.parent.parent)


def test_damaged_archive(archives):
    path = archives / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"t10k-images.* is missing or damaged: restore it"):
        mnist(train=False, root=archives.parent.parent)


def test_extracted_files_beside_the_archives_are_not_read(archives):
    expected = mnist(train=False)
    (archives / "t10k-images-idx3-ubyte").write_bytes(bytes(16 + 28 * 28 * 10_000))
    found = mnist(train=False, root=archives.parent.parent)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len(list(archives.iterdir())) == 5


def test_named_streams():
    def draw(*key):
        return torch.randn(5, generator=generator(*key))

    assert torch.equal(draw(0, 1), draw(0, 1))
    assert not torch.equal(draw(0, 1), draw(1, 0))
    assert not torch.equal(draw(0, 1), draw(0, 2))
