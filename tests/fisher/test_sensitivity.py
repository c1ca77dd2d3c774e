import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from lafq.fisher.empirical import empirical_fisher
from lafq.fisher.sensitivity import monte_carlo_fisher
from lafq.rng import generator
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.unet import quantizable


@pytest.fixture
def network():
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double().eval()
    )


@pytest.fixture
def inputs():
    return torch.randn(6, 1, 4, 4, dtype=torch.float64, generator=generator(7))


def exact_true(model, names, inputs):
    """diag(J^T J), mean over the samples, from the whole Jacobian of every sample."""
    parameters = dict(model.named_parameters())
    total = {n: 0.0 for n in names}
    for x in inputs:
        jacobian = jacrev(lambda p, x=x: functional_call(model, p, (x[None],))[0])(parameters)
        for n in names:
            total[n] = total[n] + jacobian[n].square().sum(0) / len(inputs)
    return total


def exact_empirical(model, names, inputs, target):
    total = {n: 0.0 for n in names}
    for x, y in zip(inputs, target, strict=True):
        loss = 0.5 * (model(x[None])[0] - y).square().sum()
        for n, g in zip(
            names, torch.autograd.grad(loss, [model.get_parameter(n) for n in names]), strict=True
        ):
            total[n] = total[n] + g.square() / len(inputs)
    return total


def test_true_fisher_is_unbiased(network, inputs):
    """The mean over 4,000 passes is within five standard errors of diag(J^T J) for every weight, in
    float64.
    """
    names = ["0.weight", "3.weight"]
    passes = 4000
    found = monte_carlo_fisher(network, names, itertools.repeat((inputs,), passes), seed=0)
    exact = exact_true(network, names, inputs)
    for n in names:
        # Of one pass, g is Gaussian: the variance of g^2 is twice its squared mean.
        error = exact[n] * (2 / passes) ** 0.5
        assert ((found[n] - exact[n]).abs() < 5 * error).all()
        assert (found[n] / exact[n]).mean().item() == pytest.approx(1, abs=0.02)


def test_square_of_the_plain_batch_gradient_is_another_quantity(network, inputs):
    name = "3.bias"
    target = torch.full((6, 3), 10.0, dtype=torch.float64)
    loss = 0.5 * (network(inputs) - target).square().sum()
    plain = torch.autograd.grad(loss, network.get_parameter(name))[0].square() / 6
    exact = exact_empirical(network, [name], inputs, target)[name]
    assert plain.sum() > 2 * exact.sum()


def test_unet_agrees_with_the_empirical_fisher_where_the_model_is_right(tiny, digits):
    """A target drawn from the model's own Gaussian makes the empirical Fisher an estimate of the
    true one.
    """
    names = list(quantizable(tiny))
    batches = list(noised_batches(digits, 64, seed=0, batch=4))
    true = monte_carlo_fisher(tiny, names, batches, seed=0)
    g = generator(5)
    pairs = [((x, t), tiny(x, t).detach() + torch.randn(x.shape, generator=g)) for x, t in batches]
    drawn = empirical_fisher(tiny, names, pairs).by_weight
    for n in names:
        assert drawn[n].shape == true[n].shape
    sums = [sum(f.sum().item() for f in found.values()) for found in (true, drawn)]
    assert sums[0] == pytest.approx(sums[1], rel=0.2)


def test_repeats_and_leaves_the_model_as_it_was(tiny, digits):
    names = ["inp.weight"]
    before = {n: (p.clone(), p.requires_grad) for n, p in tiny.named_parameters()}
    once, again = (
        monte_carlo_fisher(tiny, names, noised_batches(digits, 8, 0), 0) for _ in range(2)
    )
    assert torch.equal(once["inp.weight"], again["inp.weight"])
    for n, p in tiny.named_parameters():
        assert torch.equal(p, before[n][0])
        assert p.requires_grad == before[n][1]
        assert p.grad is None


def test_timesteps_are_spread_evenly(digits):
    times = torch.cat([t for _, t in noised_batches(digits, 100, 0)])
    assert times.sort().values.tolist() == list(range(0, 1000, 10))


def test_bad_input(tiny, digits):
    with pytest.raises(ValueError, match="no parameter 'Layer9'"):
        monte_carlo_fisher(tiny, ["Layer9"], noised_batches(digits, 8, 0), 0)
    with pytest.raises(ValueError, match="no batch was given"):
        monte_carlo_fisher(tiny, ["inp.weight"], [], 0)
    with torch.no_grad():
        tiny.inp.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        monte_carlo_fisher(tiny, ["inp.weight"], noised_batches(digits, 8, 0), 0)
    assert all(p.requires_grad for p in tiny.parameters())
