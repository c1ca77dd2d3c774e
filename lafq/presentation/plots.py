"""Figures. Every function draws numbers it is given on axes it is given, and computes nothing else.

Colours are seaborn's colour-blind palette, or viridis where they stand for a timestep.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lafq.paper.poster import BEST_RATIOS, Published

AMPLIFIED = 64  # differences of images are drawn this many times as bright
SWEPT = (0.28, 0.5)  # the ratios that the paper swept
MARKED = 50  # a line of more points than this is drawn without markers
MARKERS = {"fp16": "o", "int8": "s"}
KIND = (("format", "{}"), ("granularity", "per {}"))
RUN = (("seed", "training seed {}"),)
PAIRED = "bars: 95 % intervals of the difference, paired bootstrap over the images"
DIGITS = "bars: 95 % intervals, bootstrap over the digits"
SPREAD = "bars: one standard deviation over the blocks"


def digits(ax: Axes, images: np.ndarray, columns: int, title: str) -> None:
    """A grid of grey images (N, 32, 32), N rounded down to whole rows of `columns`."""
    columns = min(columns, len(images))
    rows = len(images) // columns
    grid = images[: rows * columns].reshape(rows, columns, 32, 32).transpose(0, 2, 1, 3).reshape(rows * 32, columns * 32)
    ax.imshow(grid, cmap="gray", vmin=0, vmax=255)
    ax.set(title=title, xticks=[], yticks=[])
    ax.grid(False)


def loss_curve(ax: Axes, losses: pd.DataFrame) -> None:
    """Training loss over steps (columns step, loss), log scale."""
    ax.plot(losses["step"], losses["loss"], lw=1)
    ax.set(yscale="log", xlabel="training step", ylabel="noise-prediction MSE", title="Training loss (mean of 50 steps)")


def size_curve(
    ax: Axes, sizes: pd.DataFrame, share: float, label: str, log: bool = False, limits: tuple[float, float] | None = None
) -> None:
    """Stored share of the FP32 bytes over the threshold, one line per (format, granularity); the paper's share dashed."""
    sizes = sizes.assign(threshold=sizes["threshold"].astype(float))
    for (low, granularity), rows in sizes[np.isfinite(sizes["threshold"])].groupby(["format", "granularity"]):
        few = len(rows) <= MARKED
        style = {"marker": MARKERS[low] if few else "", "ms": 4, "lw": 1 if few else 2}
        ax.plot(rows["threshold"], 100 * rows["mem_share"], **style, label=f"{low} per {granularity}")
    ax.axhline(100 * share, color="black", ls="--", lw=1, label=f"the paper's size, {100 * share:.1f} %")
    ax.set(xlabel=label, ylabel="stored bytes (% of FP32)", ylim=(0, 108), xscale="log" if log else "linear")
    ax.set_title("What every threshold stores", fontsize=10)
    ax.set_xlim(limits)
    ax.legend(fontsize=9)


def quality_over_size(ax: Axes, table: pd.DataFrame, metric: str, label: str, title: str) -> None:
    """A metric with its 95 % interval over stored MiB, one marker per kind of row; the baseline dashed."""
    baseline = table[table["method"] == "baseline"][metric].item()
    ax.axhline(baseline, color="black", ls="--", lw=1, label="FP32")
    rows = table[table["method"] != "baseline"]
    kinds = rows.groupby(["method", "format", "granularity"], sort=False)
    for (kind, points), marker in zip(kinds, "osD^vP*X", strict=False):
        style = {"fmt": marker, "mfc": "none", "ms": 7, "capsize": 3, "label": f"{kind[0]}, {kind[1].upper()} by {kind[2]}"}
        ax.errorbar(points["mem_mib"], points[metric], bars(points, metric), **style)
    ax.set(xlabel="stored MiB", ylabel=label)
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=9)


def ratio_sweep(ax: Axes, table: pd.DataFrame, metric: str, label: str, title: str, by: tuple[tuple[str, str], ...] = KIND) -> None:
    """A metric over the ratio kept, with its 95 % interval where it has one; the range that the paper calls best is shaded,
    the baseline dashed.

    by: the columns whose values make a line, each with how its value is written in the legend. Lines are set apart a little, so
    that bars do not overlap.
    """
    rows = table[table["method"] == "ratio"]
    rows = rows.assign(ratio=rows["threshold"].astype(float)).sort_values("ratio")
    ax.axvspan(*BEST_RATIOS, color="0.85", label="best in the paper")
    ax.axhline(table[table["method"] == "baseline"][metric].iloc[0], color="black", ls="--", lw=1, label="FP32 baseline")
    lines = rows.groupby([column for column, _ in by])
    for i, (kind, line) in enumerate(lines):
        low, granularity = line[["format", "granularity"]].iloc[0]
        style = {"ls": "-" if granularity == "weight" else ":", "marker": MARKERS.get(low, "."), "ms": 5, "lw": 1.2, "capsize": 2}
        lengths = bars(line, metric) if f"{metric}_low" in line else None
        name = ", ".join(write.format(value) for (_, write), value in zip(by, kind, strict=True))
        apart = 0.002 * (i - (len(lines) - 1) / 2)
        ax.errorbar(line["ratio"] + apart, line[metric], lengths, **style, elinewidth=0.8, label=name)
    ax.set(xlabel="ratio r (share of a layer kept in FP32)", ylabel=label)
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=9)


def block_statistics(ax: Axes, table: pd.DataFrame) -> None:
    """On the axes of `ratio_sweep`: mean and standard deviation of a block's difference from the baseline, over disjoint blocks."""
    rows = table[table["method"] == "ratio"]
    style = {"fmt": "D", "ms": 4, "color": "0.45", "mfc": "white", "capsize": 2, "elinewidth": 0.8}
    label = f"{rows['blocks'].iloc[0]} blocks of {rows['n_images'].iloc[0] // rows['blocks'].iloc[0]}: mean and sd"
    ax.errorbar(
        rows["threshold"].astype(float) + 0.004,
        rows["block_delta_fid_mnist"],
        rows["block_delta_fid_mnist_sd"],
        **style,
        label=label,
    )
    ax.legend(fontsize=9)


def noise_floor(axes: Sequence[Axes], table: pd.DataFrame, published: Sequence[Published]) -> None:
    """FID over N, one panel per feature extractor: blocks of real and of generated images, mean +- one standard deviation.

    Dashed: extrapolated to infinite N. The published rows are drawn on Inception's panel, at their N.
    """
    fid = table[table["metric"] == "fid"]
    for ax, (features, panel) in zip(axes, fid.groupby("features", sort=False), strict=True):
        for colour, (images, rows) in zip(sns.color_palette(), panel.groupby("images", sort=False), strict=False):
            at_n, beyond = rows[np.isfinite(rows["n"])], rows[np.isinf(rows["n"])]["mean"].item()
            label = "real digits" if images == "real" else "FP32 model's images"
            ax.errorbar(at_n["n"], at_n["mean"], at_n["sd"], marker="o", ms=5, capsize=3, color=colour, label=label)
            ax.axhline(beyond, color=colour, ls="--", lw=1, label=f"{label}, N to infinity: {beyond:.1f}")
        if features == "Inception":
            sizes, fids = zip(*((row.images, row.fid) for row in published if row.images in (100, 5000)), strict=True)
            ax.scatter(sizes, fids, marker="_", s=120, lw=0.8, color="black", zorder=3, label="published rows (poster, README)")
        at_100 = panel[(panel["images"] == "generated") & (panel["n"] == 100)]["sd"]
        spread = f": at N = 100 one model's FID varies by ±{at_100.item():.1f} (1 sd)" if len(at_100) else ""
        ax.set(xscale="log", yscale="log", xlabel="images N in a block", ylabel="FID", title=f"{features} features{spread}")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter("{x:,.0f}")
            axis.set_minor_formatter("{x:,.0f}" if axis is ax.yaxis else "")
        ax.tick_params(axis="y", which="minor", labelsize=8)
        ax.legend(fontsize=8)


def poster_and_ours(ax: Axes, table: pd.DataFrame, published: Sequence[Published], metric: str) -> None:
    """FID difference from FP32 over the ratio: the poster's sweep, and ours on single weights with 95 % intervals.

    metric: whose `delta_` is drawn, fid_inception as the poster's or, where there is none, fid_mnist.
    """
    ax.axvspan(*BEST_RATIOS, color="0.93", zorder=0, label="best ratios (poster)")
    ax.axhline(0, color="black", ls="--", lw=1, label="FP32")
    sweep = [(float(row.threshold), row.fid - published[0].fid, row.source) for row in published if row.method == "ratio"]
    ax.plot([r for r, _, _ in sweep], [d for _, d, _ in sweep], color="0.35", lw=1)
    for source, face, label in (
        ("poster", "0.35", "poster, other noise in every row"),
        ("poster's plot", "white", "read off its plot"),
    ):
        points = [(r, d) for r, d, s in sweep if s == source]
        ax.plot(*zip(*points, strict=True), "D", ms=6, color="0.35", mfc=face, label=label)
    rows = table[(table["method"] == "ratio") & (table["granularity"] == "weight")]
    rows = rows[rows["threshold"].astype(float).between(*SWEPT)].assign(ratio=rows["threshold"].astype(float))
    for i, (low, line) in enumerate(rows.groupby("format")):
        line, style = line.sort_values("ratio"), {"marker": MARKERS[low], "ms": 5, "lw": 1.2, "capsize": 3}
        lengths = bars(line, f"delta_{metric}")
        ax.errorbar(
            line["ratio"] + 0.001 * i, line[f"delta_{metric}"], lengths, **style, label=f"ours, {low.upper()}, the same noise"
        )
    ours, theirs = rows[f"delta_{metric}"].abs().max(), max(abs(d) for _, d, _ in sweep)
    ax.set_title(f"From the same noise, no ratio moves FID by more than {ours:.2f}; the poster's move it by up to {theirs:.1f}")
    features = {"fid_inception": "Inception", "fid_mnist": "MNIST"}[metric]
    at_n = f"N = {table['n_images'].iloc[0]}; ours: {table['steps'].iloc[0]:,} sampling steps"
    ax.set(
        xlabel="ratio r (share of a layer kept in FP32)", ylabel=f"FID difference from FP32 (positive: worse)\n{features}, {at_n}"
    )
    ax.legend(fontsize=9)


def evidence_figure(many: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """The ratio sweep with many images per row and in blocks of the poster's size (left), and over training runs (right)."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.8))
    label = "FID difference from FP32 (MNIST features, N = {})".format
    ratio_sweep(axes[0], many, "delta_fid_mnist", label(many["n_images"][0]), "int8, single weights kept", KIND)
    block_statistics(axes[0], many)
    title = f"other training runs, {runs['steps'][0]:,} steps each"
    ratio_sweep(axes[1], runs, "delta_fid_mnist", label(runs["n_images"][0]), title, RUN)
    return figure


def published_differences(ax: Axes, table: pd.DataFrame, metric: str) -> None:
    """Difference of each row of `poster.compare` from its baseline: ours with the 95 % interval, the poster's hollow."""
    rows = table[table["method"] != "baseline"].iloc[::-1]
    at = np.arange(len(rows))
    ax.axvline(0, color="black", ls="--", lw=1, label="FP32 baseline")
    ax.errorbar(
        rows[f"delta_{metric}"],
        at,
        xerr=bars(rows, f"delta_{metric}"),
        fmt="o",
        capsize=3,
        label="ours, the same noise in every row",
    )
    published = rows["fid_paper"] - table[table["method"] == "baseline"]["fid_paper"].item()
    ax.plot(published, at, "D", mfc="none", color="0.35", label="poster, other noise in every row")
    ax.set_yticks(at, [f"{r.method} {r.threshold}, {r.format.upper()}, {r.mem_share:.0%} of FP32" for r in rows.itertuples()])
    features = {"fid_inception": "Inception", "fid_mnist": "MNIST"}[metric]
    at_n = f"N = {rows['n_images'].iloc[0]}, {rows['steps'].iloc[0]:,} sampling steps"
    ax.set(xlabel=f"FID difference from FP32 (positive: worse)\n{features} features; ours: {at_n}")
    ours, theirs = (values.abs().max() for values in (rows[f"delta_{metric}"], published))
    ax.set_title(f"From the same noise, FID changes by {ours:.2f} at most; the poster's by {theirs:.2f}")
    ax.legend(fontsize=9)


def paired_digits(
    axes: Sequence[Axes], table: pd.DataFrame, samples: dict[str, np.ndarray], count: int, amplified: int = AMPLIFIED
) -> None:
    """The first images of every row of a table (left) and, enlarged, their differences from the first row's (right).

    The first row is the unquantized model; a column shares its noise. amplified: how many times as bright differences are drawn.
    """
    first = samples[table["sample"].iloc[0]][:count].astype(int)
    for ax, row in zip(axes, table.itertuples(), strict=True):
        images = samples[row.sample][:count]
        off = (amplified * np.abs(images.astype(int) - first)).clip(0, 255).astype(np.uint8)
        digits(ax, np.concatenate([images, off]), 2 * count, "")
        ax.set_ylabel(f"{_spoken(row)}\n{row.mem_mib:.2f} MiB", rotation=0, ha="right", va="center", fontsize=9)
    axes[0].set_title(f"images from the same noise   |   their difference from FP32, {amplified} times as bright", fontsize=10)


def three_rows(table: pd.DataFrame, method: str, threshold: str = "") -> pd.DataFrame:
    """FP32, uniform INT8, and the first INT8 row of a method on single weights: the rows whose images are drawn."""
    int8 = table[table["format"] == "int8"]
    ours = int8[(int8["method"] == method) & (int8["granularity"] == "weight") & int8["threshold"].str.startswith(threshold)]
    kinds = table[table["method"] == "baseline"], int8[int8["method"] == "uniform"], ours
    return pd.concat([rows.iloc[:1] for rows in kinds], ignore_index=True)


def _spoken(row: Any) -> str:
    """A row's name in a figure."""
    named = {"none": "FP32", "all": f"uniform {row.format.upper()}"}
    if row.method in ("baseline", "uniform", "allocator"):
        return named.get(row.threshold, row.threshold)
    return f"{row.method}{' ' + row.threshold if row.method == 'ratio' else ''}, {row.format.upper()}"


def bars(rows: pd.DataFrame, metric: str) -> np.ndarray:
    """Lengths (2, rows) of the error bars from a value to the ends of its interval."""
    return np.stack([rows[metric] - rows[f"{metric}_low"], rows[f"{metric}_high"] - rows[metric]]).clip(0)
