"""Figures. Every function draws numbers it is given on axes it is given, and computes nothing else.

Colours are seaborn's colour-blind palette, or viridis where they stand for a timestep.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from lafq.study.figures.sentences import FEATURES
from lafq.study.poster import Published

AMPLIFIED = 64  # differences of images are drawn this many times as bright
BRIGHTENED = 8  # so that a grey background is seen
MARKED = 50  # a line of more points than this is drawn without markers
MARKERS = {"fp16": "o", "int8": "s"}
PAIRED = "bars: 95 % intervals of the difference, paired bootstrap over the images"
OVER_DIGITS = "bars: 95 % intervals, bootstrap over the digits"
SPREAD = "bars: one standard deviation over the blocks"


def digits(ax: Axes, images: np.ndarray, columns: int, title: str) -> None:
    """A grid of grey images (N, 32, 32), N rounded down to whole rows of `columns`."""
    columns = min(columns, len(images))
    rows = len(images) // columns
    grid = (
        images[: rows * columns]
        .reshape(rows, columns, 32, 32)
        .transpose(0, 2, 1, 3)
        .reshape(rows * 32, columns * 32)
    )
    ax.imshow(grid, cmap="gray", vmin=0, vmax=255)
    ax.set(title=title, xticks=[], yticks=[])
    ax.grid(False)


def loss_curve(ax: Axes, losses: pd.DataFrame) -> None:
    """Training loss over steps (columns step, loss), log scale."""
    ax.plot(losses["step"], losses["loss"], lw=1)
    ax.set(
        yscale="log", xlabel="training step", ylabel="noise-prediction MSE", title="Training loss"
    )


def size_curve(
    ax: Axes,
    sizes: pd.DataFrame,
    share: float,
    label: str,
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> None:
    """Stored share of the FP32 bytes over the threshold, one line per (format, granularity); the
    paper's share dashed.
    """
    sizes = sizes.assign(threshold=sizes["threshold"].astype(float))
    single = sizes[(sizes["format"] == "int8") & (sizes["granularity"] == "weight")]
    nearest = single.loc[(single["mem_share"] - share).abs().idxmin()]
    for (low, granularity), rows in sizes[np.isfinite(sizes["threshold"])].groupby(
        ["format", "granularity"]
    ):
        few = len(rows) <= MARKED
        style = {"marker": MARKERS[low] if few else "", "ms": 4, "lw": 1 if few else 2}
        ax.plot(
            rows["threshold"], 100 * rows["mem_share"], **style, label=f"{low} per {granularity}"
        )
    ax.axhline(
        100 * share, color="black", ls="--", lw=1, label=f"the published size, {100 * share:.1f} %"
    )
    ax.set(
        xlabel=label,
        ylabel="stored bytes (% of FP32)",
        ylim=(0, 108),
        xscale="log" if log else "linear",
    )
    stored = f"{100 * nearest['mem_share']:.1f} % of FP32's bytes at {label.partition(' (')[0]} = {nearest['threshold']:.3g}"
    ax.set_title(f"INT8 by weight stores {stored} (published: {100 * share:.1f} %)", fontsize=10)
    ax.set_xlim(limits)
    ax.legend(fontsize=9)


def quality_over_size(ax: Axes, table: pd.DataFrame, metric: str, title: str) -> None:
    """FID difference from FP32 with its 95 % interval over stored MiB, one marker per kind of row.

    metric: fid_inception or fid_mnist; rows without it are left out. title: a second line.
    """
    ax.axhline(0, color="black", ls="--", lw=1, label="FP32")
    rows, delta = table[(table["method"] != "baseline") & table[metric].notna()], f"delta_{metric}"
    kinds = rows.groupby(["method", "format", "granularity"], sort=False)
    for i, ((kind, points), marker) in enumerate(zip(kinds, "osD^vP*X", strict=False)):
        # Smaller and smaller, as some rows have equal bytes and equal FID.
        style = {"fmt": marker, "mfc": "none", "ms": 12 - 2 * min(i, 4), "capsize": 3}
        style["label"] = f"{kind[0]}, {kind[1].upper()} by {kind[2]}"
        ax.errorbar(points["mem_mib"], points[delta], bars(points, delta), **style)
    features = FEATURES[metric]
    at_n = f"{features} features, N = {rows['n_images'].iloc[0]}"
    ax.set(xlabel="stored MiB", ylabel=f"FID difference from FP32 (positive: worse)\n{at_n}")
    most = rows.loc[rows[delta].abs().idxmax()]
    named = f"{most['method']} {most['format'].upper()}"
    ax.set_title(
        f"From the same noise, FID moves by at most {abs(most[delta]):.2f} ({named})\n({title})",
        fontsize=10,
    )
    ax.legend(fontsize=9)


def noise_floor(axes: Sequence[Axes], table: pd.DataFrame) -> None:
    """FID over N, one panel per feature extractor: blocks of real and of generated images, mean +-
    one standard deviation.

    Dashed: extrapolated to infinite N.
    """
    fid = table[table["metric"] == "fid"]
    for ax, (features, panel) in zip(axes, fid.groupby("features", sort=False), strict=True):
        for colour, (images, rows) in zip(
            sns.color_palette(), panel.groupby("images", sort=False), strict=False
        ):
            at_n, beyond = rows[np.isfinite(rows["n"])], rows[np.isinf(rows["n"])]["mean"].item()
            label = "real digits" if images == "real" else "FP32 model's images"
            ax.errorbar(
                at_n["n"],
                at_n["mean"],
                at_n["sd"],
                marker="o",
                ms=5,
                capsize=3,
                color=colour,
                label=label,
            )
            ax.axhline(
                beyond,
                color=colour,
                ls="--",
                lw=1,
                label=f"{label}, extrapolated to infinite N: {beyond:.1f}",
            )
        ax.set(xscale="log", yscale="log", xlabel="N, images in a block", ylabel="FID")
        at_100 = panel[(panel["images"] == "generated") & (panel["n"] == 100)]
        said = (
            f"FP32 model, N = 100: FID {at_100['mean'].item():.0f} ± {at_100['sd'].item():.1f}"
            if len(at_100)
            else "FID"
        )
        ax.set_title(f"{said} ({features} features)", fontsize=11)
        ax.set_ylim(top=2 * panel["mean"].max())  # room for the legend
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter("{x:,.0f}")
            axis.set_minor_formatter("{x:,.0f}" if axis is ax.yaxis else "")
        ax.tick_params(axis="y", which="minor", labelsize=8)
        ax.legend(fontsize=8)


def poster_and_noise(ax: Axes, published: Sequence[Published], noise: float) -> None:
    """The poster's FID differences from its baseline over how far two draws of one model differ.

    noise: standard deviation of the difference of two draws.
    """
    base, rows = published[0].fid, [row for row in published[1:] if row.source == "poster"]
    for width, shade in ((2, "0.92"), (1, "0.82")):
        ax.axvspan(
            -width * noise,
            width * noise,
            color=shade,
            zorder=0,
            label=f"±{width} standard deviation{'s' * (width > 1)}",
        )
    ax.axvline(0, color="black", ls="--", lw=1)
    names = [
        f"{row.method} {row.threshold if row.method == 'ratio' else ''}".strip() for row in rows
    ]
    differences = [row.fid - base for row in rows]
    ax.plot(differences, range(len(rows)), "D", color="C0")
    ax.set_yticks(range(len(rows)), names)
    ax.set(
        xlabel="FID difference from FP32 in the poster's table (N = 100, Inception features)",
        ylim=(len(rows) - 0.5, -0.5),
    )
    inside = sum(abs(d) < noise for d in differences)
    ax.set_title(
        f"{inside} of the poster's {len(rows)} FID differences are smaller than the effect of new "
        f"noise\n"
        f"(FID difference of two draws of the authors' FP32 model: standard deviation {noise:.1f})",
        fontsize=10,
    )
    ax.legend(fontsize=9)


def published_differences(ax: Axes, table: pd.DataFrame, metric: str) -> None:
    """Difference of each row of `poster.compare` from its baseline: ours with the 95 % interval,
    the poster's hollow.
    """
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
    ax.set_yticks(
        at, [f"{_spoken(r)} (ours: {r.mem_share:.0%} of FP32)" for r in rows.itertuples()]
    )
    features = FEATURES[metric]
    at_n = f"N = {rows['n_images'].iloc[0]}, {rows['steps'].iloc[0]:,} sampling steps"
    ax.set(xlabel=f"FID difference from FP32 (positive: worse)\n{features} features; ours: {at_n}")
    ours = rows.loc[rows[f"delta_{metric}"].abs().idxmax()]
    said = f"{ours[f'delta_{metric}']:+.2f} [{ours[f'delta_{metric}_low']:+.2f}, {ours[f'delta_{metric}_high']:+.2f}]"
    theirs = published[published.abs().idxmax()]
    named = _spoken(next(rows.loc[[published.abs().idxmax()]].itertuples()))
    ax.set_title(
        f"Largest FID change: ours {said} ({_spoken(ours)}), poster's {theirs:+.2f} ({named})",
        fontsize=9,
    )
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
        digits(ax, np.concatenate([shown, brighter]), 2 * len(shown), "")
        ax.set_ylabel(
            f"{row.images}\nFID {row.fid_mnist:.0f}",
            rotation=0,
            ha="right",
            va="center",
            fontsize=9,
        )
    three, four = (table.set_index("images").loc[f"uniform {low}"] for low in ("INT3", "INT4"))
    axes[0].set_title(
        f"INT4's grey background ({four['background']:.3f}; INT3: {three['background']:.3f}) goes "
        f"with FID {four['fid_mnist']:.0f} "
        f"(INT3: {three['fid_mnist']:.0f})\n"
        f"images   |   the same images, {BRIGHTENED} times as bright (FID on MNIST features, N = "
        f"{table['n_images'].iloc[0]})",
        fontsize=10,
    )


def paired_digits(
    axes: Sequence[Axes],
    table: pd.DataFrame,
    samples: dict[str, np.ndarray],
    count: int,
    amplified: int = AMPLIFIED,
) -> None:
    """The first images of every row of a table (left) and, enlarged, their differences from the
    first row's (right).

    The first row is the unquantized model; a column shares its noise. amplified: how many times as
    bright differences are drawn.
    """
    first = samples[table["sample"].iloc[0]][:count].astype(int)
    for ax, row in zip(axes, table.itertuples(), strict=True):
        images = samples[row.sample][:count]
        off = (amplified * np.abs(images.astype(int) - first)).clip(0, 255).astype(np.uint8)
        digits(ax, np.concatenate([images, off]), 2 * count, "")
        ax.set_ylabel(
            f"{_spoken(row)}\n{row.mem_mib:.2f} MiB",
            rotation=0,
            ha="right",
            va="center",
            fontsize=9,
        )
    last = list(table.itertuples())[-1]
    off = np.abs(
        samples[last.sample].astype(int) - samples[table["sample"].iloc[0]].astype(int)
    ).mean()
    axes[0].set_title(
        f"{_spoken(last)}: images differ from FP32's by {off:.2g} of 255 grey levels on average\n"
        f"images from the same noise   |   their difference from FP32, {amplified} times as bright",
        fontsize=10,
    )


def _spoken(row: Any) -> str:
    """A row's name in a figure."""
    named = {
        "baseline": "FP32",
        "uniform": f"uniform {row.format.upper()}",
        "allocator": f"allocator, {row.threshold}",
    }
    if row.method in named:
        return named[row.method]
    return (
        f"{row.method}{' ' + row.threshold if row.method == 'ratio' else ''}, {row.format.upper()}"
    )


def bars(rows: pd.DataFrame, metric: str) -> np.ndarray:
    """Lengths (2, rows) of the error bars from a value to the ends of its interval."""
    return np.stack(
        [rows[metric] - rows[f"{metric}_low"], rows[f"{metric}_high"] - rows[metric]]
    ).clip(0)
