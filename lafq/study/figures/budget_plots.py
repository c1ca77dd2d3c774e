"""The figures of the study of budgets, drawn as in plots.py."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator

from lafq.study.damage import PROXIES
from lafq.study.figures.plots import bars
from lafq.study.figures.tables import CODED, FEEDBACK, with_rounding

CODED_RATE = 3.0  # bits per weight of the file
NAMED = {
    "allocator": "D",
    "allocator, tuned": "*",
    "allocator, nearest code": "x",
    "allocator, all weights": "P",
    CODED: "o",
    "uniform": "s",
    "global": "v",
    "ratio": "^",
}
COLOURED = (
    *("uniform", "allocator", "global", "ratio", "allocator, tuned", "allocator, nearest code"),
    *("allocator, all weights", CODED),
)
SPOKEN = {
    "tensor": "one format per tensor",
    "channel": "one format per channel",
    "mixed": "per channel, single FP16 or FP32 weights",
}
SHADES = {"tensor": 0.4, "channel": 0.7}
STYLES = {"tensor": ":", "channel": "--", "mixed": "-", "weight": "-"}


ALLOCATOR = ("allocator", "mixed")
UNIFORM = ("uniform", "tensor")
BY_DAMAGE = (
    UNIFORM,
    (f"global, {FEEDBACK}", "weight"),
    (f"ratio, {FEEDBACK}", "weight"),
    ALLOCATOR,
)
BY_FID = (UNIFORM, ALLOCATOR, ("allocator, tuned", "mixed"))
VARIANTS = (
    (f"uniform, {FEEDBACK}", "tensor"),
    ("allocator, nearest code", "mixed"),
    ("allocator", "tensor"),
    ALLOCATOR,
    ("allocator, tuned", "mixed"),
)
SIZES = {"mem_mib": "MiB in memory", "file_mib": "MiB of the file"}
TITLE_BITS, EXTREMES = 4.0, 10


def chosen(table: pd.DataFrame, kinds: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """The rows of `damage.measure_damage` of these kinds, each a method and a granularity."""
    return table[
        pd.Series(
            list(zip(table["method"], table["granularity"], strict=True)), index=table.index
        ).isin(kinds)
    ]


def finding(table: pd.DataFrame) -> str:
    """The title of the main figure."""
    damage = _at_title_bits(table)
    parts = [
        f"1/{damage[f'{rule}, {FEEDBACK}', 'weight'] / damage[ALLOCATOR]:,.0f} of {rule}'s"
        for rule in ("global", "ratio")
    ]
    said = f"At {TITLE_BITS:g} bits per weight the allocator does {' and '.join(parts)} damage"
    return f"{said}\n(error feedback in all but uniform)"


def finding_of_fid(table: pd.DataFrame) -> str:
    """The title of the panel with FID."""
    near = table[
        (table["budget_bits"].sub(TITLE_BITS).abs() < 0.1) & table["fid_mnist_delta"].notna()
    ]
    at = near.groupby(["method", "granularity"])["fid_mnist_delta"].first()
    return (
        f"FID rise at {TITLE_BITS:g} bits per weight: {at[ALLOCATOR]:.1f} (allocator), "
        f"{at[UNIFORM]:.0f} (uniform)\n"
        f"(MNIST features, N = {table['n_images'].max():,.0f}; log axis outside ±1)"
    )


def mark_compared(ax: Axes, table: pd.DataFrame) -> None:
    """Rings around the two rows that `finding_of_coded` compares."""
    coded = table[(table["method"] == CODED) & np.isclose(table["budget_bits"], CODED_RATE)]
    int8 = table[(table["method"] == "uniform") & table["over_int8"].eq(1)]
    rows = pd.concat([coded, int8])
    ax.plot(
        rows["file_mib"],
        rows["damage"],
        "o",
        ms=13,
        mfc="none",
        mec="black",
        ls="",
        label="compared in the title",
    )


def finding_of_variants(table: pd.DataFrame) -> str:
    """The title of the figure of variants."""
    damage = _at_title_bits(table)
    nearest, by_tensor = damage["allocator, nearest code", "mixed"], damage["allocator", "tensor"]
    return (
        f"At {TITLE_BITS:g} bits per weight nearest code multiplies the allocator's damage by "
        f"{nearest / damage[ALLOCATOR]:.1f}, "
        f"one format per tensor by {by_tensor / damage[ALLOCATOR]:.1f}"
    )


def finding_of_coded(table: pd.DataFrame) -> str:
    """The title of the figure of entropy-coded weights: the share of uniform INT8's damage in the
    file of three bits per weight.
    """
    row = table[(table["method"] == CODED) & np.isclose(table["budget_bits"], CODED_RATE)]
    if row.empty:
        return "Damage by size of the file"
    int8 = table[(table["method"] == "uniform") & table["over_int8"].eq(1)]["file_mib"].item()
    over, size = row["over_int8"].item(), row["file_mib"].item()
    return f"Entropy-coded, {size:.2f} MiB: {over:.2f} times the damage of uniform INT8, {int8:.2f} MiB"


def _at_title_bits(table: pd.DataFrame) -> pd.Series:
    return table[np.isclose(table["budget_bits"], TITLE_BITS)].set_index(["method", "granularity"])[
        "damage"
    ]


def predictions(axes: Sequence[Axes], points: pd.DataFrame, ranks: pd.DataFrame) -> None:
    """One panel per prediction: measured damage over it, one point per tensor and format; log axes.

    The title has the lowest and highest rank correlation within a format: over all formats the
    number of bits alone makes it high.
    """
    within = ranks.set_index("prediction").drop(columns="all formats")
    axes = list(axes)
    for ax, proxy in zip(axes, PROXIES, strict=True):
        for colour, (low, rows) in zip(
            sns.color_palette(), points.groupby("format", sort=False), strict=False
        ):
            ax.scatter(rows[proxy], rows["measured"], s=14, color=colour, label=low)
        if proxy == PROXIES[0]:
            ends = [points[proxy].min(), points[proxy].max()]
            ax.plot(ends, ends, color="black", ls="--", lw=1, label="equal")
        lowest, highest = within.loc[proxy].min(), within.loc[proxy].max()
        title = f"rank correlation in a format:\n{lowest:.2f} to {highest:.2f}"
        ax.set(xscale="log", yscale="log", xlabel=proxy, title=title)
        ax.xaxis.set_major_locator(LogLocator(numticks=5))
    best = " and ".join(f'"{name}"' for name in within.index[within.min(axis=1) > 0.95])
    if best:
        said = f"Within a format, {best} order the tensors like the measured damage"
        least = within.loc[within.min(axis=1) > 0.95].min().min()
        axes[0].figure.suptitle(f"{said} (rank correlation at least {least:.2f})")
    axes[0].set_ylabel("measured damage")
    axes[0].legend(fontsize=8)


def over_size(
    ax: Axes, table: pd.DataFrame, metric: str, label: str, size: str = "mem_mib"
) -> None:
    """A number of every row with its 95 % interval over MiB, stored or of the file, one line per
    (method, granularity).

    Rows without the number are left out. Coarser granularities of one method are paler. A method
    has one colour in each rounding;
    hollow markers: rounded to the nearest code.
    """
    rows = table[table[metric].notna()]
    colours = dict(zip(COLOURED, sns.color_palette(n_colors=len(COLOURED)), strict=True))
    counts = table.groupby("method")["granularity"].nunique()
    for (method, granularity), line in rows.groupby(["method", "granularity"], sort=False):
        line = line.sort_values(size)
        shade = SHADES.get(granularity, 1) if counts[method] > 1 else 1
        colour = tuple(
            1 - shade * (1 - part) for part in colours[method.removesuffix(f", {FEEDBACK}")]
        )
        style = {
            "marker": NAMED.get(method.removesuffix(f", {FEEDBACK}"), "."),
            "ls": STYLES[granularity],
            "color": colour,
            "ms": 4,
            "lw": 1.2,
            "capsize": 2,
        }
        rounded = with_rounding(method)
        style["mfc"] = "white" if rounded.endswith("nearest code") else colour
        label_of_line = f"{rounded}, {SPOKEN[granularity]}" if counts[method] > 1 else rounded
        ax.errorbar(
            line[size],
            line[metric],
            bars(line, metric),
            **style,
            elinewidth=0.8,
            label=label_of_line,
        )
    ax.set(xlabel=SIZES[size], ylabel=label, xscale="log")
    ax.xaxis.set_major_formatter("{x:.2g}")
    ax.xaxis.set_minor_formatter("{x:.2g}")
    ax.tick_params(axis="x", which="both", labelsize=8)


def rules(ax: Axes, table: pd.DataFrame, wide: pd.DataFrame | None) -> None:
    """Damage of every threshold rule over that of the global one, with its interval: one row per
    rule, one marker per budget.

    table: `damage.measure_damage`; wide: the same at the poster's size, at one budget.
    """
    drawn = {f"{bits:g} bits": rows for bits, rows in _over_global(table).groupby("budget_bits")}
    colours = [*sns.color_palette("viridis", len(drawn)), "0.4"]
    if wide is not None:
        drawn |= {
            f"{bits:g} bits, width 64": rows
            for bits, rows in _over_global(wide).groupby("budget_bits")
        }
    names = list(dict.fromkeys(_over_global(table)["rule"]))
    for i, ((label, rows), marker) in enumerate(zip(drawn.items(), "osv^D", strict=False)):
        at = [names.index(rule) + 0.13 * (i - (len(drawn) - 1) / 2) for rule in rows["rule"]]
        style = {"fmt": marker, "color": colours[i], "ms": 5, "capsize": 2, "label": label}
        ax.errorbar(rows["over_global"], at, xerr=bars(rows, "over_global"), **style)
    ax.axvline(1, color="black", ls="--", lw=1)
    least = min(rows["over_global_low"].min() for rows in drawn.values())
    ax.set_yticks(range(len(names)), names)
    ax.set(
        xscale="log",
        xlabel="damage divided by that of global, at equal bytes (above 1: worse)",
        ylim=(len(names) - 0.5, -0.5),
    )
    ax.xaxis.set_major_formatter("{x:,g}")
    said = f"Every other rule does more damage than global at each size (all intervals above {np.floor(10 * least) / 10:.1f})"
    ax.set_title(said if least > 1 else "Damage of the rules at equal size")
    ax.legend(title="bits per weight", loc="center left", bbox_to_anchor=(1, 0.5))


def _over_global(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of rules with error feedback but for the global one's."""
    rows = table[
        table["method"].str.endswith(FEEDBACK)
        & table["over_global"].notna()
        & ~table["method"].str.startswith("global")
    ]
    return rows.assign(rule=rows["method"].str.removesuffix(f", {FEEDBACK}"))


def bits_map(axes: Sequence[Axes], report: pd.DataFrame) -> None:
    """Above, the mean Fisher value of every weight tensor; below, the bits per weight it got at
    each budget.

    report: columns parameter, fisher, bits_per_weight, budget_bits.
    """
    names = list(dict.fromkeys(report["parameter"]))
    fisher = report.drop_duplicates("parameter").set_index("parameter").loc[names, "fisher"]
    axes[0].bar(np.arange(len(names)) + 0.5, fisher, color="0.4")
    axes[0].set(yscale="log", ylabel="mean F (Fisher)", xlim=(0, len(names)), xticks=[])
    grid = report.pivot(index="budget_bits", columns="parameter", values="bits_per_weight")[names]
    ordered, at = fisher.sort_values().index, grid.index[np.abs(grid.index - TITLE_BITS).argmin()]
    least, most = (
        grid.loc[at, list(some)].mean() for some in (ordered[:EXTREMES], ordered[-EXTREMES:])
    )
    axes[0].set_title(
        f"Allocator at {at:g} bits per weight: the {EXTREMES} tensors of highest mean Fisher value "
        f"get {most:.1f} bits on average, "
        f"the {EXTREMES} of lowest {least:.1f}"
    )
    norm, bar = (
        LogNorm(2, 32),
        {
            "label": "bits per weight",
            "ticks": [2, 3, 4, 6, 8, 16, 32],
            "format": "{x:.0f}",
            "pad": 0.01,
        },
    )
    sns.heatmap(
        grid,
        ax=axes[1],
        norm=norm,
        cmap="viridis",
        annot=True,
        fmt=".1f",
        annot_kws={"size": 6},
        cbar_kws=bar,
    )
    axes[1].collections[0].colorbar.minorticks_off()
    short = [name.removesuffix(".weight").replace("attention", "attn") for name in names]
    axes[1].set_xticks(np.arange(len(names)) + 0.5, short, rotation=75, ha="right", fontsize=8)
    axes[1].tick_params(axis="y", rotation=0)
    axes[1].set(xlabel="", ylabel="budget (bits per weight)")
