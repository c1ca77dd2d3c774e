import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from lafq.fisher.empirical import empirical_fisher
from lafq.fisher.sensitivity import estimate_sensitivity
from lafq.rng import generator
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.unet import quantizable


def true_fisher(model, names, batches):
    return estimate_sensitivity(model, batches, 0, names, curvature=False).fisher


def exact_true(model, names, inputs):
    """diag(J^T J), mean over the samples, from the whole Jacobian of every sample."""
    parameters = dict(model.named_parameters())
    total = dict.fromkeys(names, 0.0)
    for x in inputs:
        jacobian = jacrev(lambda p, x=x: functional_call(model, p, (x[None],))[0])(parameters)
        total = {n: f + jacobian[n].square().sum(0) / len(inputs) for n, f in total.items()}
    return total


def test_true_fisher_is_unbiased():
    """The mean over 4,000 passes is within five standard errors of diag(J^T J) for every weight, in
    float64.
    """
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    network, names, passes = nn.Sequential(*layers).double(), ["0.weight", "3.weight"], 4000
    inputs = torch.randn(6, 1, 4, 4, dtype=torch.float64, generator=generator(7))
    fisher = true_fisher(network, names, itertools.repeat((inputs,), passes))
    for n, exact in exact_true(network, names, inputs).items():
        # Of one pass, g is Gaussian: the variance of g^2 is twice its squared mean.
        error = exact * (2 / passes) ** 0.5
        assert ((fisher[n] - exact).abs() < 5 * error).all()
        assert (fisher[n] / exact).mean().item() == pytest.approx(1, abs=0.02)


def test_unet_agrees_with_the_empirical_fisher_where_the_model_is_right(tiny, digits):
    """A target drawn from the model's own Gaussian makes the empirical Fisher an estimate of the
    true one.
    """
    names, g = list(quantizable(tiny)), generator(5)
    batches = list(noised_batches(digits, 64, seed=0, batch=4))
    true = true_fisher(tiny, names, batches)
    pairs = [((x, t), tiny(x, t).detach() + torch.randn(x.shape, generator=g)) for x, t in batches]
    drawn = empirical_fisher(tiny, names, pairs).by_weight
    assert {n: f.shape for n, f in drawn.items()} == {n: f.shape for n, f in true.items()}
    sums = [sum(f.sum().item() for f in fisher.values()) for fisher in (true, drawn)]
    assert sums[0] == pytest.approx(sums[1], rel=0.2)


def test_repeats_and_leaves_the_model_as_it_was(tiny, digits):
    before = {n: (p.clone(), p.requires_grad) for n, p in tiny.named_parameters()}
    once, again = (
        true_fisher(tiny, ["inp.weight"], noised_batches(digits, 8, 0)) for _ in range(2)
    )
    assert torch.equal(once["inp.weight"], again["inp.weight"])
    for n, p in tiny.named_parameters():
        assert torch.equal(p, before[n][0])
        assert p.requires_grad == before[n][1]
        assert p.grad is None


def test_timesteps_are_spread_evenly(digits):
    times = torch.cat([t for _, t in noised_batches(digits, 100, 0)])
    assert times.sort().values.tolist() == list(range(0, 1000, 10))


@pytest.mark.parametrize(
    ("names", "message"),
    [(["Layer9"], "'Layer9'"), ([], "no parameter is named"), (["inp.weight"], "not finite")],
)
def test_bad_input(tiny, digits, names, message):
    with torch.no_grad():
        tiny.inp.weight[0] = float("nan")
    with pytest.raises(ValueError, match=message):
        estimate_sensitivity(tiny, noised_batches(digits, 8, 0), 0, names)
    assert all(p.requires_grad for p in tiny.parameters())
