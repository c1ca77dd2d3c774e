"""Do groups of weights with a scale each pay, and four levels at 2 bits? `make benchmark` writes
results/benchmarks/groups.csv.

The diffusion model of width 16, with error feedback: first uniform formats with one scale per
output channel, or per group of consecutive weights of it, then the allocator without groups and
with groups to choose from, at the bytes of a uniform format. Damage on held-out digits and noise
that no plan has seen. `decibels` and `decibels_per_bit` compare with one scale per channel: an
extra bit per weight quarters the damage (6 dB), so groups pay where they give more. `over`: damage
with groups over that without.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from running import write
from torch import Tensor, nn

from lafq import estimate_sensitivity, quantize
from lafq.allocation.allocate import frontiers_of, solve_budget
from lafq.quantization.channels import WeightSpec
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB, unshrunk_scale
from lafq.quantization.model import bits_per_weight, dequantize_, nbytes
from lafq.quantization.plan import Plan, Recipe
from lafq.study import damage
from lafq.study.budget.budget import FRESH, FRESH_SEED
from lafq.study.diffusion import training
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.subject import load_model
from lafq.study.diffusion.unet import quantizable
from lafq.study.workspace import Workspace, compute_on

LOW, SIZES = ("midrise2", "int2", "int3", "int4"), (0, 128, 64, 32)  # 0: one scale per channel
ALLOCATED = ("int3", "int4", "int6")
SAMPLES, DIGITS = 512, 300


def grouped(model: nn.Module, low: str, size: int) -> Plan:
    """All layers' weights in a format, one scale per group of at most `size` weights."""
    plan = Plan()
    for name in quantizable(model):
        length = channel_view(model, name).size[1]
        group = next(s for s in range(min(size or length, length), 0, -1) if length % s == 0)
        plan[name] = WeightSpec(low, group=0 if group == length else group)
    return plan


@torch.no_grad()
def rows() -> list[dict]:
    """One row per format and size of group, then the allocator's."""
    model = load_model(Workspace("mini"), 16)
    names = list(quantizable(model))
    known = estimate_sensitivity(model, noised_batches(mnist(train=True)[0], SAMPLES, 0), 0)
    recipe = Recipe(unshrunk_scale, known.fisher, known.curvature)
    outputs = training.held_out_outputs(model, FRESH_SEED, DIGITS, FRESH)

    def errors(plan: Plan) -> Tensor:
        return damage.output_errors(
            dequantize_(quantize(model, plan, recipe)), outputs, FRESH_SEED, FRESH
        )[0]

    def plans() -> Iterator[tuple[str, str, Plan]]:
        for low in LOW:
            yield from ((low, str(size or "channel"), grouped(model, low, size)) for size in SIZES)
        fronts = {
            groups: frontiers_of(
                model, known.fisher, "mixed", curvature=known.curvature, groups=groups
            )
            for groups in ((), SIZES[1:])
        }
        for low in ALLOCATED:
            mib = nbytes(model, dict.fromkeys(known.fisher, low)) / MIB
            for groups, front in fronts.items():
                yield (
                    f"allocator, bytes of {low}",
                    "any" if groups else "channel",
                    solve_budget(model, front, mib, recipe),
                )

    table, first, before = [], {}, torch.empty(0)
    for format, group, plan in plans():
        found, bits = errors(plan), bits_per_weight(model, plan, names)
        row: dict[str, Any] = {
            "format": format,
            "group": group,
            "bits_per_weight": bits,
            "damage": found.mean().item(),
        }
        if group == "channel":
            first, before = row, found
        else:
            row["decibels"] = 10 * math.log10(first["damage"] / row["damage"])
        if group == "any":
            row |= dict(
                zip(
                    ("over", "over_low", "over_high"),
                    damage.ratio_of_means(found, before, FRESH_SEED),
                    strict=True,
                )
            )
        elif group != "channel":
            row["decibels_per_bit"] = row["decibels"] / (bits - first["bits_per_weight"])
        table.append(row)
    return table


if __name__ == "__main__":
    compute_on(2, "cpu")
    write("groups", rows())
