import numpy as np
import pandas as pd
import pytest
import torch

from lafq.rng import generator
from lafq.study.diffusion import ddpm
from lafq.study.diffusion.ddpm import add_noise, unit_interval
from lafq.study.diffusion.unet import quantizable
from lafq.study.fisher_by_timestep import fisher_by_timestep, fisher_kinds


def test_float64_is_the_loop_over_single_samples(tiny, digits):
    model = tiny.double()
    names = list(quantizable(model))
    fisher = fisher_by_timestep(model, names, digits, samples=6, bins=2, seed=3)
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters() if n in names}
    by_bin = []
    batch_gradient = {n: torch.zeros_like(p) for n, p in total.items()}
    for b, (low, high) in enumerate([(0, 500), (500, 1000)]):
        g = generator(3, b)
        t = torch.randint(low, high, (3,), generator=g)
        x0 = unit_interval(digits[torch.randint(len(digits), (3,), generator=g)]).double()
        noise = torch.randn(x0.shape, generator=g).double()
        in_bin = dict.fromkeys(names, 0.0)
        for i in range(3):
            model.zero_grad()
            x = add_noise(x0[i : i + 1], t[i : i + 1], noise[i : i + 1])
            (0.5 * (noise[i : i + 1] - model(x, t[i : i + 1])).square().sum()).backward()
            for n, p in model.named_parameters():
                if n in names:
                    total[n] += p.grad**2 / 6
                    batch_gradient[n] += p.grad / 6
                    in_bin[n] += (p.grad**2).mean().item() / 3
        by_bin.append(in_bin)
    for n in names:
        torch.testing.assert_close(fisher.by_weight[n], total[n], rtol=1e-9, atol=1e-14)
        rows = fisher.timesteps[fisher.timesteps["parameter"] == n]
        assert rows["fisher"].tolist() == pytest.approx([by_bin[0][n], by_bin[1][n]], rel=1e-9)
    wrong = torch.cat([(batch_gradient[n] ** 2).flatten() for n in names]).sum()
    right = torch.cat([fisher.by_weight[n].flatten() for n in names]).sum()
    assert wrong < 0.9 * right


def test_bins_are_stratified_and_average_to_the_whole(tiny, digits):
    fisher = fisher_by_timestep(
        tiny, ["Layer1.block1.conv1.weight"], digits, samples=40, bins=20, seed=0
    )
    rows = fisher.timesteps
    assert len(rows) == 20
    assert rows["t_low"].tolist() == list(range(0, 1000, 50))
    assert rows["t_high"].iloc[-1] == 999
    assert rows["fisher"].mean() == pytest.approx(
        fisher.by_weight["Layer1.block1.conv1.weight"].mean().item(), rel=1e-4
    )


def test_repeats(tiny, digits):
    how, names = {"samples": 8, "bins": 2, "seed": 0}, list(quantizable(tiny))
    once, again = (fisher_by_timestep(tiny, names, digits, **how).by_weight for _ in range(2))
    assert all(torch.equal(once[n], again[n]) for n in once)


def test_model_is_left_as_it_was(tiny, digits):
    before = {n: p.clone() for n, p in tiny.named_parameters()}
    fisher_by_timestep(tiny, ["inp.weight"], digits, samples=2, bins=1, seed=0)
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in tiny.named_parameters())


@pytest.mark.parametrize(
    ("names", "samples", "bins", "message"),
    [
        (["Layer9.weight"], 4, 2, "no parameter 'Layer9.weight'"),
        ([], 4, 2, "no parameter is named"),
        (["inp.weight"], 1, 2, "give every bin one at least"),
        (["inp.weight"], 4, 0, "give every bin one at least"),
    ],
)
def test_bad_input(tiny, digits, names, samples, bins, message):
    with pytest.raises(ValueError, match=message):
        fisher_by_timestep(tiny, names, digits, samples=samples, bins=bins, seed=0)


def test_damaged_weights(tiny, digits):
    with torch.no_grad():
        tiny.inp.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        fisher_by_timestep(tiny, ["inp.weight"], digits, samples=1, bins=1, seed=0)


def test_blocks_average_to_the_bins(tiny, digits):
    names = ["Layer1.block1.conv1.weight", "Layer6.resample.weight"]
    found = fisher_by_timestep(tiny, names, digits, samples=50, bins=2, seed=0)
    counts = found.blocks.groupby(["parameter", "t_low"])["samples"].agg(["size", "sum"])
    assert (counts["size"] == 10).all()
    assert (counts["sum"] == 25).all()
    total = (
        found.blocks.assign(sum=found.blocks["fisher"] * found.blocks["samples"])
        .groupby(["parameter", "t_low"])["sum"]
        .sum()
    )
    expected = found.timesteps.set_index(["parameter", "t_low"])["fisher"]
    assert np.allclose(total / 25, expected.loc[total.index], rtol=1e-5)


def test_kinds_of_fisher_information(tiny, digits):
    names = list(quantizable(tiny))
    found = fisher_kinds(tiny, names, digits, samples=20, bins=4, seed=0, steps=8)
    assert found.groupby("kind", sort=False).size().to_dict() == {
        "Monte Carlo, noised digits": 4 * 5 * len(names),
        "Monte Carlo, states of the reverse process": 4 * 5 * len(names),
    }
    assert (found["fisher"] > 0).all()
    assert sorted(found["t_low"].unique()) == [0, 250, 500, 750]
    pd.testing.assert_frame_equal(
        found, fisher_kinds(tiny, names, digits, samples=20, bins=4, seed=0, steps=8)
    )


def test_the_last_state_of_the_reverse_process_is_the_image(tiny):
    states = dict(ddpm.reverse_process(tiny, ddpm.sampler_noise(range(3), 4, seed=0)))
    assert list(states) == [999, 749, 499, 249, -1]
    images = (states[-1].clamp(0, 1) * 255).round().to(torch.uint8)
    assert torch.equal(images, ddpm.sample(tiny, 3, 4, seed=0))
