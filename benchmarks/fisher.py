"""What the diagonal Fisher information costs, by method, over one ordinary batched forward and
backward pass; and what an allocation of the width-64 model costs after it. Part of `make
benchmark`.

cost_ratio: per pass, of PASSES passes where there is a curvature. relative_error: of one pass over
one batch, the mean over the weight tensors of |tensor's sum / exact sum - 1|. Exact is, for the
empirical Fisher, the loop over single samples; for the true Fisher, the mean over 64 other draws on
the same batch.
"""

import itertools
import statistics
import sys
import warnings
from collections.abc import Iterator

import torch
from shared import run, seconds, time_ratio, write
from torch import Tensor

from lafq.allocation import allocate as solver
from lafq.fisher.empirical import empirical_fisher
from lafq.fisher.sensitivity import Sensitivity, estimate_sensitivity
from lafq.quantization.checks import channel_view
from lafq.rng import generator
from lafq.study.diffusion.ddpm import add_noise, unit_interval
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.subject import load_model
from lafq.study.diffusion.unet import TIMESTEPS, UNet, quantizable
from lafq.study.workspace import Workspace

BATCH, ROUNDS = {16: 32, 64: 8}, {16: 7, 64: 3}
CHUNK = 8
DRAWS = 64
PASSES = 8  # of the curvature, whose last step comes once for all passes
Fisher = dict[str, Tensor]


class Subject:
    """A model and a batch: noised training digits (B, 1, 32, 32), their timesteps and the noise.
    Each method gives Fisher values by weight, but `ordinary`, which gives gradients.
    """

    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        trained = load_model(Workspace("mini"), width) if width == 16 else UNet(width).eval()
        self.model = trained.to(memory_format=torch.channels_last)
        self.names = list(quantizable(self.model))
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(name in self.names)
        x0 = unit_interval(mnist(train=True)[0][: BATCH[width]])
        self.t = torch.linspace(0, TIMESTEPS - 1, len(x0)).long()
        self.noise = torch.randn(x0.shape, generator=generator(0, 2))
        self.x = add_noise(x0, self.t, self.noise)

    def _gradients(self, outputs: Tensor, factors: Tensor | None = None) -> Fisher:
        weights = [self.model.get_parameter(name) for name in self.names]
        return dict(zip(self.names, torch.autograd.grad(outputs, weights, factors), strict=True))

    def ordinary(self, part: slice = slice(None)) -> Fisher:
        """Forward and backward pass of the loss of the whole batch."""
        output = self.model(self.x[part], self.t[part])
        return self._gradients(0.5 * (self.noise[part] - output).square().sum())

    def loop(self) -> Fisher:
        """Squared gradients of single samples, one backward pass each."""
        total = {n: torch.zeros_like(self.model.get_parameter(n)) for n in self.names}
        for i in range(len(self.x)):
            for name, gradient in self.ordinary(slice(i, i + 1)).items():
                total[name].addcmul_(gradient, gradient)
        return {name: squares / len(self.x) for name, squares in total.items()}

    def random_signs(self) -> Fisher:
        """One batched backward pass of the residuals under one random sign per sample: its squares
        are unbiased.
        """
        output = self.model(self.x, self.t)
        signs = torch.randint(2, (len(self.x), 1, 1, 1), generator=generator(0, 1)) * 2 - 1
        gradients = self._gradients(output, (output - self.noise).detach() * signs)
        return {name: g.square() / len(self.x) for name, g in gradients.items()}

    def vmapped(self) -> Fisher:
        """torch.func, samples in chunks."""
        batches = [((self.x, self.t), self.noise)]
        return empirical_fisher(self.model, self.names, batches, CHUNK).by_weight

    def monte_carlo(self, draws: int = 1, seed: int = 0) -> Fisher:
        """The true Fisher information, one batched backward pass a draw."""
        batches = itertools.repeat((self.x, self.t), draws)
        how = {"names": self.names, "curvature": False}
        return estimate_sensitivity(self.model, batches, seed, **how).fisher

    def with_curvature(self, passes: int = 1) -> Fisher:
        """The same with the curvature."""
        batches, shrink = [(self.x, self.t)] * passes, passes > 1
        return estimate_sensitivity(self.model, batches, 0, self.names, shrink=shrink).fisher


class BackPack(Subject):
    """BackPACK's SumGradSquared, on a model of its own, since it leaves hooks behind."""

    def __init__(self, width: int) -> None:
        from backpack import extend

        super().__init__(width)
        for name in self.names:
            extend(self.model.get_submodule(name.removesuffix(".weight")))

    def squares(self) -> Fisher:
        """Squared gradients of single samples, from one batched backward pass."""
        from backpack import backpack
        from backpack.extensions import SumGradSquared

        with backpack(SumGradSquared()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (0.5 * (self.noise - self.model(self.x, self.t)).square().sum()).backward()
        weights = {name: self.model.get_parameter(name) for name in self.names}
        return {name: w.sum_grad_squared / len(self.x) for name, w in weights.items()}


def error(estimate: Fisher, exact: Fisher) -> float:
    """As the module says."""
    ratios = [estimate[name].sum().item() / exact[name].sum().item() for name in exact]
    return statistics.mean(abs(ratio - 1) for ratio in ratios)


def rows(width: int) -> Iterator[dict]:
    """One row per method; times are medians of ratios to an ordinary pass run just before."""
    of = Subject(width)
    exact = {"empirical": of.loop(), "true": of.monte_carlo(DRAWS, seed=1)}
    methods = {
        "true, one batched backward pass (lafq)": of.monte_carlo,
        "true, the same with the curvature (lafq)": of.with_curvature,
        "empirical, random signs (lafq)": of.random_signs,
        f"empirical, vmap(grad) in chunks of {CHUNK}": of.vmapped,
        "empirical, loop over single samples": of.loop,
    }
    if width == 16:  # at width 64 it takes minutes a pass
        methods["empirical, BackPACK SumGradSquared"] = BackPack(width).squares
    for method, estimate in methods.items():
        if estimate == of.with_curvature:
            ratio = time_ratio(ROUNDS[width], lambda: of.with_curvature(PASSES), of.ordinary)
            ratio /= PASSES
        else:
            ratio = time_ratio(ROUNDS[width], estimate, of.ordinary)
        row = {"method": method, "width": width, "batch": BATCH[width], "cost_ratio": ratio}
        yield row | {"relative_error": error(estimate(), exact[method.partition(",")[0]])}


def allocating() -> Iterator[dict]:
    """Seconds to allocate the width-64 model: at every granularity by random Fisher values, then
    with curvature.
    """
    torch.manual_seed(0)
    model, mib = UNet(64).eval(), 17.0
    fisher = {n: torch.rand(w.shape) * torch.rand(()) for n, w in quantizable(model).items()}
    kinds = [*((granularity, False) for granularity in solver.ALLOCATED), ("mixed", True)]
    for granularity, feedback in kinds:
        sizes = {n: channel_view(model, n).size[1] for n in fisher} if feedback else {}
        known = Sensitivity(fisher, {n: correlated(size) for n, size in sizes.items()})
        how = {"memory_mib": mib, "granularity": granularity, "progress": False}
        took = seconds(lambda known=known, how=how: solver.allocate(model, known, **how))
        row = {"width": 64, "granularity": granularity, "curvature": feedback, "budget_mib": mib}
        yield row | {"seconds": took}


def correlated(size: int) -> Tensor:
    """A positive definite matrix (size, size) with a mean diagonal of 1."""
    factor = torch.randn(size, 64)
    return factor @ factor.T / 128 + torch.eye(size) / 2


def main() -> None:
    """Write and print the two tables."""
    write("allocation", allocating())
    write("fisher", itertools.chain(*map(rows, BATCH)))


if __name__ == "__main__":
    sys.exit(run(main))
