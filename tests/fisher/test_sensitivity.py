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


def test_through_a_sampler_is_unbiased():
    """Of a loop over the network, each call computed again in the backward pass, the mean over
    4,000 passes is diag(J^T J) of what the loop returns; names are the network's own.
    """
    torch.manual_seed(0)
    network, names, passes = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double(), ["0.weight"], 4000

    def loop(net, noise):
        x = noise[:, 0]
        for z in noise[:, 1:].unbind(1):
            x = net(x) + 0.1 * z
        return x

    class Whole(nn.Sequential):
        def forward(self, noise):
            return loop(super().forward, noise)

    noise = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator(7))
    batches = itertools.repeat((noise,), passes)
    fisher = estimate_sensitivity(network, batches, 0, names, curvature=False, through=loop).fisher
    exact = exact_true(Whole(*network), names, noise)["0.weight"]
    assert ((fisher["0.weight"] - exact).abs() < 5 * exact * (2 / passes) ** 0.5).all()


@pytest.mark.parametrize(
    ("through", "message"),
    [
        (lambda net, x: net(x) + torch.randn(2, 3), "random numbers of its own"),
        (lambda net, x: net(x).detach(), "does not depend on the named weights"),
        (lambda net, x: net(x)[:1], "first axis must be the batch"),
    ],
)
def test_what_is_no_sampler_is_refused(through, message):
    with pytest.raises(ValueError, match=message):
        estimate_sensitivity(nn.Linear(3, 3), [torch.ones(2, 3)], through=through)


def test_a_pass_that_does_not_fit_says_so():
    def through(net, x):
        return net(x.expand(2**55, 2, 3).contiguous()[0])

    with pytest.raises(MemoryError, match="does not fit into memory: give smaller batches"):
        estimate_sensitivity(nn.Linear(3, 3), [torch.ones(2, 3)], through=through)


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
