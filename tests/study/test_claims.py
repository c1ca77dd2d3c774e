import numpy as np
import pandas as pd
import pytest
import torch

from lafq.study import claims, poster
from lafq.study.claims import Judge
from lafq.study.diffusion.mnist import HELD_OUT, mnist
from lafq.study.diffusion.unet import LAYERS
from lafq.study.images.evaluate import Scored
from lafq.study.rows import KEY

BINS, BLOCKS = range(0, 1000, 100), 10
WEIGHTS = pd.Series({f"{layer}.{i}": 10 + i for layer in LAYERS for i in range(3)})


def blocks(early, front, noise=0.0):
    """Fisher values times `early` below t = 500 and times `front` in Layers 1 and 2; blocks differ
    by log-normal noise.
    """
    g, rows = np.random.default_rng(0), []
    for t in BINS:
        for block in range(BLOCKS):
            wobble = np.exp(noise * g.standard_normal() - noise**2 / 2)
            for name in WEIGHTS.index:
                fisher = (
                    wobble * (early if t < 500 else 1) * (front if name[:6] in claims.FRONT else 1)
                )
                rows.append({"parameter": name, "t_low": t, "block": block, "fisher": fisher})
    return pd.DataFrame(rows)


def fisher_claims(*made):
    return {c.claim: c for c in claims.fisher_claims(blocks(*made), WEIGHTS, "made up", seed=0)}


@pytest.mark.parametrize(
    ("early", "noise", "expected"),
    [
        (3, 0.3, "supported"),
        (0.3, 0.3, "contradicted"),
        (1, 0.5, "inconclusive"),
    ],
)
def test_c1(early, noise, expected):
    claim = fisher_claims(early, 1, noise)["C1"]
    assert claim.verdict == expected
    assert claim.low < claim.measured < claim.high


def test_c1_and_c2_are_exact_without_noise():
    found = fisher_claims(5, 7)
    assert found["C1"].measured == pytest.approx(5)
    assert found["C2"].measured == pytest.approx(7)
    assert found["C2 share"].measured == pytest.approx(7 * 2 / (7 * 2 + 4))
    assert found["C2 share"].front_weights == pytest.approx(1 / 3)
    assert [found[c].verdict for c in ("C2", "C2 share")] == ["supported"] * 2
    assert [fisher_claims(1, 1.5)[c].verdict for c in ("C2", "C2 share")] == [
        "supported",
        "contradicted",
    ]


def test_blocks_are_resampled_for_all_tensors_at_once():
    """Noise that all tensors of a block share cancels in C2, and not in C1."""
    found = fisher_claims(2, 3, 0.5)
    assert found["C2"].high - found["C2"].low < 1e-9
    assert found["C1"].high / found["C1"].low > 1.2


def digits(noise, seed, count=60):
    """Real digits, worse the more noise is added."""
    clean = mnist(train=False)[0][HELD_OUT][:count, 0].float()
    added = noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return (clean + added).clamp(0, 255).to(torch.uint8).numpy()


def ratio_rows(inside, outside, formats=("fp16",)):
    rows, images = [], {}
    for low in formats:
        for i, r in enumerate(poster.RATIOS):
            best = poster.BEST_RATIOS[0] <= r <= poster.BEST_RATIOS[1]
            images[f"{low}{i}"] = digits(inside if best else outside, seed=i)
            key = dict(zip(KEY, ("ratio", f"{r:.2f}", low, "weight", "nearest"), strict=True))
            rows.append(key | {"sample": f"{low}{i}"})
    return pd.DataFrame(rows), images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [(5, 60, "supported"), (60, 5, "contradicted"), (20, 20, "inconclusive")],
)
def test_c3_on_images(inside, outside, expected):
    table, images = ratio_rows(inside, outside)
    [claim] = claims.best_ratio(table, claims.judge(images, 0, None))
    assert claim.verdict == expected
    assert claim.low < claim.measured < claim.high
    assert (claim.format, claim.features, claim.n_images) == ("fp16", "MNIST", 60)
    assert claim.chance == 3 / 8
    assert claim.best_share == 1 or expected != "supported"


def made_up(values, spread, margin=0.0, seed=0):
    """A judge whose rows have these FIDs and independent normal draws around them."""
    draws = np.random.default_rng(seed).standard_normal((len(values), 1000)) * spread
    by_sample = {
        k: Scored({"fid": v}, {"fid": v + torch.from_numpy(d)})
        for (k, v), d in zip(values.items(), draws, strict=True)
    }
    return Judge(by_sample.__getitem__, "fid", "made up", 100, margin)


@pytest.mark.parametrize(
    ("gain", "spread", "margin", "expected"),
    [
        (0.0, 0.1, 1.0, "effect under 1 FID"),
        (0.5, 0.1, 1.0, "effect under 1 FID"),
        (3.0, 0.1, 1.0, "supported"),
        (-3.0, 0.1, 1.0, "contradicted"),
        (0.0, 5.0, 1.0, "inconclusive"),
        (0.5, 0.1, 0.0, "supported"),
    ],
)
def test_c3_by_the_margin(gain, spread, margin, expected):
    table, _ = ratio_rows(0, 0)
    inside = table["setting"].astype(float).between(*poster.BEST_RATIOS)
    fids = dict(zip(table["sample"], 60 - gain * inside, strict=True))
    [claim] = claims.best_ratio(table, made_up(fids, spread, margin))
    assert claim.verdict == expected
    assert claim.measured == pytest.approx(-gain)


def test_c3_is_corrected_for_the_number_of_formats():
    """Two formats: the one with p between 0.025 and 0.05 alone would be supported, and is not
    beside another test.
    """
    table, _ = ratio_rows(0, 0, ("fp16", "int8"))
    inside = table["setting"].astype(float).between(*poster.BEST_RATIOS)
    gain = inside * np.where(table["format"] == "fp16", 0.0, 1.55)
    by = made_up(dict(zip(table["sample"], 60 - gain, strict=True)), 1.0)
    [alone] = claims.best_ratio(table[table["format"] == "int8"], by)
    both = claims.best_ratio(table, by)[1]
    assert 0.025 < alone.p < 0.05
    assert (alone.verdict, both.verdict) == ("supported", "inconclusive")
    assert both.p == 2 * alone.p
    assert (alone.low, alone.high) == (both.low, both.high)


def test_c3_needs_ratios_on_both_sides():
    table, _ = ratio_rows(0, 0)
    table = table[table["setting"].isin(["0.35", "0.38"])]
    assert claims.best_ratio(table, made_up(dict.fromkeys(table["sample"], 60.0), 1.0)) == []


@pytest.mark.parametrize(
    ("change", "spread", "expected"),
    [
        (-3, 0.2, "supported"),
        (3, 0.2, "contradicted"),
        (0, 0.2, "effect under 1 FID"),
        (0, 3, "inconclusive"),
    ],
)
def test_c4_compares_rows_of_equal_bytes(change, spread, expected):
    columns = [*KEY[:4], "mem_mib", "sample"]
    rows = [
        ("uniform", "all", "fp16", "tensor", 4.0, "u"),
        ("group", "a", "int8", "weight", 4.1, "g"),
        ("ratio", "0.9", "int8", "weight", 9.0, "x"),
    ]
    by = made_up({"u": 60.0, "g": 60.0 + change, "x": 0.0}, spread, margin=1.0)
    claim = claims.layerwise_images(pd.DataFrame(rows, columns=columns), by)
    assert claim.verdict == expected
    assert (claim.rule, claim.setting, claim.mem_mib, claim.fp16_mib) == ("group", "a", 4.1, 4.0)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(2, 9, "contradicted"), (0.2, 0.9, "supported"), (0.5, 2, "inconclusive")],
)
def test_claims_about_rules_follow_from_their_intervals(low, high, said):
    key = {"granularity": "weight", "rounding": "feedback", "budget_bits": 4.0}
    rows = [key | {"rule": rule} for rule in claims.LAYERWISE]
    found = claims.damage_claims(
        pd.DataFrame(rows).assign(
            over_global=(low + high) / 2, over_global_low=low, over_global_high=high
        ),
        "feedback",
    )
    assert [claim.verdict for claim in found] == [said] * 3
