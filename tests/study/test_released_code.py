import math

import pytest
import torch

from lafq.study import released_code
from lafq.study.diffusion.ddpm import ALPHA_BAR, unit_interval
from lafq.study.diffusion.mnist import HELD_OUT, mnist
from lafq.study.diffusion.unet import quantizable
from lafq.study.images.features import FeatureExtractor
from lafq.study.images.metrics import Reference


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
    choices = released_code.variants(tiny, values, digits, samples=20, seed=0)
    assert len(choices) == 6
    for other in choices.values():
        assert {n: f.shape for n, f in other.items()} == {n: f.shape for n, f in values.items()}
    assert all(torch.equal(p, before[n]) for n, p in tiny.named_parameters())
    table = released_code.fisher_choices(tiny, choices, 0.35, seed=0)
    ours = table.iloc[0]
    assert (ours["rank_correlation"], ours["kept_in_common"]) == (pytest.approx(1), 1)
    assert table["kept_in_common"].iloc[1:].max() < 1


def test_rank_correlation_and_kept_weights(values):
    g = torch.Generator().manual_seed(1)
    others = {
        "cubed": {n: f**3 for n, f in values.items()},
        "opposite": {n: -f for n, f in values.items()},
        "unrelated": {n: torch.rand(f.shape, generator=g) for n, f in values.items()},
        "in another order": {n: values[n] for n in reversed(values)},
        "equal": {n: torch.ones(f.shape) for n, f in values.items()},
    }
    table = released_code.rank_table({released_code.OURS: values} | others).set_index("choice")
    assert table.loc["cubed"].tolist() == pytest.approx([1] * 6)
    assert table.loc["in another order"].tolist() == pytest.approx([1] * 6)
    assert table.loc["opposite"].tolist() == pytest.approx([-1] * 6)
    assert table.loc["equal"].isna().all()
    common = [released_code.kept_in_common(values, v, 0.35) for v in others.values()]
    assert common[:3] == pytest.approx([1, 0, 0.35], abs=0.01)


def test_released_groups(tiny, values):
    table = released_code.released_groups(tiny, values).set_index("group")
    weights = [w for n, w in quantizable(tiny).items() if n.startswith("Layer6")]
    squares = torch.cat([w.flatten() for w in weights]).square()
    assert table.loc["Layer6", "tau"] == pytest.approx(squares.mean().item())
    assert table["tensors"].sum() == 34
    assert table["highest_score"].max() == 1
    # Values near 1/2 over the largest mean: all tensors score above the mean squared weight.
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
    eye = FeatureExtractor("pixels", Pixels(), unit_interval, 100, reference_images=500)
    sizes = eye.reference, Reference(2 * eye.reference.features)
    table = released_code.protocol_choices(eye, real, worse // 2, other, 0, sizes)
    rows = {r: table[table["choice"].str.contains(r)].iloc[0] for r in ("R1", "R6", "R7", "stret")}
    assert len(table) == 4
    assert rows["R1"]["released"] == 0
    assert rows["R1"]["change"] == pytest.approx(-rows["R1"]["here"])
    assert rows["R1"]["change_low"] <= rows["R1"]["change"] <= rows["R1"]["change_high"]
    assert rows["R7"]["here"] == rows["R1"]["here"]
    assert math.isnan(rows["R7"]["change_low"])
    assert rows["stret"]["change"] == pytest.approx(0, abs=0.5)
    assert rows["R6"]["change"] != 0


def test_fresh_network_is_untrained_and_seeded(tiny):
    a, b = (list(released_code.fresh_network(tiny, 1).parameters()) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(a, tiny.parameters(), strict=True))
