import numpy as np
import pandas as pd
import pytest
import torch

from lafq.study import claims, poster
from lafq.study.claims import Judge, holm, verdict
from lafq.study.diffusion.mnist import HELD_OUT, mnist
from lafq.study.diffusion.unet import LAYERS
from lafq.study.rows import KEY

WEIGHTS = pd.Series({f"{layer}.{i}": 10 + i for layer in LAYERS for i in range(3)})


@pytest.mark.parametrize(
    ("low", "high", "settings", "expected"),
    [
        (0.2, 0.5, {"above": True}, "supported"),
        (-0.5, -0.2, {"above": True}, "contradicted"),
        (-0.1, 0.2, {"above": True}, "inconclusive"),
        (1.2, 3.0, {"above": True, "null": 1.0}, "supported"),
        (0.9, 3.0, {"above": True, "null": 1.0}, "inconclusive"),
        (-0.9, 0.9, {"above": False, "margin": 1.0}, "not seen: below 1 FID"),
        (0.2, 0.9, {"above": False, "margin": 1.0}, "not seen: below 1 FID"),
        (-1.0, 0.9, {"above": False, "margin": 1.0}, "inconclusive"),
        (-3.0, -0.5, {"above": False, "margin": 1.0}, "supported"),
        (0.5, 3.0, {"above": False, "margin": 1.0}, "contradicted"),
        (0.2, 0.5, {"above": True, "p": 0.06}, "inconclusive"),
        (-0.9, 0.9, {"above": False, "margin": 1.0, "p": 0.9}, "not seen: below 1 FID"),
        (-0.2, -0.05, {"above": False, "margin": 2.2946}, "not seen: below 2.3 FID"),
        (-0.2, -0.05, {"above": False, "margin": float("nan")}, "supported"),
    ],
)
def test_verdict(low, high, settings, expected):
    assert verdict(low, high, **settings) == expected


def test_the_margin_is_a_third_of_the_posters_gain():
    fid = {row.threshold: row.fid for row in poster.POSTER}
    assert pytest.approx((fid["none"] - fid["0.35"]) / 3, abs=0.05) == claims.FID_MARGIN


def test_on_mnist_features_the_margin_is_a_share_of_fp32s_fid():
    digits = mnist(train=False)[0][HELD_OUT][:60, 0].numpy()
    table = pd.DataFrame({"rule": ["ratio", "baseline"], "sample": ["r", "b"]})
    by = claims.judge(table, {"r": digits, "b": digits // 2}, 0)
    assert by.margin == pytest.approx(0.03 * by.fid("b")[0])
    assert np.isnan(claims.judge(table[:1], {"r": digits}, 0).margin)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def fisher_claims(early, front, noise=0.0):
    """Claims on Fisher values times `early` below t = 500 and times `front` in Layers 1 and 2;
    blocks differ by log-normal noise.
    """
    g, rows = np.random.default_rng(0), []
    for t in range(0, 1000, 100):
        for block in range(10):
            wobble = np.exp(noise * g.standard_normal() - noise**2 / 2)
            for name in WEIGHTS.index:
                fisher = (early if t < 500 else 1) * (front if name[:6] in claims.FRONT else 1)
                rows.append((name, t, block, wobble * fisher))
    blocks = pd.DataFrame(rows, columns=["parameter", "t_low", "block", "fisher"])
    return {c["claim"]: c for c in claims.fisher_claims(blocks, WEIGHTS, "made up", seed=0)}


@pytest.mark.parametrize(
    ("early", "noise", "expected"),
    [(3, 0.3, "supported"), (0.3, 0.3, "contradicted"), (1, 0.5, "inconclusive")],
)
def test_c1(early, noise, expected):
    claim = fisher_claims(early, 1, noise)["C1"]
    assert claim["verdict"] == expected
    assert claim["low"] < claim["measured"] < claim["high"]


def test_c1_and_c2_are_exact_without_noise():
    of = fisher_claims(5, 7)
    assert of["C1"]["measured"] == pytest.approx(5)
    assert of["C2"]["measured"] == pytest.approx(7)
    assert of["C2 share"]["measured"] == pytest.approx(7 * 2 / (7 * 2 + 4))
    assert of["C2 share"]["front_weights"] == pytest.approx(1 / 3)
    assert [of[c]["verdict"] for c in ("C2", "C2 share")] == ["supported"] * 2
    of = fisher_claims(1, 1.5)
    assert [of[c]["verdict"] for c in ("C2", "C2 share")] == ["supported", "contradicted"]


def test_blocks_are_resampled_for_all_tensors_at_once():
    """Noise that all tensors of a block share cancels in C2, and not in C1."""
    of = fisher_claims(2, 3, 0.5)
    assert of["C2"]["high"] - of["C2"]["low"] < 1e-9
    assert of["C1"]["high"] / of["C1"]["low"] > 1.2


def ratio_rows(formats=("fp16",)):
    """Rows of the poster's ratios, and which of them the poster calls the best."""
    rows = [(f"{r:.2f}", low) for low in formats for r in poster.RATIOS]
    table = pd.DataFrame(rows, columns=["setting", "format"]).assign(rule="ratio")
    table = table.assign(granularity="weight", rounding="nearest")
    inside = table["setting"].astype(float).between(*poster.BEST_RATIOS)
    return table.assign(sample=table["format"] + table["setting"]), inside


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inside", "outside", "expected"), [(5, 60, "supported"), (20, 20, "inconclusive")]
)
def test_c3_on_images(inside, outside, expected):
    """Real digits, worse the more noise is added."""
    table, best = ratio_rows()
    clean, images = mnist(train=False)[0][HELD_OUT][:60, 0].float(), {}
    for i, (sample, is_best) in enumerate(zip(table["sample"], best, strict=True)):
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(i))
        noisy = clean + (inside if is_best else outside) * noise
        images[sample] = noisy.clamp(0, 255).to(torch.uint8).numpy()
    [claim] = claims.best_ratio(table, claims.judge(table, images, 0))
    assert claim["verdict"] == expected
    assert claim["low"] < claim["measured"] < claim["high"]
    assert (claim["format"], claim["features"], claim["n_images"]) == ("fp16", "MNIST", 60)
    assert claim["chance"] == 3 / 8
    assert claim["best_share"] == 1 or expected != "supported"


def made_up(values, spread, margin=0.0):
    """A judge whose rows have these FIDs and independent normal draws around them."""
    draws = np.random.default_rng(0).standard_normal((len(values), 1000)) * spread
    fids = zip(values.items(), draws, strict=True)
    by_sample = {sample: (v, v + torch.from_numpy(d)) for (sample, v), d in fids}
    return Judge(by_sample.__getitem__, "made up", 100, margin)


@pytest.mark.parametrize(
    ("gain", "spread", "margin", "expected"),
    [
        (0.0, 0.1, 1.0, "not seen: below 1 FID"),
        (3.0, 0.1, 1.0, "supported"),
        (-3.0, 0.1, 1.0, "contradicted"),
        (0.0, 5.0, 1.0, "inconclusive"),
        (0.5, 0.1, 0.0, "supported"),
    ],
)
def test_c3_by_the_margin(gain, spread, margin, expected):
    table, inside = ratio_rows()
    fids = dict(zip(table["sample"], 60 - gain * inside, strict=True))
    [claim] = claims.best_ratio(table, made_up(fids, spread, margin))
    assert claim["verdict"] == expected
    assert claim["measured"] == pytest.approx(-gain)


def test_c3_is_corrected_for_the_number_of_formats():
    """Two formats: the one with p between 0.025 and 0.05 alone would be supported, and is not
    beside another test.
    """
    table, inside = ratio_rows(("fp16", "int8"))
    gain = inside * np.where(table["format"] == "fp16", 0.0, 1.55)
    by = made_up(dict(zip(table["sample"], 60 - gain, strict=True)), 1.0)
    [alone] = claims.best_ratio(table[table["format"] == "int8"], by)
    both = claims.best_ratio(table, by)[1]
    assert 0.025 < alone["p"] < 0.05
    assert (alone["verdict"], both["verdict"]) == ("supported", "inconclusive")
    assert both["p"] == 2 * alone["p"]
    assert (alone["low"], alone["high"]) == (both["low"], both["high"])


def test_c3_needs_ratios_on_both_sides():
    table, inside = ratio_rows()
    assert claims.best_ratio(table[inside], made_up(dict.fromkeys(table["sample"], 60.0), 1)) == []


@pytest.mark.parametrize(
    ("change", "spread", "expected"),
    [(-3, 0.2, "supported"), (3, 0.2, "contradicted"), (0, 0.2, "not seen: below 1 FID")],
)
def test_c4_compares_rows_of_equal_bytes(change, spread, expected):
    rows = [("uniform", "all", "fp16", "tensor", 4.0, "u")]
    rows += [("group", "a", "int8", "weight", 4.1, "g"), ("ratio", "1", "int8", "weight", 9.0, "x")]
    by = made_up({"u": 60.0, "g": 60.0 + change, "x": 0.0}, spread, margin=1.0)
    table = pd.DataFrame(rows, columns=[*KEY[:4], "mem_mib", "sample"])
    claim = claims.layerwise_images(table, by)
    assert claim["verdict"] == expected
    compared = [claim[field] for field in ("rule", "setting", "mem_mib", "fp16_mib")]
    assert compared == ["group", "a", 4.1, 4.0]


@pytest.mark.parametrize(
    ("mib", "low", "expected"),
    [(4.0, -0.9, ["contradicted"]), (1.5, -0.9, ["supported"]), (4.0, -1.1, [])],
)
def test_c4_compares_bytes_where_uniform_int8_keeps_fid(mib, low, expected):
    rows = [("uniform", "int8", 2.0, low), ("ratio", "int8", mib, -0.1)]
    rows += [("group", "int8", 1.0, -3.0), ("ratio", "fp16", 0.5, -0.1)]
    table = pd.DataFrame(rows, columns=["rule", "format", "mem_mib", "delta_fid_inception_low"])
    table = table.assign(setting="", granularity="", delta_fid_inception_high=0.1)
    found = claims.layerwise_bytes(table, Judge(None, "Inception", 100, 1.0))
    assert [claim["verdict"] for claim in found] == expected
