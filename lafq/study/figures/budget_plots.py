"""The figures of the study of budgets: by size, rules at equal size, bits by tensor, scores."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator

from lafq.study.figures import text
from lafq.study.figures.fisher_plots import short_name
from lafq.study.figures.plots import COLOURS, LINES, WORSE, bars, labelled

SIZES = {"mem_mib": "MiB in memory", "file_mib": "MiB of the file"}
GRANULARITIES = {"tensor": "one format per tensor", "channel": "one format per channel"}
GRANULARITIES["mixed"] = "per channel, single FP16 weights"
ROUNDED = {"nearest": {"marker": "o", "mfc": "white"}, "feedback": {"marker": "s"}}
ROUNDED["tuned"] = {"marker": "*", "ms": 10}
KIND = ["rule", "granularity", "rounding"]
UNIFORM, ALLOCATOR = ("uniform", "tensor", "nearest"), ("allocate", "mixed", "feedback")
TUNED = ("allocate", "mixed", "tuned")
BY_DAMAGE = (UNIFORM, *((rule, "weight", "feedback") for rule in ("global", "ratio")), ALLOCATOR)
BY_FID = (UNIFORM, ALLOCATOR, TUNED)
VARIANTS = ("uniform", "tensor", "feedback"), ("allocate", "mixed", "nearest")
VARIANTS += ("allocate", "tensor", "feedback"), ALLOCATOR, TUNED


def chosen(table: pd.DataFrame, kinds: Sequence[tuple[str, str, str]]) -> pd.DataFrame:
    """The rows of these kinds, each a rule, a granularity and a rounding."""
    return table[pd.MultiIndex.from_frame(table[KIND]).isin(kinds)]


def over_size(ax: Axes, table: pd.DataFrame, metric: str, size: str = "mem_mib") -> None:
    """Damage or fid_mnist_delta over MiB; hollow: rounded to the nearest code; a star: tuned."""
    rows = table[table[metric].notna()]
    several = rows.groupby("rule")["granularity"].nunique() > 1
    for _, line in rows.groupby([rows["format"] == "coded", *KIND], sort=False):
        line, row = line.sort_values(size), line.iloc[0]
        style = {"label": text.name(row), "color": COLOURS[row["rule"]], "capsize": 2, "lw": 1.2}
        style |= {"ms": 5, "elinewidth": 0.8} | ROUNDED[row["rounding"]]
        if row["format"] == "coded":
            style |= {"marker": "D", "ls": "-"}
        else:
            style["ls"] = LINES[row["granularity"]]
            if several[row["rule"]]:
                style["label"] += f", {GRANULARITIES[row['granularity']]}"
        ax.errorbar(line[size], line[metric], bars(line, metric), **style)
    ax.set_xscale("log")
    if metric == "damage":
        ax.set_yscale("log")
        labelled(ax, "Damage by size", SIZES[size], "damage (mean squared change of the output)")
    else:
        ax.axhline(0, color="black", ls="--", lw=1)
        ax.set_yscale("symlog", linthresh=1)
        ax.set_ylim(-10, 2000)
        ax.yaxis.set_major_formatter("{x:,.0f}")
        labelled(ax, "FID difference by size", SIZES[size], WORSE)
    ax.xaxis.set_major_formatter("{x:.2g}")
    ax.xaxis.set_minor_formatter("{x:.2g}")
    ax.tick_params(axis="x", which="both", labelsize=8)


def ring(ax: Axes, rows: pd.DataFrame, metric: str, size: str, label: str) -> None:
    """Rings around the points of some rows."""
    ax.plot(rows[size], rows[metric], "o", ms=13, mfc="none", mec="black", label=label)
    ax.legend(fontsize=9)


def rules(ax: Axes, table: pd.DataFrame, wide: pd.DataFrame | None) -> None:
    """Damage of every threshold rule over that of the global one; wide: at the poster's size."""
    table = _over_global(table)
    names = table["rule"].unique().tolist()
    drawn = {f"{bits:g}": rows for bits, rows in table.groupby("budget_bits")}
    colours = [*sns.color_palette("viridis", len(drawn)), "0.4"]
    if wide is not None:
        budgets = _over_global(wide).groupby("budget_bits")
        drawn |= {f"{bits:g}, width 64": rows for bits, rows in budgets}
    for i, ((label, rows), marker) in enumerate(zip(drawn.items(), "osv^D", strict=False)):
        at = [names.index(rule) + 0.13 * (i - (len(drawn) - 1) / 2) for rule in rows["rule"]]
        style = {"fmt": marker, "color": colours[i], "ms": 5, "capsize": 2, "label": label}
        ax.errorbar(rows["over_global"], at, xerr=bars(rows, "over_global"), **style)
    ax.axvline(1, color="black", ls="--", lw=1)
    ax.set_yticks(range(len(names)), names)
    ax.set(xscale="log", xlabel="damage divided by that of global (above 1: worse)")
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.set_title("Damage of the rules at equal size")
    ax.legend(title="bits per weight", loc="center left", bbox_to_anchor=(1, 0.5))


def _over_global(table: pd.DataFrame) -> pd.DataFrame:
    return table.query("over_global.notna() and rule != 'global' and rounding == 'feedback'")


def bits_map(axes: Sequence[Axes], report: pd.DataFrame) -> None:
    """Mean Fisher value and bits per weight of every weight tensor (`damage.bits_by_tensor`)."""
    names = report["parameter"].unique().tolist()
    fisher = report.drop_duplicates("parameter")["fisher"]
    axes[0].bar(np.arange(len(names)) + 0.5, fisher, color="0.4")
    axes[0].set(yscale="log", ylabel="mean F (Fisher)", xlim=(0, len(names)), xticks=[])
    axes[0].set_title("Fisher value and allocated bits of every weight tensor")
    grid = report.pivot(index="budget_bits", columns="parameter", values="bits_per_weight")[names]
    bar = {"label": "bits per weight", "ticks": [2, 3, 4, 6, 8, 16, 32], "format": "{x:.0f}"}
    drawn = {"cmap": "viridis", "annot": True, "fmt": ".2g", "annot_kws": {"size": 8}}
    sns.heatmap(grid, ax=axes[1], norm=LogNorm(2, 32), cbar_kws=bar | {"pad": 0.01}, **drawn)
    axes[1].collections[0].colorbar.minorticks_off()
    short = [short_name(name) for name in names]
    axes[1].set_xticks(np.arange(len(names)) + 0.5, short, rotation=75, ha="right", fontsize=8)
    axes[1].tick_params(axis="y", rotation=0)
    axes[1].set(xlabel="", ylabel="budget (bits per weight)")


def predictions(axes: Sequence[Axes], points: pd.DataFrame) -> None:
    """One panel per score: measured damage over it, one point per tensor and format; log axes."""
    axes = list(axes)
    scores = points.columns[points.columns.get_loc("measured") + 1 :]
    for ax, score in zip(axes, scores, strict=True):
        formats = points.groupby("format", sort=False)
        for colour, (low, rows) in zip(sns.color_palette(), formats, strict=False):
            ax.scatter(rows[score], rows["measured"], s=14, color=colour, label=low)
        if "x error" in score:  # in the unit of damage
            ends = [points[score].min(), points[score].max()]
            ax.plot(ends, ends, color="black", ls="--", lw=1, label="equal")
        ax.set(xscale="log", yscale="log", xlabel=score)
        ax.xaxis.set_major_locator(LogLocator(numticks=5))
    axes[0].figure.suptitle("Measured damage by six scores")
    axes[0].set_ylabel("measured damage")
    axes[0].legend(fontsize=8)
