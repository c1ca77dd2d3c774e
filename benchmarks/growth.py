"""How time and memory grow with a model: `make growth` writes results/benchmarks/growth.csv,
blocks.csv and a figure.

growth.csv: each step of a user's work, in a process of its own, on U-Nets of five widths with
random weights. Peak memory is what the step takes above the model, its inputs and the libraries
(Linux: /proc/self). A tensor wider than `monte_carlo.LARGEST` has its curvature in blocks.

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
from torch import Tensor, nn

from lafq import (
    allocate,
    estimate_sensitivity,
    load_quantized,
    quantize,
    save_quantized,
)
from lafq.fisher.sensitivity import CHANNELS, LARGEST, Sensitivity
from lafq.fisher.shrinkage import Moments
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB
from lafq.quantization.model import dequantize_
from lafq.study import damage, workspace
from lafq.study.budget.budget import FRESH, FRESH_SEED
from lafq.study.budget.methods import mib_at
from lafq.study.diffusion import training
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.subject import load_model
from lafq.study.diffusion.unet import UNet
from lafq.study.workspace import Workspace, compute_on

WORK = Workspace("benchmarks")
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
PROFILES = {16: "mini", 64: "paper"}


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


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM the most since the last reset."""
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)
    )
    return int(line.split()[1]) / 1024


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a call, and MiB that it took above what was held before."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    start = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - start, "peak_mib": memory("VmHWM") - before}


def one_step(step: str, width: int) -> dict[str, float]:
    """Seconds and MiB of a step; of estimate_sensitivity, seconds per pass."""
    compute_on(2, "cpu")
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


def grown() -> pd.DataFrame:
    """The table of growth, row by row."""
    table = workspace.load_optional(WORK, "growth")
    rows = [] if table is None else table.to_dict("records")
    there = {(row["width"], row["step"]) for row in rows}
    for width in WIDTHS:
        for step in STEPS:
            if (width, step) in there:
                continue
            done = subprocess.run(
                [sys.executable, __file__, step, str(width)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(
                    f"{step} at width {width}: {done.stderr.strip().splitlines()[-1]}"
                )
            row = {"width": width, "step": step, **json.loads(done.stdout.splitlines()[-1])}
            rows.append(row)
            rows.sort(key=lambda row: (row["width"], STEPS.index(row["step"])))
            workspace.save_table(WORK, "growth", pd.DataFrame(rows))
            print(row, flush=True)
    return workspace.load_table(WORK, "growth")


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


def blocked() -> pd.DataFrame:
    """The table of blocks: damage of the allocator's plan at BITS per weight, over that with the
    whole curvature.
    """
    table = workspace.load_optional(WORK, "blocks")
    rows = [] if table is None else table.to_dict("records")
    there = {(row["width"], row["largest"], row["channels"]) for row in rows}
    for width, settings in BLOCKS.items():
        if all((width, *setting) in there for setting in settings):
            continue
        model, noise = load_model(Workspace(PROFILES[width]), width), FRESH_SEED
        outputs = training.held_out_outputs(model, noise, DIGITS[width], FRESH)
        digits, first = mnist(train=True)[0], None
        for largest, channels in settings:
            sizes = {"largest": largest, "channels": channels}
            known = estimate_sensitivity(
                model, noised_batches(digits, SAMPLES[width], 0), 0, **sizes
            )
            plan = allocate(model, known, mib_at(model, BITS), progress=False)
            errors = damage.output_errors(
                dequantize_(quantize(model, plan)), outputs, noise, FRESH
            )[0]
            first = errors if first is None else first
            row = {
                "width": width,
                **sizes,
                "columns": max(h.shape[-1] for h in known.curvature.values()),
            }
            row |= {"curvature_mib": sum(4 * h.numel() for h in known.curvature.values()) / MIB}
            row |= {
                "pass_ratio": pass_ratio(model, list(noised_batches(digits, 5 * BATCH, 1)), **sizes)
            }
            ratio = damage.ratio_of_means(errors, first, 0)
            row |= {"damage": errors.mean().item()} | dict(
                zip(("over_whole", "over_whole_low", "over_whole_high"), ratio, strict=True)
            )
            rows.append(row)
            print(row, flush=True)
        workspace.save_table(WORK, "blocks", pd.DataFrame(rows))
    return workspace.load_table(WORK, "blocks")


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
    most = table.loc[table.groupby("step")["weights"].idxmax()].set_index("step")
    slowest, largest = most["seconds"].idxmax(), most["peak_mib"].idxmax()
    title = f"{slowest} takes the most time (estimate_sensitivity counted per pass), {largest} the most memory"
    figure.suptitle(title, fontsize=11)
    workspace.save_figure(WORK, "growth", figure, "random weights; two cores")
    plt.close(figure)


def main() -> int:
    """One step of one width as JSON, or both tables and the figure."""
    if len(sys.argv) == 3:
        print(json.dumps(one_step(sys.argv[1], int(sys.argv[2]))))
        return 0
    compute_on(2, "cpu")
    try:
        draw(grown())
        blocked()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    print(
        "written: results/benchmarks/growth.csv, results/benchmarks/blocks.csv, "
        "figures/benchmarks/growth.png"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
