"""Figures of rows on given axes; a rule has one colour, viridis stands for timesteps or budgets."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lafq.study import poster

_PALETTE = {"uniform": 0, "global": 1, "allocate": 2, "ratio": 3, "mean_std": 4, "magnitude": 5}
_PALETTE |= {"random": 7, "group": 9}
COLOURS = {rule: sns.color_palette("colorblind", 10)[i] for rule, i in _PALETTE.items()}
COLOURS["allocate_all"] = (0.0, 0.3, 0.22)
THEIRS = {"color": "0.35", "marker": "D"}
FP32 = {"color": "black", "ls": "--", "lw": 1, "label": "FP32"}
SWEPT = {"ms": 5, "lw": 1.2, "capsize": 3, "color": COLOURS["ratio"]}
LINES = {"tensor": ":", "channel": "--", "mixed": "-", "weight": "-"}
MARKERS = {"fp16": "o", "int8": "s"}
FEATURES = {"fid_inception": "Inception", "fid_mnist": "MNIST"}
BRIGHTENED = 8  # so that a grey background is seen
AMPLIFIED = 64  # so that differences of a grey level are seen
SHOWN = 10  # images of a row
RATIO = "ratio r (share of a layer kept in FP32)"
DIFFERENCE = "FID difference from FP32"
WORSE = f"{DIFFERENCE} (positive: worse)"
PAIRED = "bars: 95 % intervals of the difference, paired bootstrap over the images"
OVER_DIGITS = "bars: 95 % intervals, bootstrap over the digits"
SPREAD = "bars: one standard deviation over the blocks"
Panels = Sequence[Axes]
Images, Rows = dict[str, np.ndarray], list[np.ndarray]  # uint8 (N, 32, 32), by name or row by row


def bars(rows: pd.DataFrame, metric: str) -> np.ndarray:
    """Lengths (2, rows) of the error bars from a value to the ends of its interval."""
    low, high = (f"{metric}_low", f"{metric}_high") if f"{metric}_low" in rows else ("low", "high")
    return np.stack([rows[metric] - rows[low], rows[high] - rows[metric]]).clip(0)


def labelled(ax: Axes, title: str, x: str, y: str) -> None:
    """Title, labels of the axes, and legend."""
    ax.set(title=title, xlabel=x, ylabel=y)
    ax.legend(fontsize=9)


def digits(ax: Axes, images: np.ndarray, columns: int, title: str = "") -> None:
    """A grid of grey images (N, H, W), N rounded down to whole rows of `columns`."""
    columns = min(columns, len(images))
    rows = len(images) // columns
    high, wide = images.shape[1:]
    grid = images[: rows * columns].reshape(rows, columns, high, wide).transpose(0, 2, 1, 3)
    ax.imshow(grid.reshape(rows * high, columns * wide), cmap="gray", vmin=0, vmax=255)
    ax.set(title=title, xticks=[], yticks=[])
    ax.grid(False)


def brighter(images: np.ndarray, times: int) -> np.ndarray:
    """Grey values, so many times as bright, as uint8."""
    return (times * images.astype(int)).clip(0, 255).astype(np.uint8)


def size_curve(ax: Axes, sizes: pd.DataFrame, rule: str, share: float, label: str) -> None:
    """Stored share of the FP32 bytes over a rule's threshold; the poster's share dashed."""
    for (low, granularity), rows in sizes.groupby(["format", "granularity"]):
        line = {"ls": LINES[granularity], "lw": 2 if low == "int8" else 1, "color": COLOURS[rule]}
        line["label"] = f"{low.upper()} by {granularity}"
        ax.plot(rows["threshold"].astype(float), 100 * rows["mem_share"], **line)
    ax.axhline(100 * share, color=THEIRS["color"], ls="--", lw=1, label="the poster's size")
    ax.set_ylim(0, 108)
    labelled(ax, f"Stored size by threshold, rule {rule}", label, "stored bytes (% of FP32)")


def noise_floor(axes: Panels, table: pd.DataFrame) -> None:
    """FID of blocks of N images, mean +- standard deviation, one panel per feature extractor."""
    named = {"real": ("real digits", "0.5"), "generated": ("FP32 model's images", "black")}
    fid = table[table["metric"] == "fid"]
    for ax, (features, panel) in zip(axes, fid.groupby("features", sort=False), strict=True):
        for images, rows in panel.groupby("images", sort=False):
            at_n, [beyond] = rows[np.isfinite(rows["n"])], rows[np.isinf(rows["n"])]["mean"]
            label, colour = named[images]
            style = {"marker": "o", "ms": 5, "capsize": 3, "color": colour, "label": label}
            ax.errorbar(at_n["n"], at_n["mean"], at_n["sd"], **style)
            ax.axhline(beyond, color=colour, ls="--", lw=1, label=f"{label}, infinite N")
        ax.set(xscale="log", yscale="log")
        labelled(ax, f"FID by N, {features} features", "N, images in a block", "FID")
        ax.set_ylim(top=2 * panel["mean"].max())  # room for the legend
        for axis, minor in ((ax.xaxis, ""), (ax.yaxis, "{x:,.0f}")):
            axis.set_major_formatter("{x:,.0f}")
            axis.set_minor_formatter(minor)
        ax.tick_params(axis="y", which="minor", labelsize=8)


def poster_and_noise(ax: Axes, noise: float) -> None:
    """The poster's FID differences beside the standard deviation of two draws of one model."""
    rows = pd.DataFrame(poster.POSTER[1:])
    _new_noise(ax.axvspan, noise)
    ax.axvline(0, **FP32)
    for source, fill in (("poster", "0.35"), ("poster's plot", "white")):
        change = rows["fid"][rows["source"] == source] - poster.POSTER[0].fid
        ax.plot(change, change.index, **THEIRS, ls="", mfc=fill, label=f"from the {source}")
    names = rows["method"].where(rows["method"] != "ratio", "ratio " + rows["threshold"])
    ax.set_yticks(range(len(rows)), names)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    title = "The poster's FID differences and new noise"
    labelled(ax, title, f"{DIFFERENCE} (Inception features, N = 100)", "")


def published_differences(ax: Axes, table: pd.DataFrame, metric: str, noise: float = 0) -> None:
    """FID differences of the rows of `poster.compare` that have the metric: ours with intervals,
    the poster's hollow; noise: `poster.new_noise`.
    """
    rows, delta = table[table["rule"] != "baseline"].iloc[::-1], f"delta_{metric}"
    rows = rows[rows[metric].notna()]
    _new_noise(ax.axvspan, noise)
    ax.axvline(0, **FP32)
    for i, rule in enumerate(rows["rule"]):
        label = "ours, the same noise in every row" if i == len(rows) - 1 else None
        style = {"fmt": "o", "capsize": 3, "color": COLOURS[rule], "label": label}
        one = rows[i : i + 1]
        ax.errorbar(one[delta], [i], xerr=bars(one, delta), **style)
    hollow = THEIRS | {"mfc": "none", "label": "poster, other noise in every row"}
    published = rows.reset_index()["fid_paper"] - poster.POSTER[0].fid
    for change, at in published.groupby(published).indices.items():
        # A row of the poster that stands beside several of ours is drawn once.
        ax.plot([change] * len(at), at, color=THEIRS["color"], lw=1)
        ax.plot([change], [at.mean()], **hollow)
        hollow["label"] = None
    names = [f"{_spoken(r)} (ours: {r.mem_share:.0%} of FP32)" for r in rows.itertuples()]
    ax.set_yticks(range(len(rows)), names)
    x = f"{WORSE}\n{_features(rows, metric)}; ours: {rows['steps'].iloc[0]:,} steps"
    ax.set(title="FID differences, ours and the poster's", xlabel=x, ylim=(-2.4, len(rows) - 0.4))
    ax.legend(fontsize=9, ncols=2, loc="lower center")


def poster_and_ours(ax: Axes, table: pd.DataFrame, metric: str, noise: float = 0) -> None:
    """FID difference from FP32 over the ratio: the poster's sweep, and ours on single weights."""
    swept = pd.DataFrame([row for row in poster.POSTER if row.method == "ratio"])
    x, y = swept["threshold"].astype(float), swept["fid"] - poster.POSTER[0].fid
    read, points = swept["source"] != "poster", THEIRS | {"ls": "", "ms": 6}
    _best_ratios(ax)
    _new_noise(ax.axhspan, noise)
    ax.plot(x, y, color=THEIRS["color"], lw=1)
    ax.plot(x[~read], y[~read], label="poster, other noise in every row", **points)
    ax.plot(x[read], y[read], mfc="white", label="read off its plot", **points)
    ours, delta = table.query("rule == 'ratio' and granularity == 'weight'"), f"delta_{metric}"
    ours = ours.assign(ratio=ours["setting"].astype(float)).sort_values("ratio")
    ours = ours[ours["ratio"].between(x.min(), x.max())]
    for i, (low, rows) in enumerate(ours.groupby("format")):
        style = {"marker": MARKERS[low], "ls": "--" if low == "fp16" else "-"} | SWEPT
        label = f"ours, {low.upper()}, the same noise"
        ax.errorbar(rows["ratio"] + 0.001 * i, rows[delta], bars(rows, delta), label=label, **style)
    y = f"{WORSE}\n{_features(ours, metric)}"
    labelled(ax, "FID difference by ratio, ours and the poster's", RATIO, y)
    ax.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def ratio_with_many_images(ax: Axes, table: pd.DataFrame) -> None:
    """FID difference from FP32 over the ratio (evidence_rows), of all images and of blocks."""
    rows, delta = table[table["rule"] == "ratio"], "delta_fid_mnist"
    ratio = rows["setting"].astype(float)
    _best_ratios(ax)
    style = SWEPT | {"marker": "s", "capsize": 2, "label": "INT8, all images"}
    ax.errorbar(ratio, rows[delta], bars(rows, delta), **style)
    style = {"fmt": "D", "ms": 4, "color": "0.45", "mfc": "white", "capsize": 2}
    blocks = rows[f"block_{delta}"], rows[f"block_{delta}_sd"]
    ax.errorbar(ratio + 0.004, *blocks, **style, label="blocks of the poster's N")
    y = f"{DIFFERENCE}\n({_features(rows, 'fid_mnist')})"
    labelled(ax, "Ratio sweep with more images", RATIO, y)


def claim_by_run(ax: Axes, claims: pd.DataFrame, over: pd.DataFrame) -> None:
    """C3 in every training run (evidence_runs_claims) and over all (evidence_runs_over)."""
    runs, mean = claims[claims["claim"] == "C3"], over[over["claim"] == "C3"]
    ax.axhline(0, color="black", ls="--", lw=1)
    style = {"fmt": "s", "capsize": 3, "color": COLOURS["ratio"], "label": "one run"}
    ax.errorbar(range(len(runs)), runs["measured"], bars(runs, "measured"), **style)
    style |= {"fmt": "D", "color": "black", "label": "mean of the runs"}
    ax.errorbar([len(runs)], mean["measured"], bars(mean, "measured"), **style)
    ax.set_xticks(range(len(runs) + 1), [*(f"seed {seed}" for seed in runs["seed"]), "mean"])
    y = "mean FID, 0.35-0.40 minus others\n(MNIST features, N = 100)"
    labelled(ax, "C3 by training run", "", y)


def sets_of_digits(figure: Figure, table: pd.DataFrame, images: Images) -> None:
    """The first images of every set of `image_statistics`, and the same ones brighter below."""
    names = [f"{row.images}\nFID {row.fid_mnist:.0f}" for row in table.itertuples()]
    shown = [images[name][:SHOWN] for name in table["images"]]
    _stacked(figure, names, shown, [brighter(x, BRIGHTENED) for x in shown])


def paired_digits(figure: Figure, table: pd.DataFrame, samples: Images) -> None:
    """The first images of every row of a table, and below them how they differ from the first
    row's, AMPLIFIED times as bright.
    """
    names = [f"{_spoken(row)}\n{row.mem_mib:.2f} MiB" for row in table.itertuples()]
    shown = [samples[key][:SHOWN] for key in table["sample"]]
    off = [brighter(abs(x - shown[0].astype(int)), AMPLIFIED) for x in shown]
    _stacked(figure, names, shown, [off[0][:0], *off[1:]])


def _stacked(figure: Figure, names: list[str], above: Rows, below: Rows) -> None:
    """Strips of images, one row or two each, on a figure as high as they are."""
    shown = [np.concatenate(pair) for pair in zip(above, below, strict=True)]
    heights = [len(images) // len(above[0]) for images in shown]
    figure.set_size_inches(10, 8.4 / len(above[0]) * sum(heights) + 0.12 * len(heights))
    axes = figure.subplots(len(names), 1, height_ratios=heights, squeeze=False)[:, 0]
    for ax, name, images in zip(axes, names, shown, strict=True):
        digits(ax, images, len(above[0]))
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)


def _new_noise(span: Callable[..., Any], noise: float) -> None:
    if noise:
        label = "±1 standard deviation of new noise"
        span(-noise, noise, color="black", alpha=0.09, lw=0, zorder=0, label=label)


def _best_ratios(ax: Axes) -> None:
    ax.axvspan(*poster.BEST_RATIOS, color="#fbeeb8", zorder=0, label="best ratios (poster)")
    ax.axhline(0, **FP32)


def _features(rows: pd.DataFrame, metric: str) -> str:
    return f"{FEATURES[metric]} features, N = {rows['n_images'].iloc[0]:,}"


def _spoken(row: Any) -> str:
    """A row's name in a figure."""
    if row.rule == "baseline":
        return "FP32"
    if row.rule == "allocate":
        return f"allocator, {row.setting}"
    setting = f" {row.setting}" if row.rule == "ratio" else ""
    whole = " by tensor" if row.granularity == "tensor" and row.rule != "uniform" else ""
    return f"{row.rule}{setting}, {row.format.upper()}{whole}"
