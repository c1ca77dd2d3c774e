"""The figures of 02_fisher, drawn as in plots.py."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm


def fisher_by_tensor(axes: Sequence[Axes], timesteps: pd.DataFrame) -> None:
    """One panel per layer: weight tensors on x, mean Fisher on a log y axis, one line per timestep bin."""
    bins = sorted(timesteps["t_low"].unique())
    colours = plt.get_cmap("viridis")(np.linspace(0, 1, len(bins)))
    for ax, (layer, rows) in zip(axes, timesteps.groupby("layer"), strict=True):
        names = list(dict.fromkeys(rows["parameter"]))
        for t, colour in zip(bins, colours, strict=True):
            line = rows[rows["t_low"] == t].set_index("parameter").loc[names, "fisher"]
            ax.plot(range(len(names)), line, color=colour, marker=".", lw=1)
        short = [name.split(".", 1)[1].removesuffix(".weight").replace("attention", "attn") for name in names]
        ax.set_xticks(range(len(names)), short, rotation=60, ha="right", fontsize=9)
        ax.set(title=layer, yscale="log", ylabel="mean Fisher")
    scale = plt.cm.ScalarMappable(plt.Normalize(0, 999), "viridis")
    axes[0].figure.colorbar(scale, ax=list(axes), label="timestep t (0 = clean)")


def fisher_by_group(ax: Axes, timesteps: pd.DataFrame) -> None:
    """Mean (solid) and median (dashed) over the weight tensors of Layer 1-2 and of Layer 3-6, by timestep."""
    group = np.where(timesteps["layer"].isin(["Layer1", "Layer2"]), "Layer 1-2", "Layer 3-6")
    by_time = timesteps.assign(group=group).groupby(["group", "t_low"])["fisher"].agg(["mean", "median"])
    for colour, name in zip(sns.color_palette(), ("Layer 1-2", "Layer 3-6"), strict=False):
        for statistic, style in (("mean", "-"), ("median", "--")):
            ax.plot(by_time.loc[name].index, by_time.loc[name, statistic], style, color=colour, label=f"{name}, {statistic}")
    ax.set(yscale="log", xlabel="timestep t (0 = clean; lower edge of the bin)", ylabel="Fisher of the weight tensors")
    ax.set_title("Fisher information by group")
    ax.legend()


def fisher_map(ax: Axes, timesteps: pd.DataFrame) -> None:
    """Mean Fisher per weight: layers on y, timestep bins on x, log colour scale."""
    total = (
        timesteps.assign(total=timesteps["fisher"] * timesteps["weights"]).groupby(["layer", "t_low"])[["total", "weights"]].sum()
    )
    table = (total["total"] / total["weights"]).unstack()
    sns.heatmap(table, ax=ax, norm=LogNorm(table.min().min(), table.max().max()), cmap="viridis", cbar_kws={"label": "mean Fisher"})
    ax.set(xlabel="timestep t (0 = clean; lower edge of the bin)", ylabel="", title="Mean Fisher information per weight")
    ax.tick_params(axis="y", rotation=0)
