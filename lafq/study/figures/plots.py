"""Figures. Every function draws the rows it is given on axes it is given.

A rule has one colour throughout (COLOURS); viridis stands for a timestep or a budget.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from lafq.study.poster import BEST_RATIOS, Published

_PALETTE = sns.color_palette("colorblind", 10)
COLOURS = {
    **{"uniform": _PALETTE[0], "global": _PALETTE[1], "group": _PALETTE[9], "ratio": _PALETTE[3]},
    **{"mean_std": _PALETTE[4], "magnitude": _PALETTE[5], "random": _PALETTE[7]},
    **{"allocate": _PALETTE[2], "allocate_all": (0.0, 0.3, 0.22)},
}
POSTER = {"color": "0.35", "marker": "D"}
FP32 = {"color": "black", "ls": "--", "lw": 1, "label": "FP32"}
LINES = {"tensor": ":", "channel": "--", "mixed": "-", "weight": "-"}
MARKERS = {"fp16": "o", "int8": "s"}
FEATURES = {"fid_inception": "Inception", "fid_mnist": "MNIST"}
AMPLIFIED = 64  # differences of images are drawn this many times as bright
BRIGHTENED = 8  # so that a grey background is seen
PAIRED = "bars: 95 % intervals of the difference, paired bootstrap over the images"
OVER_DIGITS = "bars: 95 % intervals, bootstrap over the digits"
SPREAD = "bars: one standard deviation over the blocks"


def bars(rows: pd.DataFrame, metric: str) -> np.ndarray:
    """Lengths (2, rows) of the error bars from a value to the ends of its interval."""
    low, high = (f"{metric}_low", f"{metric}_high") if f"{metric}_low" in rows else ("low", "high")
    return np.stack([rows[metric] - rows[low], rows[high] - rows[metric]]).clip(0)


def digits(ax: Axes, images: np.ndarray, columns: int, title: str = "") -> None:
    """A grid of grey images (N, 32, 32), N rounded down to whole rows of `columns`."""
    columns = min(columns, len(images))
    rows = len(images) // columns
    grid = images[: rows * columns].reshape(rows, columns, 32, 32).transpose(0, 2, 1, 3)
    ax.imshow(grid.reshape(rows * 32, columns * 32), cmap="gray", vmin=0, vmax=255)
    ax.set(title=title, xticks=[], yticks=[])
    ax.grid(False)


def loss_curve(ax: Axes, losses: pd.DataFrame) -> None:
    """Training loss over steps (columns step, loss), log scale."""
    ax.plot(losses["step"], losses["loss"], lw=1)
    ax.set(yscale="log", xlabel="training step", ylabel="noise-prediction MSE")
    ax.set_title("Training loss")


def size_curve(ax: Axes, sizes: pd.DataFrame, rule: str, share: float, label: str) -> None:
    """Stored share of the FP32 bytes over a rule's threshold, one line per format and granularity;
    the poster's share dashed.
    """
    sizes = sizes.assign(threshold=sizes["threshold"].astype(float))
    for (low, granularity), rows in sizes.groupby(["format", "granularity"]):
        line = {"ls": LINES[granularity], "lw": 2 if low == "int8" else 1}
        name = f"{low.upper()} by {granularity}"
        ax.plot(rows["threshold"], 100 * rows["mem_share"], **line, color=COLOURS[rule], label=name)
    ax.axhline(100 * share, color=POSTER["color"], ls="--", lw=1, label="the poster's size")
    ax.set(xlabel=label, ylabel="stored bytes (% of FP32)", ylim=(0, 108))
    ax.set_title(f"Stored size by threshold, rule {rule}")
    ax.legend(fontsize=9)


def quality_over_size(ax: Axes, table: pd.DataFrame, metric: str) -> None:
    """FID difference from FP32 with its 95 % interval over stored MiB, one marker per row.

    metric: fid_inception or fid_mnist; rows without it are left out.
    """
    ax.axhline(0, **FP32)
    delta = f"delta_{metric}"
    rows = table[(table["rule"] != "baseline") & table[metric].notna()]
    for i, (row, marker) in enumerate(zip(rows.itertuples(), "osD^vP*X", strict=False)):
        # Smaller and smaller, as some rows have equal bytes and equal FID.
        style = {"fmt": marker, "mfc": "none", "ms": 12 - 2 * min(i, 4), "capsize": 3}
        name = f"{row.rule}, {row.format.upper()} by {row.granularity}"
        one = rows.loc[[row.Index]]
        style |= {"color": COLOURS[row.rule], "label": name}
        ax.errorbar(one["mem_mib"], one[delta], bars(one, delta), **style)
    ax.set(xlabel="stored MiB", ylabel=f"FID difference from FP32\n({_features(rows, metric)})")
    ax.set_title("FID difference by stored size")
    ax.legend(fontsize=9)


def noise_floor(axes: Sequence[Axes], table: pd.DataFrame) -> None:
    """FID over N, one panel per feature extractor: blocks of real and of generated images, mean +-
    one standard deviation; dashed: extrapolated to infinite N.
    """
    named = {"real": ("real digits", "0.5"), "generated": ("FP32 model's images", "black")}
    fid = table[table["metric"] == "fid"]
    for ax, (features, panel) in zip(axes, fid.groupby("features", sort=False), strict=True):
        for images, rows in panel.groupby("images", sort=False):
            at_n, [beyond] = rows[np.isfinite(rows["n"])], rows[np.isinf(rows["n"])]["mean"]
            label, colour = named[images]
            style = {"marker": "o", "ms": 5, "capsize": 3, "color": colour, "label": label}
            ax.errorbar(at_n["n"], at_n["mean"], at_n["sd"], **style)
            ax.axhline(beyond, color=colour, ls="--", lw=1, label=f"{label}, infinite N")
        ax.set(xscale="log", yscale="log", xlabel="N, images in a block", ylabel="FID")
        ax.set_title(f"FID by N, {features} features")
        ax.set_ylim(top=2 * panel["mean"].max())  # room for the legend
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter("{x:,.0f}")
            axis.set_minor_formatter("{x:,.0f}" if axis is ax.yaxis else "")
        ax.tick_params(axis="y", which="minor", labelsize=8)
        ax.legend(fontsize=9)


def poster_and_noise(ax: Axes, published: Sequence[Published], noise: float) -> None:
    """The poster's FID differences from its baseline over how far two draws of one model differ.

    noise: standard deviation of the difference of two draws.
    """
    base, rows = published[0].fid, [row for row in published[1:] if row.source == "poster"]
    for width, shade in ((2, "0.92"), (1, "0.82")):
        label = f"±{width} standard deviation{'s' * (width > 1)} of new noise"
        ax.axvspan(-width * noise, width * noise, color=shade, zorder=0, label=label)
    ax.axvline(0, **FP32)
    ax.plot([row.fid - base for row in rows], range(len(rows)), ls="", **POSTER)
    names = [f"{r[0]} {r[1] if r[0] == 'ratio' else ''}".strip() for r in rows]
    ax.set_yticks(range(len(rows)), names)
    ax.set(xlabel="FID difference from FP32 (Inception features, N = 100)")
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_title("The poster's FID differences and new noise")
    ax.legend(fontsize=9)


def published_differences(ax: Axes, table: pd.DataFrame, metric: str) -> None:
    """Difference of each row of `poster.compare` from its baseline: ours with the 95 % interval,
    the poster's as diamonds.
    """
    rows, delta = table[table["rule"] != "baseline"].iloc[::-1], f"delta_{metric}"
    ax.axvline(0, **FP32)
    for at, row in enumerate(rows.itertuples()):
        style = {"fmt": "o", "capsize": 3, "color": COLOURS[row.rule]}
        one = rows.loc[[row.Index]]
        label = "ours, the same noise in every row" if at == len(rows) - 1 else None
        ax.errorbar(one[delta], [at], xerr=bars(one, delta), **style, label=label)
    published = rows["fid_paper"] - table[table["rule"] == "baseline"]["fid_paper"].item()
    style = POSTER | {"ls": "", "mfc": "none", "label": "poster, other noise in every row"}
    ax.plot(published, range(len(rows)), **style)
    names = [f"{_spoken(r)} (ours: {r.mem_share:.0%} of FP32)" for r in rows.itertuples()]
    ax.set_yticks(range(len(rows)), names)
    at_n = f"{_features(rows, metric)}; ours: {rows['steps'].iloc[0]:,} steps"
    ax.set(xlabel=f"FID difference from FP32 (positive: worse)\n{at_n}")
    ax.set_title("FID differences, ours and the poster's")
    ax.legend(fontsize=9)


def poster_and_ours(
    ax: Axes, table: pd.DataFrame, published: Sequence[Published], metric: str
) -> None:
    """FID difference from FP32 over the ratio: the poster's sweep, and ours on single weights with
    95 % intervals.
    """
    ax.axvspan(*BEST_RATIOS, color="0.93", zorder=0, label="best ratios (poster)")
    ax.axhline(0, **FP32)
    swept = [row for row in published if row[0] == "ratio"]
    x, y = [float(row[1]) for row in swept], [row.fid - published[0].fid for row in swept]
    ax.plot(x, y, color=POSTER["color"], lw=1)
    read = np.array([row.source != "poster" for row in swept])
    for mask, face, label in (
        (~read, POSTER["color"], "poster, other noise in every row"),
        (read, "white", "read off its plot"),
    ):
        ax.plot(np.array(x)[mask], np.array(y)[mask], ls="", ms=6, mfc=face, label=label, **POSTER)
    rows = table[(table["rule"] == "ratio") & (table["granularity"] == "weight")]
    rows = rows.assign(ratio=rows["setting"].astype(float)).sort_values("ratio")
    rows = rows[rows["ratio"].between(min(x), max(x))]
    for i, (low, line) in enumerate(rows.groupby("format")):
        style = {"marker": MARKERS[low], "ms": 5, "lw": 1.2, "capsize": 3}
        style |= {"color": COLOURS["ratio"], "ls": "--" if low == "fp16" else "-"}
        name = f"ours, {low.upper()}, the same noise"
        delta = f"delta_{metric}"
        ax.errorbar(line["ratio"] + 0.001 * i, line[delta], bars(line, delta), **style, label=name)
    ax.set(xlabel="ratio r (share of a layer kept in FP32)")
    ax.set_ylabel(f"FID difference from FP32 (positive: worse)\n{_features(rows, metric)}")
    ax.set_title("FID difference by ratio, ours and the poster's")
    ax.legend(fontsize=9)


def ratio_with_many_images(ax: Axes, table: pd.DataFrame) -> None:
    """FID difference from FP32 over the ratio with its 95 % interval; beside it mean and standard
    deviation over blocks of images. table: evidence_rows.
    """
    rows, delta = table[table["rule"] == "ratio"], "delta_fid_mnist"
    ratio = rows["setting"].astype(float)
    ax.axvspan(*BEST_RATIOS, color="0.93", zorder=0, label="best ratios (poster)")
    ax.axhline(0, **FP32)
    style = {"marker": "s", "ms": 5, "lw": 1.2, "capsize": 2, "color": COLOURS["ratio"]}
    ax.errorbar(ratio, rows[delta], bars(rows, delta), **style, label="INT8, all images")
    style = {"fmt": "D", "ms": 4, "color": "0.45", "mfc": "white", "capsize": 2}
    blocks = rows["block_delta_fid_mnist"], rows["block_delta_fid_mnist_sd"]
    ax.errorbar(ratio + 0.004, *blocks, **style, label="blocks of the poster's N")
    ax.set(xlabel="ratio r (share of a layer kept in FP32)")
    ax.set_ylabel(f"FID difference from FP32\n({_features(rows, 'fid_mnist')})")
    ax.set_title("Ratio sweep with more images")
    ax.legend(fontsize=9)


def claim_by_run(ax: Axes, claims: pd.DataFrame, over: pd.DataFrame) -> None:
    """C3 in every training run and over all: mean FID of the ratios in 0.35-0.40 minus that of the
    others, 95 % intervals. claims: evidence_runs_claims; over: evidence_runs_over.
    """
    runs, mean = claims[claims["claim"] == "C3"], over[over["claim"] == "C3"]
    ax.axhline(0, color="black", ls="--", lw=1)
    style = {"fmt": "s", "capsize": 3, "color": COLOURS["ratio"], "label": "one run"}
    ax.errorbar(range(len(runs)), runs["measured"], bars(runs, "measured"), **style)
    style = {"fmt": "D", "capsize": 3, "color": "black", "label": "mean of the runs"}
    ax.errorbar([len(runs)], mean["measured"], bars(mean, "measured"), **style)
    ax.set_xticks(range(len(runs) + 1), [*(f"seed {seed}" for seed in runs["seed"]), "mean"])
    ax.set(ylabel="mean FID, 0.35-0.40 minus others\n(MNIST features, N = 100)")
    ax.set_title("C3 by training run")
    ax.legend(fontsize=9)


def sets_of_digits(
    axes: Sequence[Axes], table: pd.DataFrame, images: dict[str, np.ndarray]
) -> None:
    """Left the first images of every set of `image_statistics`, one row per set, with its FID;
    right the same ones, brighter.
    """
    for ax, row in zip(axes, table.itertuples(), strict=True):
        shown = images[row.images][: len(images[row.images]) // 2]
        brighter = (BRIGHTENED * shown.astype(int)).clip(0, 255).astype(np.uint8)
        digits(ax, np.concatenate([shown, brighter]), 2 * len(shown))
        _beside(ax, f"{row.images}\nFID {row.fid_mnist:.0f}")
    axes[0].set_title(f"images   |   the same images, {BRIGHTENED} times as bright")


def paired_digits(
    axes: Sequence[Axes],
    table: pd.DataFrame,
    samples: dict[str, np.ndarray],
    count: int = 7,
    amplified: int = AMPLIFIED,
) -> None:
    """The first images of every row of a table (left) and, brighter, their differences from the
    first row's (right). The first row is the unquantized model; a column shares its noise.
    """
    first = samples[table["sample"].iloc[0]][:count].astype(int)
    for ax, row in zip(axes, table.itertuples(), strict=True):
        images = samples[row.sample][:count]
        off = (amplified * np.abs(images.astype(int) - first)).clip(0, 255).astype(np.uint8)
        digits(ax, np.concatenate([images, off]), 2 * count)
        _beside(ax, f"{_spoken(row)}\n{row.mem_mib:.2f} MiB")
    axes[0].set_title(f"images   |   difference from FP32's, {amplified} times as bright")


def _beside(ax: Axes, name: str) -> None:
    ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)


def _features(rows: pd.DataFrame, metric: str) -> str:
    return f"{FEATURES[metric]} features, N = {rows['n_images'].iloc[0]:,}"


def _spoken(row: Any) -> str:
    """A row's name in a figure."""
    if row.rule == "baseline":
        return "FP32"
    if row.rule == "allocate":
        return f"allocator, {row.setting}"
    setting = f" {row.setting}" if row.rule == "ratio" else ""
    return f"{row.rule}{setting}, {row.format.upper()}"
