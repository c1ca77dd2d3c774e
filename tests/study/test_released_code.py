import math

import pandas as pd
import pytest
import torch

from lafq.study import published_images, released_code
from lafq.study.diffusion.ddpm import ALPHA_BAR, unit_interval
from lafq.study.diffusion.mnist import HELD_OUT, mnist
from lafq.study.diffusion.unet import UNet, quantizable
from lafq.study.images.features import FeatureExtractor
from lafq.study.images.metrics import Reference
from lafq.study.rows import keep_ratio


@pytest.fixture
def values(tiny):
    g = torch.Generator().manual_seed(0)
    return {n: torch.rand(w.shape, generator=g) for n, w in quantizable(tiny).items()}


def test_reconstruction_fisher_is_one_squared_gradient(tiny, digits):
    found = released_code.reconstruction_fisher(tiny, digits[0])
    z = ALPHA_BAR[1].sqrt().float() * unit_interval(digits[:1])
    tiny.zero_grad()
    torch.nn.functional.mse_loss(tiny(z, torch.ones(1, dtype=torch.int64)), z).backward()
    assert set(found) == set(quantizable(tiny))
    for name, f in found.items():
        torch.testing.assert_close(f, tiny.get_parameter(name).grad.square(), rtol=1e-3, atol=1e-12)


@pytest.mark.slow
def test_variants_are_of_one_shape_and_leave_the_model_alone(tiny, values, digits):
    before = {n: p.clone() for n, p in tiny.named_parameters()}
    found = released_code.variants(tiny, values, digits, samples=20, seed=0)
    assert len(found) == 6
    for other in found.values():
        assert {n: f.shape for n, f in other.items()} == {n: f.shape for n, f in values.items()}
    assert all(torch.equal(p, before[n]) for n, p in tiny.named_parameters())
    table = released_code.fisher_choices(tiny, found, 0.35, seed=0)
    ours = table.iloc[0]
    assert (ours["rank_correlation"], ours["kept_in_common"]) == (pytest.approx(1), 1)
    assert table["kept_in_common"].iloc[1:].max() < 1


def test_rank_correlation_and_kept_weights(values):
    assert all(
        r == pytest.approx(1)
        for r in released_code.rank_correlation(
            values, {n: f**3 for n, f in values.items()}
        ).values()
    )
    opposite = {n: -f for n, f in values.items()}
    assert all(
        r == pytest.approx(-1) for r in released_code.rank_correlation(values, opposite).values()
    )
    assert released_code.kept_in_common(values, opposite, 0.35) == 0
    g = torch.Generator().manual_seed(1)
    unrelated = {n: torch.rand(f.shape, generator=g) for n, f in values.items()}
    assert released_code.kept_in_common(values, unrelated, 0.35) == pytest.approx(0.35, abs=0.01)


def test_choices_keep_the_ratio(values):
    [row] = released_code.choice_rows({"x": values}, 0.35)
    assert row[:5] == ("ratio", "0.35", "int8", "weight", "nearest")
    assert all(torch.equal(row.plan[n].keep_mask, m) for n, m in keep_ratio(values, 0.35).items())


def test_released_groups(tiny, values):
    table = released_code.released_groups(tiny, values).set_index("group")
    weights = [w for n, w in quantizable(tiny).items() if n.startswith("Layer6")]
    assert table.loc["Layer6", "tau"] == pytest.approx(
        torch.cat([w.flatten() for w in weights]).square().mean().item()
    )
    assert table["tensors"].sum() == 34
    assert table["highest_score"].max() == 1
    # Values near 1/2 over the largest mean: all tensors score above the mean of the squared
    # weights.
    assert (table["tensors_kept"] == table["tensors"]).all()


def test_clamped_weights_lie_within_the_limits(tiny, values):
    small = {n: f * 1e-3 for n, f in values.items()}
    result, table = released_code.clamped(tiny, small, k=1)
    limits = table.set_index("layer")
    for name, w in quantizable(result).items():
        row = limits.loc[name.split(".")[0]]
        assert row["low"] - 1e-9 <= w.min()
        assert w.max() <= row["high"] + 1e-9
    assert (table["weights_changed"] > 0.9).all()
    assert not torch.equal(result.Layer1.resample.weight, tiny.Layer1.resample.weight)


def test_stretched_images_fill_the_range():
    images = torch.tensor([[10, 20], [0, 255]], dtype=torch.uint8).view(2, 1, 1, 2)
    assert released_code.stretched(images).flatten(1).tolist() == [[0, 255], [0, 255]]
    flat = torch.full((1, 1, 2, 2), 7, dtype=torch.uint8)
    assert released_code.stretched(flat).unique().tolist() == [0]


def test_protocol_choices():
    class Pixels(torch.nn.Module):
        def forward(self, x):
            return x[:, 0, 8:24:4, 8:24:4].flatten(1), None

    real, other, worse = (mnist(train=False)[0][HELD_OUT][i : i + 40] for i in (0, 40, 80))
    worse = worse // 2
    eye = FeatureExtractor("pixels", Pixels(), unit_interval, 100, reference_images=500)
    sizes = {"pixels": (eye.reference, Reference(2 * eye.reference.features))}
    table = released_code.protocol_choices({"pixels": eye}, sizes, real, worse, other, seed=0)
    table = table.set_index("choice")
    assert len(table) == 4
    untouched = table[table.index.str.contains("R1")].iloc[0]
    assert untouched["released"] == 0
    assert untouched["change"] == pytest.approx(-untouched["here"])
    assert untouched["change_low"] <= untouched["change"] <= untouched["change_high"]
    unpaired = table[table.index.str.contains("R7")].iloc[0]
    assert unpaired["here"] == untouched["here"]
    assert math.isnan(unpaired["change_low"])
    stretched = table[table.index.str.contains("stretched")].iloc[0]
    assert stretched["change"] == pytest.approx(0, abs=0.5)
    assert table[table.index.str.contains("R6")].iloc[0]["change"] != 0


@pytest.mark.slow
def test_floor_goes_down_with_n_and_its_extrapolation_near_nothing():
    g = torch.Generator().manual_seed(0)
    other = torch.randn(5000, 16, generator=g)
    table = published_images.floor(
        torch.randn(5000, 16, generator=g),
        Reference(other),
        seed=0,
    )
    fid = table[table["metric"] == "fid"].set_index("n")
    assert fid["mean"].is_monotonic_decreasing
    assert abs(fid.loc[math.inf, "mean"]) < 0.1 * fid.loc[100, "mean"]
    assert fid["blocks"].tolist() == [20, 20, 20, 10, 5, 2, 1, 1]
    kid = table[table["metric"] == "kid"].set_index("n")
    assert (kid["mean"].abs() < 4 * kid.loc[50, "sd"]).all()


def test_fresh_network_is_untrained_and_seeded(tiny):
    a, b = released_code.fresh_network(tiny, 1), released_code.fresh_network(tiny, 1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert isinstance(a, UNet)
    assert not pd.Series(
        [torch.equal(p, q) for p, q in zip(a.parameters(), tiny.parameters(), strict=True)]
    ).all()
