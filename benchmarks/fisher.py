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
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from shared import run as run_script
from shared import write
from torch import Tensor
from tqdm import tqdm

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

BATCH = {16: 32, 64: 8}
ROUNDS = {16: 7, 64: 3}
CHUNK = 8
DRAWS = 64
PASSES = 8  # of the curvature, whose last step comes once for all passes
Method = Callable[..., dict[str, Tensor]]


def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noised training digits (B, 1, 32, 32), their timesteps and the noise."""
    x0 = unit_interval(mnist(train=True)[0][:size])
    t = torch.linspace(0, TIMESTEPS - 1, size).long()
    noise = torch.randn(x0.shape, generator=generator(0, 2))
    return add_noise(x0, t, noise), t, noise


def ordinary(
    model: UNet, names: list[str], x: Tensor, t: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """Forward and backward pass of the loss of the whole batch; what it gives is no Fisher
    information.
    """
    loss = 0.5 * (noise - model(x, t)).square().sum()
    return dict(
        zip(names, torch.autograd.grad(loss, [model.get_parameter(n) for n in names]), strict=True)
    )


def loop(model: UNet, names: list[str], x: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Squared gradients of single samples, one backward pass each."""
    total = {n: torch.zeros_like(model.get_parameter(n)) for n in names}
    for i in range(len(x)):
        for n, g in ordinary(model, names, x[i : i + 1], t[i : i + 1], noise[i : i + 1]).items():
            total[n].addcmul_(g, g)
    return {n: v / len(x) for n, v in total.items()}


def random_signs(
    model: UNet, names: list[str], x: Tensor, t: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """One batched backward pass of the residuals under one random sign per sample: its squares are
    unbiased.
    """
    output = model(x, t)
    signs = torch.randint(2, (len(x), 1, 1, 1), generator=generator(0, 1)) * 2 - 1
    gradients = torch.autograd.grad(
        output, [model.get_parameter(n) for n in names], (output - noise).detach() * signs
    )
    return {n: g.square() / len(x) for n, g in zip(names, gradients, strict=True)}


def vmapped(
    model: UNet, names: list[str], x: Tensor, t: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """torch.func, samples in chunks."""
    return empirical_fisher(model, names, [((x, t), noise)], CHUNK).by_weight


def with_backpack(
    names: list[str], width: int, state: dict[str, Tensor]
) -> Callable[..., dict[str, Tensor]]:
    """BackPACK's SumGradSquared, on a model of its own, since it leaves hooks behind."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    model = UNet(width).eval().to(memory_format=torch.channels_last)
    model.load_state_dict(state)
    for name in names:
        extend(model.get_submodule(name.removesuffix(".weight")))
    for n, p in model.named_parameters():
        p.requires_grad_(n in names)

    def run(_: UNet, names: list[str], x: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        with backpack(SumGradSquared()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (0.5 * (noise - model(x, t)).square().sum()).backward()
        return {n: model.get_parameter(n).sum_grad_squared / len(x) for n in names}

    return run


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """As the module says."""
    return statistics.mean(abs(found[n].sum().item() / exact[n].sum().item() - 1) for n in exact)


def rows(width: int) -> list[dict]:
    """One row per method; times are medians of ratios to an ordinary pass run just before."""
    torch.manual_seed(0)
    model = (
        load_model(Workspace("mini"), width)
        if width == 16
        else UNet(width).eval().to(memory_format=torch.channels_last)
    )
    names, data = list(quantizable(model)), batch(BATCH[width])
    for n, p in model.named_parameters():
        p.requires_grad_(n in names)
    x, t, _ = data
    exact = {
        "empirical": loop(model, names, *data),
        "true": estimate_sensitivity(
            model, itertools.repeat((x, t), DRAWS), 1, names, curvature=False
        ).fisher,
    }
    methods: dict[str, tuple[str, Callable[..., dict[str, Tensor]]]] = {
        "true, one batched backward pass (lafq)": (
            "true",
            lambda *_: estimate_sensitivity(model, [(x, t)], 0, names, curvature=False).fisher,
        ),
        "true, the same with the curvature (lafq)": (
            "true",
            lambda *_, passes=1: (
                estimate_sensitivity(model, [(x, t)] * passes, 0, names, shrink=passes > 1).fisher
            ),
        ),
        "empirical, random signs (lafq)": ("empirical", random_signs),
        f"empirical, vmap(grad) in chunks of {CHUNK}": ("empirical", vmapped),
        "empirical, loop over single samples": ("empirical", loop),
    }
    if width == 16:  # at width 64 it takes minutes a pass
        methods["empirical, BackPACK SumGradSquared"] = (
            "empirical",
            with_backpack(names, width, model.state_dict()),
        )

    def seconds(function: Method) -> float:
        start = time.perf_counter()
        function(model, names, *data)
        return time.perf_counter() - start

    table = []
    for method, (kind, run) in tqdm(methods.items(), desc=f"width {width}"):
        passes = PASSES if "curvature" in method else 1
        timed = partial(run, passes=passes) if passes > 1 else run
        pairs = [(seconds(ordinary), seconds(timed)) for _ in range(ROUNDS[width])]
        row = {"method": method, "width": width, "batch": BATCH[width]}
        row["cost_ratio"] = statistics.median(ours / passes / one for one, ours in pairs)
        row["relative_error"] = error(run(model, names, *data), exact[kind])
        table.append(row)
    return table


def allocating() -> list[dict]:
    """Seconds to allocate the width-64 model: at every granularity by random Fisher values, then
    with curvature.
    """
    torch.manual_seed(0)
    model, table = UNet(64).eval(), []
    fisher = {n: torch.rand(w.shape) * torch.rand(()) for n, w in quantizable(model).items()}
    for granularity, feedback in [
        *((granularity, False) for granularity in solver.ALLOCATED),
        ("mixed", True),
    ]:
        curvature = (
            {n: correlated(channel_view(model, n).size[1]) for n in fisher} if feedback else {}
        )
        start = time.perf_counter()
        known = Sensitivity(fisher, curvature)
        solver.allocate(model, known, memory_mib=17.0, granularity=granularity, progress=False)
        row = {"width": 64, "granularity": granularity, "curvature": feedback, "budget_mib": 17.0}
        table.append(row | {"seconds": time.perf_counter() - start})
    return table


def correlated(size: int) -> Tensor:
    """A positive definite matrix (size, size) with a mean diagonal of 1."""
    factor = torch.randn(size, 64)
    return factor @ factor.T / 128 + torch.eye(size) / 2


def main() -> None:
    """Write and print the two tables."""
    write("allocation", allocating())
    write("fisher", [row for width in BATCH for row in rows(width)])


if __name__ == "__main__":
    sys.exit(run_script(main))
