"""How time and memory grow with a model: `make growth` writes results/benchmarks/growth.csv,
blocks.csv and a figure.

growth.csv: each step of a user's work, in a process of its own, on U-Nets of five widths with
random weights. Peak memory is what the step takes above the model, its inputs and the libraries
(Linux: /proc/self). A tensor wider than `sensitivity.LARGEST` has its curvature in blocks.

blocks.csv: what smaller blocks of the curvature, and fewer output channels per pass, cost in damage
and save in time, on the trained models of width 16 and 64.

Rows that are there already are left alone; delete a table to make it again.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from shared import (
    DIGITS,
    SAMPLES,
    WORK,
    Subject,
    Table,
    figure,
    forget_peak,
    in_a_process,
    memory,
    over,
    run,
    seconds,
)
from torch import Tensor, nn

from lafq import allocate, estimate_sensitivity, load_quantized, quantize, save_quantized
from lafq.fisher.sensitivity import CHANNELS, LARGEST, Sensitivity
from lafq.fisher.shrinkage import Moments
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB
from lafq.study import workspace
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.unet import UNet
from lafq.study.rows import mib_at

WIDTHS = (8, 16, 32, 64, 128)
NAMED = {"estimate_sensitivity": "estimate_sensitivity (one pass)"}
STEPS = ("estimate_sensitivity", "allocate", "quantize", "save_quantized", "load_quantized")
PASSES, BATCH, BITS = 2, 8, 4.0
ALL = 4096  # more output channels than any tensor has
# By width: columns of a block, and output channels per pass; the first row is what the others are
# held against.
BLOCKS = {
    16: ((LARGEST, ALL), (LARGEST, 32), (LARGEST, 16), (576, ALL), (288, ALL), (144, ALL)),
    64: ((LARGEST, ALL), (LARGEST, CHANNELS), (LARGEST, 64), (1152, CHANNELS)),
}


def random_sensitivity(model: nn.Module) -> Sensitivity:
    """Fisher values and curvatures of the right shapes; a curvature has random columns, so that
    rounding has something to do.
    """
    fisher, curvature = {}, {}
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            view = channel_view(model, name)
            fisher[name] = torch.rand(weight.shape)
            empty = Moments(torch.empty(1, view.size[1]), LARGEST, CHANNELS).curvature
            some = torch.randn(*empty.shape[:-1], 16)
            curvature[name] = some @ some.mT / 16 + torch.eye(empty.shape[-1])
    return Sensitivity(fisher, curvature)


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a call, and MiB that it took above what was held before."""
    before = memory("VmRSS")
    forget_peak()
    return {"seconds": seconds(work), "peak_mib": memory("VmHWM") - before}


def one_step(step: str, width: int) -> dict[str, float]:
    """Seconds and MiB of a step; of estimate_sensitivity, seconds per pass."""
    torch.manual_seed(0)
    model, inputs = UNet(width).eval(), (BATCH, 1, 32, 32)
    known = random_sensitivity(model) if step == "allocate" else None
    mib = mib_at(model, BITS)
    batches = [(torch.randn(inputs), torch.randint(1000, (BATCH,))) for _ in range(PASSES)]
    uniform = {n: "int4" for n, p in model.named_parameters() if p.ndim > 1}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        # Only where it is needed: memory that a call has freed would not be taken anew.
        small = quantize(model, uniform) if step in STEPS[3:] else None
        if step == "load_quantized":
            save_quantized(path, small, model)
        work = {
            "estimate_sensitivity": lambda: estimate_sensitivity(model, batches, 0),
            "allocate": lambda: allocate(model, known, memory_mib=mib, progress=False),
            "quantize": lambda: quantize(model, uniform),
            "save_quantized": lambda: save_quantized(path, small, model),
            "load_quantized": lambda: load_quantized(path, model),
        }[step]
        cost = measured(work)
    if step == "estimate_sensitivity":
        cost["seconds"] /= PASSES
    return cost | {"weights": sum(p.numel() for p in model.parameters())}


def pass_ratio(model: nn.Module, batches: Iterable[tuple[Tensor, ...]], **sizes: int) -> float:
    """Time of a pass over that of one forward and backward pass of the same batch, the median over
    batches.
    """
    ratios = []
    for batch in batches:
        ordinary = seconds(lambda batch=batch: model(*batch).square().sum().backward())
        how = {"seed": 0, "shrink": False, **sizes}
        two = seconds(lambda batch=batch, how=how: estimate_sensitivity(model, [batch] * 2, **how))
        ratios.append(two / 2 / ordinary)
        model.zero_grad()
    return statistics.median(ratios)


def blocked(table: Table) -> None:
    """The rows of blocks: damage of the allocator's plan at BITS per weight, over that with the
    whole curvature.
    """
    for width, settings in BLOCKS.items():
        if all((width, *setting) in table for setting in settings):
            continue
        subject, first = Subject(width, DIGITS[width]), None
        for largest, channels in settings:
            sizes = {"largest": largest, "channels": channels}
            known = subject.sensitivity(SAMPLES[width], **sizes)
            mib = mib_at(subject.model, BITS)
            errors = subject.planned(allocate(subject.model, known, memory_mib=mib, progress=False))
            first = errors if first is None else first
            batches = noised_batches(mnist(train=True)[0], 5 * BATCH, 1)
            row = {
                "columns": max(h.shape[-1] for h in known.curvature.values()),
                "curvature_mib": sum(4 * h.numel() for h in known.curvature.values()) / MIB,
                "pass_ratio": pass_ratio(subject.model, batches, **sizes),
                "damage": errors.mean().item(),
                **over("over_whole", errors, first),
            }
            table.add((width, largest, channels), lambda row=row: row)


def draw(table: pd.DataFrame) -> None:
    """Seconds and peak MiB over the number of weights, one line per step."""
    plot, axes = figure(1, 2, figsize=(10, 3.6))
    table = table.assign(peak_mib=table["peak_mib"].clip(lower=0.1))
    for (step, rows), marker in zip(table.groupby("step", sort=False), "osD^v", strict=True):
        for ax, column in zip(axes, ("seconds", "peak_mib"), strict=True):
            ax.plot("weights", column, f"{marker}-", data=rows, label=NAMED.get(step, step), ms=4)
    for ax, label in zip(axes, ("seconds", "peak MiB above the model"), strict=True):
        ax.set(xscale="log", yscale="log", xlabel="weights of the model", ylabel=label)
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    plot.suptitle("Time and memory by the size of the model", fontsize=11)
    workspace.save_figure(WORK, "growth", plot, "random weights; two cores")


def main() -> None:
    """One step of one width as JSON, or both tables and the figure."""
    if len(sys.argv) == 3:
        print(json.dumps(one_step(sys.argv[1], int(sys.argv[2]))))
        return
    table = Table("growth", ("width", "step"))
    for width in WIDTHS:
        for step in STEPS:
            table.add((width, step), partial(in_a_process, __file__, step, width))
    draw(table.frame)
    blocked(Table("blocks", ("width", "largest", "channels")))


if __name__ == "__main__":
    sys.exit(run(main))
