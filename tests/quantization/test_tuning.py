from itertools import islice

import pytest
import torch
from torch import nn

from lafq.quantization.model import dequantize_, nbytes, quantize, resident_bytes, weights_sha256
from lafq.quantization.tuning import tune
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.unet import quantizable
from lafq.tensors import save_tensors


@pytest.fixture
def plan(tiny):
    return dict.fromkeys(quantizable(tiny), "int3")


def batches(digits, steps, seed=0, size=8):
    return noised_batches(digits, steps * size, seed, size)


def change(model, small, digits):
    ((x, t),) = noised_batches(digits, 64, 9, 64)
    with torch.inference_mode():
        return (small(x, t) - model(x, t)).square().mean().item()


@pytest.mark.slow
def test_output_comes_nearer_on_other_draws_at_the_same_bytes(tiny, plan, digits):
    before = dequantize_(quantize(tiny, plan))
    packed = quantize(tiny, plan)
    whole = weights_sha256(tiny)
    assert tune(tiny, packed, batches(digits, 50), 50) is packed
    assert resident_bytes(packed) == nbytes(tiny, plan)
    assert weights_sha256(tiny) == whole
    assert all(p.requires_grad for p in tiny.parameters())
    after = dequantize_(packed)
    assert change(tiny, after, digits) < 0.8 * change(tiny, before, digits)
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(p, q) == (p.ndim > 1), name


def test_a_shift_of_the_mean_is_taken_out_exactly():
    """y = Wx + b of one constant input: rounding W moves the output by a constant, which the bias
    takes back.
    """
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 4)).eval()
    x = torch.randn(1, 6)
    packed = quantize(layer, {"0.weight": "int3"})
    off = dequantize_(quantize(layer, {"0.weight": "int3"}))(x) - layer(x)
    tune(layer, packed, ((x,) for _ in range(3000)), 3000)
    moved = dequantize_(packed)[0].bias - layer[0].bias
    assert off.abs().min() > 1e-3
    assert torch.allclose(moved, -off[0], atol=1e-4)


def test_the_same_draws_give_the_same_bytes(tiny, plan, digits, tmp_path):
    for name in ("a", "b"):
        small = tune(tiny, quantize(tiny, plan), batches(digits, 3), 3)
        save_tensors(tmp_path / name, small.state_dict())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_too_few_batches_leave_the_copy_as_it_was(tiny, plan, digits):
    packed = quantize(tiny, plan)
    before = weights_sha256(packed)
    with pytest.raises(
        ValueError, match="5 steps of tuning need as many batches, and there were 2"
    ):
        tune(tiny, packed, islice(batches(digits, 5), 2), 5)
    assert weights_sha256(packed) == before
