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
    by_bin = timesteps.pivot(index="parameter", columns="t_low", values="fisher")
    first, end = (by_bin.idxmax(axis=1) == bins[0]).sum(), timesteps["t_high"].min()
    axes[0].figure.suptitle(f"Mean Fisher value is highest at t <= {end} in {first} of {len(by_bin)} weight tensors")
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
    ax.set(yscale="log", xlabel="timestep t (0 = clean; lower edge of the bin)", ylabel="mean Fisher per weight")
    ax.set_title(f"Averaged over t, Layers 1-2 have {front / others:.0f} times the others' Fisher information per weight")
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
