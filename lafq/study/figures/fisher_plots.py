"""The figures of the Fisher information by weight tensor, layer and timestep (02)."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

TRUE = "Monte Carlo, noised digits"
TIME = "timestep t (0 = clean; lower edge of the bin)"


def fisher_by_tensor(axes: Sequence[Axes], timesteps: pd.DataFrame) -> None:
    """One panel per layer: mean Fisher of its weight tensors, one line per timestep bin."""
    bins = sorted(timesteps["t_low"].unique())
    colours = plt.get_cmap("viridis")(np.linspace(0, 1, len(bins)))
    for ax, (layer, rows) in zip(axes, timesteps.groupby("layer"), strict=True):
        names = list(dict.fromkeys(rows["parameter"]))
        for t, colour in zip(bins, colours, strict=True):
            line = rows[rows["t_low"] == t].set_index("parameter").loc[names, "fisher"]
            ax.plot(range(len(names)), line, color=colour, marker=".", lw=1)
        short = [short_name(name).split(".", 1)[1] for name in names]
        ax.set_xticks(range(len(names)), short, rotation=90, fontsize=10)
        ax.set(title=layer, yscale="log")
        ax.tick_params(axis="y", labelsize=10)
    scale = plt.cm.ScalarMappable(plt.Normalize(0, 999), "viridis")
    axes[0].figure.suptitle("Mean Fisher value by weight tensor and timestep")
    axes[0].figure.supylabel("mean Fisher value")
    axes[0].figure.colorbar(scale, ax=list(axes), label="timestep t (0 = clean)")


def fisher_map(ax: Axes, timesteps: pd.DataFrame) -> None:
    """Mean Fisher per weight: layers on y, timestep bins on x, log colour scale."""
    table = _per_weight(timesteps)
    norm, bar = LogNorm(table.min().min(), table.max().max()), {"label": "mean Fisher per weight"}
    sns.heatmap(table, ax=ax, norm=norm, cmap="viridis", cbar_kws=bar)
    ax.set(xlabel=TIME, ylabel="", title="Fisher information per weight by layer and timestep")
    ax.tick_params(axis="y", rotation=0)


def fisher_and_images(
    ax: Axes, empirical: pd.DataFrame, kinds: pd.DataFrame, responses: pd.DataFrame
) -> None:
    """Fisher information and the images' response by timestep, each over its mean; responses:
    columns image, t, response.
    """
    true = kinds[kinds["kind"] == TRUE].merge(empirical[["parameter", "weights"]].drop_duplicates())
    for name, table in {"empirical Fisher": empirical, "true Fisher": true}.items():
        line = (table["fisher"] * table["weights"]).groupby(table["t_low"]).mean()
        ax.plot(line.index, line / line.mean(), "--", label=name)
    by_t = responses.groupby("t")["response"]
    for name, line in {
        "image error, mean": by_t.mean(),
        "image error, median": by_t.median(),
    }.items():
        ax.plot(line.index, line / line.mean(), "o-", ms=4, label=name)
    ax.axhline(1, color="0.7", lw=1)
    ax.set(yscale="log", xlabel="timestep t (0 = clean)", ylabel="relative to the mean over t")
    ax.set_title("Fisher information and image error by timestep")
    ax.legend(fontsize=9)


def short_name(parameter: str) -> str:
    """A weight tensor's name as it stands at an axis."""
    return parameter.removesuffix(".weight").replace("attention", "attn")


def _per_weight(timesteps: pd.DataFrame) -> pd.DataFrame:
    """Mean Fisher value per weight, layers down and timestep bins across."""
    traced = timesteps.assign(trace=timesteps["fisher"] * timesteps["weights"])
    total = traced.groupby(["layer", "t_low"])[["trace", "weights"]].sum()
    return (total["trace"] / total["weights"]).unstack()
