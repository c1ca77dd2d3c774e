import numpy as np
import pandas as pd
import pytest
import torch

from lafq.diffusion.mnist import HELD_OUT, mnist
from lafq.diffusion.unet import LAYERS
from lafq.paper import claims, poster

CASES = ("holds", "does not hold", "cannot be told")


def timesteps(early, front, noise=0.0):
    """Six tensors a layer; Fisher values times `early` below t = 500 and times `front` in Layers 1 and 2, log-normal noise."""
    g = np.random.default_rng(0)
    rows = []
    for layer in LAYERS:
        for i in range(6):
            wobble, lean = np.exp(noise * g.standard_normal(2) - noise**2 / 2)
            for t in range(0, 1000, 100):
                fisher = (early * lean if t < 500 else 1) * (front if layer in claims.FRONT else 1) * wobble
                rows.append({"parameter": f"{layer}.{i}", "layer": layer, "weights": 10 + i, "t_low": t, "fisher": fisher})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("early", "noise", "expected"), [(3, 0.1, CASES[0]), (0.3, 0.1, CASES[1]), (1, 0.5, CASES[2])])
def test_c1(early, noise, expected):
    claim = claims.later_steps(timesteps(early, 1, noise), seed=0)
    assert claim.verdict == expected
    assert claim.low < claim.measured < claim.high


@pytest.mark.parametrize(("front", "noise", "expected"), [(3, 0.1, CASES[0]), (0.3, 0.1, CASES[1]), (1, 0.5, CASES[2])])
def test_c2(front, noise, expected):
    claim = claims.front_layers(timesteps(1, front, noise), seed=0)
    assert claim.verdict == expected
    assert claim.low < claim.measured < claim.high


def test_ratio_of_means_is_exact_without_noise():
    assert claims.later_steps(timesteps(5, 1), seed=0).measured == pytest.approx(5)
    assert claims.front_layers(timesteps(1, 7), seed=0).measured == pytest.approx(7)


def digits(noise, seed, count=60):
    """Real digits, worse the more noise is added."""
    clean = mnist(train=False)[0][HELD_OUT][:count, 0].float()
    added = noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return (clean + added).clamp(0, 255).to(torch.uint8).numpy()


def size_sweep(inside, outside):
    rows, images = [], {}
    for i, r in enumerate(poster.RATIOS):
        best = poster.BEST_RATIOS[0] <= r <= poster.BEST_RATIOS[1]
        images[f"s{i}"] = digits(inside if best else outside, seed=i)
        rows.append({"method": "ratio", "threshold": f"{r:.2f}", "format": "fp16", "granularity": "weight", "sample": f"s{i}"})
    return pd.DataFrame(rows), images


@pytest.mark.parametrize(("inside", "outside", "expected"), [(5, 60, CASES[0]), (60, 5, CASES[1]), (20, 20, CASES[2])])
@pytest.mark.slow
def test_c3(inside, outside, expected):
    claim = claims.best_ratio(*size_sweep(inside, outside), "fp16", seed=0)
    assert claim.verdict == expected
    assert claim.low < claim.measured < claim.high
    assert "N = 60" in claim.quantity


def layerwise(mib, noise):
    columns = ["method", "threshold", "format", "granularity", "mem_mib", "kept_share", "sample"]
    rows = [
        ("uniform", "all", "fp16", "tensor", 4.0, 0, "u"),
        ("group", "a", "int8", "weight", 4.1, 0.3, "g"),
        ("ratio", "0.9", "int8", "weight", 9.0, 0.9, "x"),
        ("ratio", "0.2", "fp16", "weight", mib, 0.2, "x"),
    ]
    return pd.DataFrame(rows, columns=columns), {"u": digits(30, 0), "g": digits(noise, 1), "x": digits(90, 2)}


@pytest.mark.parametrize(("noise", "expected"), [(2, CASES[0]), (80, CASES[1]), (30, CASES[2])])
def test_c4_images(noise, expected):
    claim = claims.layerwise_images(*layerwise(5, noise), seed=0)
    assert claim.verdict == expected
    assert "group a, INT8 weight (4.10 MiB) less uniform FP16's (4.00 MiB)" in claim.quantity


@pytest.mark.parametrize(("mib", "expected"), [(3, CASES[0]), (5, CASES[1]), (4, CASES[2])])
def test_c4_size(mib, expected):
    claim = claims.layerwise_size(layerwise(mib, 0)[0])
    assert (claim.verdict, claim.measured) == (expected, mib / 4)


def test_sentence():
    claim = claims.Claim("C9", "it is so", "a quantity", 2.0, 1.5, 2.5, "holds")
    assert claims.sentence(claim) == "C9 (it is so) holds: a quantity is 2, 95 % interval 1.5 to 2.5."
