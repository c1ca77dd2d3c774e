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
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from shared import WORK, Subject, Table, forget_peak, memory, over, run
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
SAMPLES, DIGITS = {16: 512, 64: 128}, {16: 500, 64: 100}


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
    start = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - start, "peak_mib": memory("VmHWM") - before}


def one_step(step: str, width: int) -> dict[str, float]:
    """Seconds and MiB of a step; of estimate_sensitivity, seconds per pass."""
    torch.manual_seed(0)
    model = UNet(width).eval()
    known = random_sensitivity(model) if step == "allocate" else None
    mib = mib_at(model, BITS)
    batches = [
        (torch.randn(BATCH, 1, 32, 32), torch.randint(1000, (BATCH,))) for _ in range(PASSES)
    ]
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
        found = measured(work)
    if step == "estimate_sensitivity":
        found["seconds"] /= PASSES
    return found | {"weights": sum(p.numel() for p in model.parameters())}


def in_a_process(step: str, width: int) -> dict[str, Any]:
    """`one_step` in a process of its own; RuntimeError with its last line where it fails."""
    command = [sys.executable, __file__, step, str(width)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{step} at width {width}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def pass_ratio(model: nn.Module, batches: list[tuple[Tensor, ...]], **sizes: int) -> float:
    """Time of a pass over that of one forward and backward pass of the same batch, the median over
    batches.
    """
    ratios = []
    for x, t in batches:
        start = time.perf_counter()
        model(x, t).square().sum().backward()
        middle = time.perf_counter()
        estimate_sensitivity(model, [(x, t)] * 2, 0, shrink=False, **sizes)
        ratios.append((time.perf_counter() - middle) / 2 / (middle - start))
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
            plan = allocate(
                subject.model, known, memory_mib=mib_at(subject.model, BITS), progress=False
            )
            errors = subject.planned(plan)
            first = errors if first is None else first
            batches = list(noised_batches(mnist(train=True)[0], 5 * BATCH, 1))
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
    workspace.set_style()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    table = table.assign(peak_mib=table["peak_mib"].clip(lower=0.1))
    for (step, rows), marker in zip(table.groupby("step", sort=False), "osD^v", strict=True):
        for ax, column in zip(axes, ("seconds", "peak_mib"), strict=True):
            ax.plot("weights", column, f"{marker}-", data=rows, label=NAMED.get(step, step), ms=4)
    for ax, label in zip(axes, ("seconds", "peak MiB above the model"), strict=True):
        ax.set(xscale="log", yscale="log", xlabel="weights of the model", ylabel=label)
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle("Time and memory by the size of the model", fontsize=11)
    workspace.save_figure(WORK, "growth", figure, "random weights; two cores")
    plt.close(figure)


def main() -> None:
    """One step of one width as JSON, or both tables and the figure."""
    if len(sys.argv) == 3:
        print(json.dumps(one_step(sys.argv[1], int(sys.argv[2]))))
        return
    table = Table("growth", ("width", "step"))
    for width in WIDTHS:
        for step in STEPS:
            table.add((width, step), lambda step=step, width=width: in_a_process(step, width))
    draw(table.frame)
    blocked(Table("blocks", ("width", "largest", "channels")))


if __name__ == "__main__":
    sys.exit(run(main))
