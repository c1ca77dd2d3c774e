import pytest

from lafq.quantization.checkpoint import load_quantized, save_quantized
from lafq.quantization.model import dequantize_, nbytes, quantize, weights_sha256
from lafq.study import long_runs
from lafq.study.diffusion import subject
from lafq.study.diffusion.unet import UNet
from lafq.study.images import sampling
from lafq.study.images.sampling import ImageStore
from lafq.study.rows import measured_sensitivity
from lafq.study.workspace import Workspace

SMOKE = Workspace("smoke", keep=True)
SAMPLING = sampling.Sampling(20, 2, 0, 10)
MADE = {
    "rounding": "error feedback, unshrunk scales",
    "fisher": {"kind": "Monte Carlo", "samples": 20, "seed": 0},
}


@pytest.fixture
def known(tiny):
    return measured_sensitivity(tiny, 20, seed=0)


@pytest.mark.slow
def test_the_packed_file_is_the_row_that_was_measured(sandbox, tiny, known, monkeypatch):
    budget = 0.3 * nbytes(tiny, {}) / 2**20
    table = long_runs.ship(SMOKE, tiny, known, budget, MADE, SAMPLING)
    path = SMOKE.results / subject.PACKED
    assert path.stat().st_size <= budget * 2**20
    assert table["damage"].tolist()[0] == 0 < table["damage"].iloc[1]
    small = dequantize_(load_quantized(path, UNet(4)))
    [first, _] = sorted(ImageStore(SMOKE).folder.glob(f"{table['sample'].iloc[1]}_*.npz"))
    images, record = sampling.read(first)
    assert record["recipe"]["rounding"] == MADE["rounding"]
    assert record["drawn_from"] == weights_sha256(small)
    assert (images == sampling.sample(small, 10, 2, 0, batch_size=10).numpy()).all()


def test_packed_weights_never_stand_in_for_the_trained_ones(sandbox, tiny):
    save_quantized(SMOKE.results / subject.PACKED, quantize(tiny, {}), tiny)
    with pytest.raises(
        FileNotFoundError, match=r"ema.safetensors is missing: run 01_train with TRAIN=1"
    ):
        subject.load_model(SMOKE, 4)


def test_too_small_a_size_to_ship(sandbox, tiny, known):
    with pytest.raises(ValueError, match="the smallest"):
        long_runs.ship(SMOKE, tiny, known, 0.01, MADE, SAMPLING)
    assert not (SMOKE.results / subject.PACKED).exists()
