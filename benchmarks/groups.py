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
import sys
from collections.abc import Iterator

import torch
from shared import SAMPLES, Subject, over, run, write
from torch import nn

from lafq.allocation.allocate import frontiers_of, solve_budget
from lafq.fisher.sensitivity import Sensitivity
from lafq.quantization.channels import WeightSpec
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB
from lafq.quantization.model import bits_per_weight, nbytes
from lafq.quantization.plan import Plan
from lafq.study.damage import FRESH_SEED
from lafq.study.diffusion.unet import quantizable

LOW, SIZES = ("midrise2", "int2", "int3", "int4"), (0, 128, 64, 32)  # 0: one scale per channel
ALLOCATED = ("int3", "int4", "int6")


def grouped(model: nn.Module, low: str, size: int) -> Plan:
    """All layers' weights in a format, one scale per group of at most `size` weights."""
    plan = Plan()
    for name in quantizable(model):
        length = channel_view(model, name).size[1]
        group = next(s for s in range(min(size or length, length), 0, -1) if length % s == 0)
        plan[name] = WeightSpec(low, group=0 if group == length else group)
    return plan


def plans(model: nn.Module, known: Sensitivity) -> Iterator[tuple[str, str, Plan]]:
    """Format, group and plan of every row."""
    for low in LOW:
        yield from ((low, str(size or "channel"), grouped(model, low, size)) for size in SIZES)
    fronts = {
        name: frontiers_of(model, known, groups=groups)
        for name, groups in (("channel", ()), ("any", SIZES[1:]))
    }
    for low in ALLOCATED:
        mib = nbytes(model, dict.fromkeys(known.fisher, low)) / MIB
        for name, front in fronts.items():
            yield f"allocator, bytes of {low}", name, solve_budget(model, front, mib, known.recipe)


@torch.no_grad()
def main() -> None:
    """Write the table: one row per format and size of group, then the allocator's."""
    subject = Subject(16, 300)
    model, known = subject.model, subject.sensitivity(SAMPLES[16])
    table, first, before = [], {}, torch.empty(0)
    for format, group, plan in plans(model, known):
        errors, bits = (
            subject.planned(plan, known.recipe),
            bits_per_weight(model, plan, quantizable(model)),
        )
        row = {"format": format, "group": group, "bits_per_weight": bits}
        row["damage"] = errors.mean().item()
        if group == "channel":
            first, before = row, errors
        else:
            row["decibels"] = 10 * math.log10(first["damage"] / row["damage"])
        if group == "any":
            row |= over("over", errors, before, FRESH_SEED)
        elif group != "channel":
            row["decibels_per_bit"] = row["decibels"] / (bits - first["bits_per_weight"])
        table.append(row)
    write("groups", table)


if __name__ == "__main__":
    sys.exit(run(main))
