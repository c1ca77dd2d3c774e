import pytest
import torch

from lafq.rng import generator
from lafq.study import workspace
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.unet import UNet, quantizable


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny, and `make test` runs as many processes as there are cores."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return UNet(4).eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UNet(4).eval()


@pytest.fixture(scope="module")
def fisher(model):
    """Spread over decades, as Fisher values are, between tensors, channels and weights."""
    g = generator(3)
    return {
        n: torch.exp(2 * torch.randn((), generator=g) + 2 * torch.randn(w.shape, generator=g))
        for n, w in quantizable(model).items()
    }


@pytest.fixture(scope="session")
def digits():
    return mnist(train=False)[0][:64]


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    for name in ("RESULTS", "FIGURES", "BUILD"):
        monkeypatch.setattr(workspace, name, tmp_path / name.lower())
    return tmp_path
