import pytest
import torch

from lafq.study import workspace
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.unet import UNet


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny, and `make test` runs as many processes as there are cores."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return UNet(4).eval()


@pytest.fixture(scope="session")
def digits():
    return mnist(train=False)[0][:64]


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    for name in ("RESULTS", "FIGURES", "BUILD"):
        monkeypatch.setattr(workspace, name, tmp_path / name.lower())
    return tmp_path
