"""The figures of the claims: Fisher information (02) and the ratio sweep (05), drawn as in
plots.py.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lafq.study.figures.plots import MARKERS, bars
from lafq.study.figures.sentences import FEATURES, mean_inside_range
from lafq.study.poster import BEST_RATIOS, Published

SWEPT = (0.28, 0.5)  # the ratios that the paper swept
KIND = (("format", "{}"), ("granularity", "per {}"))


def fisher_by_tensor(axes: Sequence[Axes], timesteps: pd.DataFrame) -> None:
    """One panel per layer: weight tensors on x, mean Fisher on a log y axis, one line per timestep
    bin.
    """
    bins = sorted(timesteps["t_low"].unique())
    colours = plt.get_cmap("viridis")(np.linspace(0, 1, len(bins)))
    for ax, (layer, rows) in zip(axes, timesteps.groupby("layer"), strict=True):
        names = list(dict.fromkeys(rows["parameter"]))
        for t, colour in zip(bins, colours, strict=True):
            line = rows[rows["t_low"] == t].set_index("parameter").loc[names, "fisher"]
            ax.plot(range(len(names)), line, color=colour, marker=".", lw=1)
        short = [
            name.split(".", 1)[1].removesuffix(".weight").replace("attention", "attn")
            for name in names
        ]
        ax.set_xticks(range(len(names)), short, rotation=60, ha="right", fontsize=9)
        ax.set(title=layer, yscale="log", ylabel="mean Fisher")
    scale = plt.cm.ScalarMappable(plt.Normalize(0, 999), "viridis")
    by_bin = timesteps.pivot(index="parameter", columns="t_low", values="fisher")
    first, end = (by_bin.idxmax(axis=1) == bins[0]).sum(), timesteps["t_high"].min()
    axes[0].figure.suptitle(
        f"Mean Fisher value is highest at t <= {end} in {first} of {len(by_bin)} weight tensors"
    )
    axes[0].figure.colorbar(scale, ax=list(axes), label="timestep t (0 = clean)")


def fisher_by_group(ax: Axes, timesteps: pd.DataFrame) -> None:
    """Mean Fisher per weight of Layers 1-2 and of Layers 3-6, as C2 compares them, by timestep."""
    of_front = timesteps["layer"].isin(["Layer1", "Layer2"])
    named = _with_trace(timesteps).assign(group=np.where(of_front, "Layers 1-2", "Layers 3-6"))
    for name, rows in named.groupby("group"):
        by_time = rows.groupby("t_low")[["trace", "weights"]].sum()
        ax.plot(by_time.index, by_time["trace"] / by_time["weights"], label=name)
    total = named.groupby("group")[["trace", "weights"]].sum()
    front, others = total["trace"] / total["weights"]
    ax.set(
        yscale="log",
        xlabel="timestep t (0 = clean; lower edge of the bin)",
        ylabel="mean Fisher per weight",
    )
    ax.set_title(
        f"Averaged over t, Layers 1-2 have {front / others:.0f} times the others' Fisher "
        f"information per weight"
    )
    ax.legend()


def fisher_map(ax: Axes, timesteps: pd.DataFrame) -> None:
    """Mean Fisher per weight: layers on y, timestep bins on x, log colour scale."""
    named = _with_trace(timesteps)
    total = named.groupby(["layer", "t_low"])[["trace", "weights"]].sum()
    table = (total["trace"] / total["weights"]).unstack()
    norm, bar = LogNorm(table.min().min(), table.max().max()), {"label": "mean Fisher per weight"}
    sns.heatmap(table, ax=ax, norm=norm, cmap="viridis", cbar_kws=bar)
    first = named["t_low"] == named["t_low"].min()
    share, end = named[first]["trace"].sum() / named["trace"].sum(), named[first]["t_high"].iloc[0]
    ax.set(xlabel="timestep t (0 = clean; lower edge of the bin)", ylabel="")
    ax.set_title(f"{share:.0%} of the Fisher information lies at t <= {end}")
    ax.tick_params(axis="y", rotation=0)


def _with_trace(timesteps: pd.DataFrame) -> pd.DataFrame:
    return timesteps.assign(trace=timesteps["fisher"] * timesteps["weights"])


def ratio_sweep(
    ax: Axes,
    table: pd.DataFrame,
    metric: str,
    label: str,
    title: str,
    by: tuple[tuple[str, str], ...] = KIND,
) -> None:
    """A metric over the ratio kept, with its 95 % interval where it has one; the range that the
    paper calls best is shaded, the baseline dashed.

    by: the columns whose values make a line, each with how its value is written in the legend.
    Lines are set apart a little, so that bars do not overlap.
    """
    rows = table[table["method"] == "ratio"]
    rows = rows.assign(ratio=rows["threshold"].astype(float)).sort_values("ratio")
    ax.axvspan(*BEST_RATIOS, color="0.85", label="best in the paper")
    ax.axhline(
        table[table["method"] == "baseline"][metric].iloc[0],
        color="black",
        ls="--",
        lw=1,
        label="FP32 baseline",
    )
    lines = rows.groupby([column for column, _ in by])
    for i, (kind, line) in enumerate(lines):
        low, granularity = line[["format", "granularity"]].iloc[0]
        style = {
            "ls": "-" if granularity == "weight" else ":",
            "marker": MARKERS.get(low, "."),
            "ms": 5,
            "lw": 1.2,
            "capsize": 2,
        }
        lengths = bars(line, metric) if f"{metric}_low" in line else None
        name = ", ".join(write.format(value) for (_, write), value in zip(by, kind, strict=True))
        apart = 0.002 * (i - (len(lines) - 1) / 2)
        ax.errorbar(
            line["ratio"] + apart, line[metric], lengths, **style, elinewidth=0.8, label=name
        )
    ax.set(xlabel="ratio r (share of a layer kept in FP32)", ylabel=label)
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=9)


def many_images_title(table: pd.DataFrame) -> str:
    """The finding of the panel with many images."""
    found = mean_inside_range(table)
    side = f"{abs(found):.2f} {'below' if found < 0 else 'above'}"
    ratios = table[table["method"] == "ratio"]
    lowest = ratios.loc[ratios["fid_mnist"].idxmin(), "threshold"]
    first = f"INT8, N = {table['n_images'].iloc[0]:,}: mean FID of ratios 0.35-0.40"
    return f"{first}\nis {side} the others' mean (lowest FID: ratio {lowest})"


def block_statistics(ax: Axes, table: pd.DataFrame) -> None:
    """On the axes of `ratio_sweep`: mean and standard deviation of a block's difference from the
    baseline, over disjoint blocks.
    """
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


def poster_and_ours(
    ax: Axes, table: pd.DataFrame, published: Sequence[Published], metric: str
) -> None:
    """FID difference from FP32 over the ratio: the poster's sweep, and ours on single weights with
    95 % intervals.

    metric: whose `delta_` is drawn, fid_inception as the poster's or, where there is none,
    fid_mnist.
    """
    ax.axvspan(*BEST_RATIOS, color="0.93", zorder=0, label="best ratios (poster)")
    ax.axhline(0, color="black", ls="--", lw=1, label="FP32")
    sweep = [
        (float(row.threshold), row.fid - published[0].fid, row.source)
        for row in published
        if row.method == "ratio"
    ]
    ax.plot([r for r, _, _ in sweep], [d for _, d, _ in sweep], color="0.35", lw=1)
    for source, face, label in (
        ("poster", "0.35", "poster, other noise in every row"),
        ("poster's plot", "white", "read off its plot"),
    ):
        points = [(r, d) for r, d, s in sweep if s == source]
        ax.plot(*zip(*points, strict=True), "D", ms=6, color="0.35", mfc=face, label=label)
    rows = table[(table["method"] == "ratio") & (table["granularity"] == "weight")]
    rows = rows[rows["threshold"].astype(float).between(*SWEPT)].assign(
        ratio=rows["threshold"].astype(float)
    )
    for i, (low, line) in enumerate(rows.groupby("format")):
        line, style = (
            line.sort_values("ratio"),
            {"marker": MARKERS[low], "ms": 5, "lw": 1.2, "capsize": 3},
        )
        lengths = bars(line, f"delta_{metric}")
        ax.errorbar(
            line["ratio"] + 0.001 * i,
            line[f"delta_{metric}"],
            lengths,
            **style,
            label=f"ours, {low.upper()}, the same noise",
        )
    ours, theirs = rows[f"delta_{metric}"].abs().max(), max(abs(d) for _, d, _ in sweep)
    ax.set_title(
        f"From the same noise, no ratio moves FID by more than {ours:.2f}; the poster's move it by "
        f"up to {theirs:.1f}"
    )
    features = FEATURES[metric]
    at_n = f"N = {table['n_images'].iloc[0]}; ours: {table['steps'].iloc[0]:,} sampling steps"
    ax.set(
        xlabel="ratio r (share of a layer kept in FP32)",
        ylabel=f"FID difference from FP32 (positive: worse)\n{features}, {at_n}",
    )
    ax.legend(fontsize=9)


def claim_by_run(ax: Axes, claims: pd.DataFrame, over: pd.DataFrame) -> None:
    """C3 in every training run and over all: mean FID of the ratios in 0.35-0.40 minus that of the
    others, 95 % intervals.

    claims: evidence_runs_claims; over: evidence_runs_over.
    """
    runs, [mean] = claims[claims["claim"] == "C3"], over[over["claim"] == "C3"].itertuples()
    ax.axhline(0, color="black", ls="--", lw=1)
    lengths = np.stack([runs["measured"] - runs["low"], runs["high"] - runs["measured"]])
    ax.errorbar(range(len(runs)), runs["measured"], lengths, fmt="s", capsize=3, label="one run")
    ends = [[mean.measured - mean.low], [mean.high - mean.measured]]
    ax.errorbar(
        [len(runs)],
        [mean.measured],
        ends,
        fmt="D",
        color="black",
        capsize=3,
        label="mean of the runs",
    )
    ax.set_xticks(range(len(runs) + 1), [*(f"seed {seed}" for seed in runs["seed"]), "mean"])
    ax.set(ylabel="mean FID, 0.35-0.40 minus others\n(MNIST features, N = 100)")
    said = f"mean {mean.measured:+.2f} [{mean.low:+.2f}, {mean.high:+.2f}], {mean.verdict}"
    ax.set_title(
        f"C3 in {len(runs)} training runs of {runs['steps'].iloc[0]:,} steps:\n{said}", fontsize=10
    )
    ax.legend(fontsize=9)


def evidence_figure(many: pd.DataFrame, claims: pd.DataFrame, over: pd.DataFrame) -> Figure:
    """The ratio sweep with many images per row and in blocks of the poster's size (left), and C3 by
    training run (right).
    """
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.8))
    label = f"FID difference from FP32\n(MNIST features, N = {many['n_images'][0]:,})"
    ratio_sweep(axes[0], many, "delta_fid_mnist", label, many_images_title(many), KIND)
    block_statistics(axes[0], many)
    claim_by_run(axes[1], claims, over)
    return figure
