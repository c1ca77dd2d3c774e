"""Damage of the allocator's plans, on inputs that no plan has seen: python benchmarks/damage_by.py
TABLE, in one of

passes: by the number of passes behind a sensitivity, over uniform INT4's damage, at INT4's bytes.
    Three small networks with random weights, and the diffusion model of width 16; shrunk estimates
    from one draw of noise per pass and from four, beside plain means. A pass is one input for the
    small networks and eight noised digits for the diffusion model.
groups: by the number of weights that share a scale, with error feedback, at width 16. First uniform
    formats with one scale per output channel, or per group of consecutive weights of it, then the
    allocator without groups and with groups to choose from, at the bytes of a uniform format.
    decibels and decibels_per_bit compare with one scale per channel: an extra bit per weight
    quarters the damage (6 dB), so groups pay where they give more. over: with groups over without.
blocks: by the size of the curvature's blocks and by the output channels per pass, of the trained
    models of width 16 and 64; and the time of a pass.

Rows of passes and blocks that are there already are left alone.
"""

import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from shared import DIGITS, SAMPLES, SEED, Subject, Table, run, time_ratio, write
from torch import Tensor, nn

from lafq import allocate, estimate_sensitivity
from lafq.allocation.allocate import frontiers_of, solve_budget
from lafq.fisher.sensitivity import CHANNELS, LARGEST, Sensitivity
from lafq.quantization.channels import WeightSpec
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB, STUDY_FORMATS
from lafq.quantization.model import bits_per_weight, nbytes
from lafq.quantization.plan import Plan
from lafq.rng import generator
from lafq.study.budget_rows import mib_at
from lafq.study.damage import FRESH_SEED, HALF_PIXELS, over
from lafq.study.diffusion.ddpm import BATCH, noised_batches
from lafq.study.diffusion.subject import mnist, quantizable

PASSES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ESTIMATES = {"shrunk": {}, "plain": {"shrink": False}, "shrunk, 4 draws": {"draws": 4}}
JUDGED, JUDGED_SEED = 256, 1000
LOW, SIZES = ("midrise2", "int2", "int3", "int4"), (0, 128, 64, 32)  # 0: one scale per channel
ALLOCATED = ("int3", "int4", "int6")
ALL = 4096  # more output channels than any tensor has
# By width: columns of a block, and output channels per pass; the first row is what the others are
# held against.
BLOCKS = {
    16: ((LARGEST, ALL), (LARGEST, 32), (LARGEST, 16), (576, ALL), (288, ALL), (144, ALL)),
    64: ((LARGEST, ALL), (LARGEST, CHANNELS), (LARGEST, 64), (1152, CHANNELS)),
}
BITS = 4.0


class Diffusion(Subject):
    """The trained diffusion model of width 16; `half` of a damage is half the error's sum."""

    batch, draws, half = BATCH, 1, HALF_PIXELS

    def __init__(self) -> None:
        super().__init__(16, JUDGED, JUDGED_SEED, first=0)


class Small(Subject):
    """A network with the weights that it has, on standard normal inputs of this shape."""

    batch, draws, half = 1, 3, 1

    def __init__(self, layers: list[nn.Module], shape: tuple[int, ...]) -> None:
        self.model, self.shape = nn.Sequential(*layers).eval(), shape

    def sensitivity(self, samples: int, seed: int = SEED, **how: Any) -> Sensitivity:
        """From so many inputs, one a pass."""
        batches = torch.randn(samples, 1, *self.shape, generator=generator(seed)).unbind()
        return estimate_sensitivity(self.model, batches, seed, **how)

    @torch.no_grad()
    def errors(self, whole: nn.Module) -> Tensor:
        """Half the squared error summed over the output, by input."""
        x = torch.randn(JUDGED, *self.shape, generator=generator(JUDGED_SEED))
        return 0.5 * (whole(x) - self.model(x)).square().flatten(1).sum(1)


def subjects() -> dict[str, Small | Diffusion]:
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
        "three convolutions": Small(three, (3, 16, 16)),
        "two linear layers": Small(linear, (64,)),
        "down and up": Small(down + up, (1, 16, 16)),
        "diffusion model": Diffusion(),
    }


def by_passes(
    table: Table, name: str, subject: Small | Diffusion, passes: Iterable[int] = PASSES
) -> None:
    """One row per passes, draw and estimate: damage over uniform INT4's, and over the predicted."""
    uniform = {n: "int4" for n, p in subject.model.named_parameters() if p.ndim > 1}
    mib = nbytes(subject.model, uniform) / MIB
    of_uniform = subject.planned(uniform).mean().item()

    def row(count: int, draw: int, kind: str) -> dict[str, float]:
        known = subject.sensitivity(count * subject.batch, draw, **ESTIMATES[kind])
        how = {"memory_mib": mib, "formats": STUDY_FORMATS, "progress": False}
        plan = allocate(subject.model, known, **how)
        damage = subject.planned(plan).mean().item()
        predicted = plan.damage / subject.half
        return {"over_uniform": damage / of_uniform, "over_predicted": damage / predicted}

    for key in itertools.product(passes, range(subject.draws), ESTIMATES):
        table.add((name, *key), row, *key)


def passes() -> None:
    """The table."""
    table = Table("passes", ("network", "passes", "draw", "estimates"))
    for name, subject in subjects().items():
        by_passes(table, name, subject)


def grouped(model: nn.Module, low: str, size: int) -> Plan:
    """All layers' weights in a format, one scale per group of at most `size` weights."""
    entries = {}
    for name in quantizable(model):
        length = channel_view(model, name).size[1]
        group = next(s for s in range(min(size or length, length), 0, -1) if length % s == 0)
        entries[name] = WeightSpec(low, group=0 if group == length else group)
    return Plan(entries)


def group_plans(model: nn.Module, known: Sensitivity) -> Iterator[tuple[str, str, Plan]]:
    """Format, group and plan of every row."""
    for low, size in itertools.product(LOW, SIZES):
        yield low, str(size or "channel"), grouped(model, low, size)
    choices = {"channel": (), "any": SIZES[1:]}
    fronts = {name: frontiers_of(model, known, groups=sizes) for name, sizes in choices.items()}
    for low, name in itertools.product(ALLOCATED, fronts):
        mib = nbytes(model, dict.fromkeys(known.fisher, low)) / MIB
        plan = solve_budget(model, fronts[name], mib, known.recipe)
        yield f"allocator, bytes of {low}", name, plan


def groups() -> Iterator[dict]:
    """One row per format and size of group, then the allocator's."""
    subject = Subject(16, 300)
    model, known = subject.model, subject.sensitivity(SAMPLES[16])
    for format, group, plan in group_plans(model, known):
        errors = subject.planned(plan, known.recipe)
        row = {"format": format, "group": group}
        row["bits_per_weight"] = bits_per_weight(model, plan, quantizable(model))
        row["damage"] = errors.mean().item()
        if group == "channel":
            first, before = row, errors
        else:
            row["decibels"] = 10 * math.log10(first["damage"] / row["damage"])
        if group == "any":
            row |= over("over", errors, before, FRESH_SEED)
        elif group != "channel":
            more = row["bits_per_weight"] - first["bits_per_weight"]
            row["decibels_per_bit"] = row["decibels"] / more
        yield row


def pass_ratio(model: nn.Module, batches: Iterable[tuple[Tensor, ...]], **sizes: int) -> float:
    """Median over batches of the time of a pass over that of one forward and backward pass."""

    def ordinary(*batch: Tensor) -> None:
        model.zero_grad()
        model(*batch).square().sum().backward()

    def two(*batch: Tensor) -> None:
        estimate_sensitivity(model, [batch] * 2, shrink=False, **sizes)

    return statistics.median(time_ratio(1, two, ordinary, *batch) / 2 for batch in batches)


def blocks() -> None:
    """Damage of the allocator's plan at BITS per weight, over that with the whole curvature."""
    table = Table("blocks", ("width", "largest", "channels"))
    for width, settings in BLOCKS.items():
        if all((width, *setting) in table for setting in settings):
            continue
        subject, whole = Subject(width, DIGITS[width]), None
        mib = mib_at(subject.model, BITS)
        for largest, channels in settings:
            sizes = {"largest": largest, "channels": channels}
            known = subject.sensitivity(SAMPLES[width], **sizes)
            errors = subject.planned(allocate(subject.model, known, memory_mib=mib, progress=False))
            whole = errors if whole is None else whole
            batches = noised_batches(mnist(train=True)[0], 5 * BATCH, 1)
            row = {
                "columns": max(h.shape[-1] for h in known.curvature.values()),
                "curvature_mib": sum(4 * h.numel() for h in known.curvature.values()) / MIB,
                "pass_ratio": pass_ratio(subject.model, batches, **sizes),
                "damage": errors.mean().item(),
                **over("over_whole", errors, whole, SEED),
            }
            table.add((width, largest, channels), dict, row)


TABLES = {"passes": passes, "groups": partial(write, groups), "blocks": blocks}

if __name__ == "__main__":
    sys.exit(run(TABLES[sys.argv[1]]))
