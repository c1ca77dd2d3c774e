"""How many passes a sensitivity needs: damage of the allocator's plan over uniform INT4's, at
INT4's bytes, after 1 to 256 passes.

Three small networks with random weights, and the diffusion model of width 16; shrunk estimates from
one draw of noise per pass and from four, beside plain means. A pass is one input for the small
networks and eight noised digits for the diffusion model. No plan has seen the inputs that measure
damage. Writes results/benchmarks/passes.csv and figures/benchmarks/passes.png.
"""

import itertools
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import pandas as pd
import shared
import torch
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn

from lafq import allocate, estimate_sensitivity, quantize
from lafq.quantization.formats import MIB, STUDY_FORMATS
from lafq.quantization.model import dequantize_, nbytes
from lafq.rng import generator
from lafq.study import workspace
from lafq.study.damage import HALF_PIXELS
from lafq.study.diffusion.ddpm import BATCH, noised_batches
from lafq.study.diffusion.mnist import mnist

PASSES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ESTIMATES = {"shrunk": {}, "plain": {"shrink": False}, "shrunk, 4 draws": {"draws": 4}}
FRESH, FRESH_SEED = 256, 1000
SMALLEST = 0.15  # the lower end of the axis that the small networks share
Measure = Callable[[nn.Module], float]


class Subject(NamedTuple):
    """A model, batches for so many passes of a draw, and what measures the damage of a quantized
    copy.
    """

    model: nn.Module
    batches: Callable[[int, int], Iterable]
    damage: Measure
    draws: int = 3


def small(layers: list[nn.Module], shape: tuple[int, ...]) -> Subject:
    """A network with the weights that it has, on standard normal inputs of this shape; one input is
    a pass.
    """
    model = nn.Sequential(*layers).eval()
    fresh = torch.randn(FRESH, *shape, generator=generator(FRESH_SEED))
    with torch.no_grad():
        expected = model(fresh)

    def damage(copy: nn.Module) -> float:
        with torch.no_grad():
            return 0.5 * (copy(fresh) - expected).square().flatten(1).sum(1).mean().item()

    def batches(count: int, draw: int) -> Iterable[Tensor]:
        return torch.randn(count, 1, *shape, generator=generator(draw))

    return Subject(model, batches, damage)


def diffusion() -> Subject:
    """The trained diffusion model of profile mini."""
    judge, digits = shared.Subject(16, FRESH, FRESH_SEED, first=0), mnist(train=True)[0]
    return Subject(
        judge.model,
        lambda count, draw: noised_batches(digits, BATCH * count, draw),
        lambda copy: HALF_PIXELS * judge.errors(copy).mean().item(),
        draws=1,
    )


def subjects() -> dict[str, Subject]:
    """The networks by name; random weights come from fixed seeds."""
    conv = partial(nn.Conv2d, padding=1)
    torch.manual_seed(0)
    three = [conv(3, 16, 3), nn.SiLU(), conv(16, 16, 3), nn.SiLU(), conv(16, 3, 3)]
    torch.manual_seed(1)
    linear = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)]
    torch.manual_seed(2)
    down = [conv(1, 8, 3), nn.GroupNorm(4, 8), nn.SiLU(), conv(8, 16, 3, stride=2)]
    up = [nn.GroupNorm(4, 16), nn.SiLU(), nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)]
    up += [nn.SiLU(), conv(8, 1, 3)]
    return {
        "three convolutions": small(three, (3, 16, 16)),
        "two linear layers": small(linear, (64,)),
        "down and up": small(down + up, (1, 16, 16)),
        "diffusion model": diffusion(),
    }


def measured(
    table: shared.Table, name: str, subject: Subject, passes: Iterable[int] = PASSES
) -> None:
    """One row per number of passes, draw and estimate: measured damage over uniform INT4's, and
    over the predicted one.
    """
    model = subject.model
    uniform = dict.fromkeys([n for n, p in model.named_parameters() if p.ndim > 1], "int4")
    mib = nbytes(model, uniform) / MIB
    of_uniform = subject.damage(dequantize_(quantize(model, uniform)))

    def row(count: int, draw: int, kind: str) -> dict[str, float]:
        found = estimate_sensitivity(model, subject.batches(count, draw), draw, **ESTIMATES[kind])
        plan = allocate(model, found, memory_mib=mib, formats=STUDY_FORMATS, progress=False)
        damage = subject.damage(dequantize_(quantize(model, plan)))
        return {"over_uniform": damage / of_uniform, "over_predicted": damage / plan.damage}

    for key in itertools.product(passes, range(subject.draws), ESTIMATES):
        table.add((name, *key), partial(row, *key))


def draw(table: pd.DataFrame) -> None:
    """Damage over uniform INT4's by passes, one panel per network."""
    plot, axes = shared.figure(1, 4, figsize=(11, 3.1), sharex=True)
    for ax, (name, rows) in zip(axes, table.groupby("network", sort=False), strict=True):
        means = rows.groupby(["estimates", "passes"], sort=False)["over_uniform"].mean()
        for kind, style in zip(ESTIMATES, ("o-", "s--", "^:"), strict=True):
            ax.plot(means[kind].index, means[kind], style, label=kind)
        ax.axhline(1, color="0.4", lw=1)
        ax.set(xscale="log", yscale="log", title=name, xlabel="passes")
        if rows["over_uniform"].min() > SMALLEST:
            ax.set(ylim=(SMALLEST, 20), yticks=[0.2, 0.5, 1, 2, 5, 10])
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(labelsize=9)
    ticks = [1, 4, 16, 64, 256]
    axes[0].set(ylabel="damage / uniform INT4's", xticks=ticks, xticklabels=map(str, ticks))
    axes[-1].legend(title="estimates", fontsize=8, title_fontsize=8)
    plot.suptitle("Damage by the passes behind a sensitivity", fontsize=11)
    note = "equal bytes; lower is better; small networks: mean of three draws"
    workspace.save_figure(shared.WORK, "passes", plot, note)


def main() -> None:
    """Write the table and the figure."""
    table = shared.Table("passes", ("network", "passes", "draw", "estimates"))
    for name, subject in subjects().items():
        measured(table, name, subject)
    draw(table.frame)


if __name__ == "__main__":
    sys.exit(shared.run(main))
