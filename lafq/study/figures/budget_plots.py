"""The figures of the study of budgets: by size, rules at equal size, bits by tensor, scores."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from lafq.study.diffusion.subject import layer_of
from lafq.study.figures import text
from lafq.study.figures.plots import COLOURS, LINES, bars, labelled

SIZES = {"mem_mib": "MiB in memory", "file_mib": "MiB of the file"}
GRANULARITIES = {"tensor": "one format per tensor", "channel": "one format per channel"}
GRANULARITIES["mixed"] = "per channel, single FP16 weights"
ROUNDED = {"nearest": {"marker": "o", "mfc": "white"}, "feedback": {"marker": "s"}}
ROUNDED["tuned"] = {"marker": "*", "ms": 10}
KIND = ["rule", "granularity", "rounding"]
UNIFORM, ALLOCATOR = ("uniform", "tensor", "nearest"), ("allocate", "mixed", "feedback")
EVEN, TUNED = ("uniform", "tensor", "feedback"), ("allocate", "mixed", "tuned")
BY_DAMAGE = UNIFORM, EVEN, *((r, "weight", "feedback") for r in ("global", "ratio")), ALLOCATOR
VARIANTS = EVEN, ("allocate", "mixed", "nearest"), ("allocate", "tensor", "feedback")
VARIANTS += ALLOCATOR, TUNED

# The methods whose images are compared, and how they are drawn.
NEAR: dict[str, dict[str, Any]] = {
    "whole sampler, alike": {"color": COLOURS["allocate"], "ls": "--"},
    "noised digits": {"color": COLOURS["allocate"]},
    **{rule: {"color": COLOURS[rule]} for rule in ("global", "group", "ratio")},
    "uniform, error feedback": {"color": COLOURS["uniform"], "ls": ":"},
    "uniform": {"color": COLOURS["uniform"], "ls": ":"} | ROUNDED["nearest"],
}


def chosen(table: pd.DataFrame, kinds: Sequence[tuple[str, str, str]]) -> pd.DataFrame:
    """The rows of these kinds, each a rule, a granularity and a rounding."""
    return table[pd.MultiIndex.from_frame(table[KIND]).isin(kinds)]


def over_size(ax: Axes, table: pd.DataFrame, title: str, size: str = "mem_mib") -> None:
    """Damage over MiB; hollow: rounded to the nearest code; a star: tuned."""
    several = table.groupby("rule")["granularity"].nunique() > 1
    for _, line in table.groupby([table["format"] == "coded", *KIND], sort=False):
        line, row = line.sort_values(size), line.iloc[0]
        style = {"label": text.name(row), "color": COLOURS[row["rule"]], "capsize": 2, "lw": 1.2}
        style |= {"ms": 5, "elinewidth": 0.8} | ROUNDED[row["rounding"]]
        if row["format"] == "coded":
            style |= {"marker": "D", "ls": "-"}
        else:
            style["ls"] = LINES[row["granularity"]]
            if several[row["rule"]]:
                style["label"] += f", {GRANULARITIES[row['granularity']]}"
        ax.errorbar(line[size], line["damage"], bars(line, "damage"), **style)
    ax.set(xscale="log", yscale="log")
    labelled(ax, title, SIZES[size], "damage (mean squared change of the output)")
    for show in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        show("{x:.2g}")
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


def nearness(ax: Axes, table: pd.DataFrame) -> None:
    """PSNR of images to FP32's over MiB, by the methods of NEAR (results/benchmarks/sampling)."""
    table = table[~table["size"].str.startswith("file")]
    for name, style in NEAR.items():
        rows = table[table["sensitivity"] == name].sort_values("mib")
        style = {"capsize": 2, "ms": 5, "lw": 1.2, "marker": "s"} | style
        style["label"] = text.METHODS.get(name, name)
        ax.errorbar(rows["mib"], rows["image_psnr"], bars(rows, "image_psnr"), **style)
    labelled(ax, "Nearness of the images by size", SIZES["mem_mib"], "PSNR to FP32's images (dB)")


def bits_by_fisher(ax: Axes, report: pd.DataFrame, budgets: Sequence[float]) -> None:
    """Bits per weight of every weight tensor over its mean Fisher value (`damage.bits_by_tensor`),
    at some budgets; a point is the number of the tensor's layer. Dashed: half a bit per doubling.
    """
    layers = report["parameter"].map(layer_of).str.removeprefix("Layer")
    for budget, colour in zip(budgets, sns.color_palette("viridis", len(budgets)), strict=True):
        at = np.isclose(report["budget_bits"], budget)
        for layer, rows in report[at].groupby(layers[at]):
            style = {"marker": f"${layer}$", "s": 50, "color": colour, "lw": 0.3}
            ax.scatter(rows["fisher"], rows["bits_per_weight"], **style)
        ax.scatter([], [], color=colour, label=f"budget of {budget:g} bits")
    f = report["fisher"].sort_values()
    middle = report[np.isclose(report["budget_bits"], budgets[len(budgets) // 2])].median(
        numeric_only=True
    )
    line = middle["bits_per_weight"] + 0.5 * np.log2(f / middle["fisher"])
    ax.plot(f, line, color="black", ls="--", lw=1, label="half a bit per doubling")
    ax.set(xscale="log", ylim=(1.5, 20))
    labelled(ax, "Bits by Fisher value", "mean Fisher value of the tensor", "bits per weight")


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
