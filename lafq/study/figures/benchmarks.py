"""What the benchmarks show, as tables and sentences."""

import numpy as np
import pandas as pd

MANY_PASSES, FEW_PASSES = 64, (2, 4, 8, 16, 32)
FOUR = "shrunk, 4 draws"
PER_BIT = 6.0  # decibels
OURS = "lafq, uniform"


def passes_table(table: pd.DataFrame) -> pd.DataFrame:
    """results/benchmarks/passes.csv as it is shown: damage over uniform INT4's, shrunk estimates
    and, in brackets, plain means.
    """
    mean = (
        table.groupby(["network", "passes", "estimates"], sort=False)["over_uniform"]
        .mean()
        .unstack("estimates")
    )
    cells = mean["shrunk"].map("{:.2g}".format) + " (" + mean["plain"].map("{:.2g}".format) + ")"
    return (
        cells.unstack("network")
        .loc[:, table["network"].unique()]
        .rename_axis(columns=None)
        .reset_index()
    )


def fisher_cost(table: pd.DataFrame) -> pd.DataFrame:
    """The benchmark of Fisher methods as it is shown."""
    digits = {"cost_ratio": "{:.2f}", "relative_error": "{:.2g}"}
    return table.assign(**{c: table[c].map(f.format) for c, f in digits.items()})


def running_table(table: pd.DataFrame) -> pd.DataFrame:
    """results/benchmarks/running.csv as it is shown."""
    digits = {
        "mem_mib": "{:.2f}",
        "damage": "{:.2g}",
        "time_batch_1": "{:.2f}",
        "time_batch_100": "{:.2f}",
    }
    return table.assign(**{c: table[c].map(f.format) for c, f in digits.items()})


def peers_table(table: pd.DataFrame, weights: str) -> pd.DataFrame:
    """The allocator's damage over each library's at its bytes, and these as a share of FP32's, one
    column per number of bits.

    weights: "all", or "shared" for the allocator that may quantize only what the library did.
    """
    known = table[table["damage"].notna()]
    over = [known[f"over_{weights}{end}"].map("{:.2g}".format) for end in ("", "_low", "_high")]
    cells = (
        over[0]
        + " ["
        + over[1]
        + ", "
        + over[2]
        + "] at "
        + known["mem_share"].map("{:.1%}".format)
    )
    library = (known["library"] + " " + known["version"].fillna("")).str.strip()
    shown = known.assign(cell=cells, library=library, bits=known["bits"].astype(str) + " bits")
    wide = shown.pivot(index=["width", "library"], columns="bits", values="cell").fillna("")
    order = pd.MultiIndex.from_frame(shown[["width", "library"]].drop_duplicates())
    return (
        wide.loc[order, list(dict.fromkeys(shown["bits"]))].rename_axis(columns=None).reset_index()
    )


def peers_sentence(table: pd.DataFrame) -> str:
    """The allocator's worst ratio to another library, and which libraries failed where."""
    others = table[table["library"] != OURS]
    known = others[others["damage"].notna()]
    said = {}
    for kind in ("all", "shared"):
        row = known.loc[known[f"over_{kind}"].idxmax()]
        said[kind] = (
            f"{row[f'over_{kind}']:.2g} times ({row['library']}, {row['bits']} bits, width "
            f"{row['width']})"
        )
    failed = [
        f"{r.library}, {r.bits} bits, width {r.width}: {r.error}"
        for r in others[others["damage"].isna()].itertuples()
    ]
    return (
        f"In {len(known)} comparisons at equal bytes the allocator does at most {said['all']} the "
        f"damage of the library. The "
        f"maximum is {said['shared']} if it may quantize only the weights that the library "
        f"quantized." + (f" What failed: {'; '.join(failed)}." if failed else "")
    )


def groups_table(table: pd.DataFrame) -> pd.DataFrame:
    """results/benchmarks/groups.csv as it is shown."""
    digits = {
        "bits_per_weight": "{:.2f}",
        "damage": "{:.2e}",
        "decibels": "{:+.1f}",
        "decibels_per_bit": "{:.1f}",
    }
    table = table.drop(columns=[c for c in table if c.startswith("over")])
    return table.assign(
        **{c: [f.format(v) if pd.notna(v) else "" for v in table[c]] for c, f in digits.items()}
    )


def groups_sentence(table: pd.DataFrame) -> str:
    """What four levels bring at 2 bits, and where groups bring more than the bits that they take."""
    whole = table[table["group"] == "channel"].set_index("format")["damage"]
    groups = table[table["decibels_per_bit"].notna()]
    pay = groups[groups["decibels_per_bit"] > PER_BIT]
    named = ", ".join(f"{r.format} in groups of {r.group}" for r in pay.itertuples()) or "nowhere"
    found = [
        f"{r.over:.2f} [{r.over_low:.2f}, {r.over_high:.2f}] at the {r.format.partition(', ')[2]}"
        for r in table[table["over"].notna()].itertuples()
    ]
    return (
        f"At 2 bits, four levels do {whole['midrise2'] / whole['int2']:.2f} times the damage of "
        f"three. Groups bring more than "
        f"{PER_BIT:g} dB per extra bit in {len(pay)} of {len(groups)} rows ({named}). "
        "An allocator that may choose groups of 32, 64 or 128 weights does, divided by its damage "
        "without groups: "
        f"{'; '.join(found)}."
    )


def exponent(rows: pd.DataFrame, column: str) -> float:
    """How a column grows with the number of weights: the slope of the logarithms between the two
    largest models.
    """
    last = np.log(rows.nlargest(2, "weights")[["weights", column]].to_numpy())
    return float((last[0, 1] - last[1, 1]) / (last[0, 0] - last[1, 0]))


def growth_table(table: pd.DataFrame) -> pd.DataFrame:
    """results/benchmarks/growth.csv by step: seconds and peak MiB at each width, and their
    exponents.
    """
    seconds = table["seconds"].map(lambda s: f"{s:,.0f} s" if s >= 10 else f"{s:.2g} s")
    cells = seconds + ", " + table["peak_mib"].map("{:,.0f} MiB".format)
    wide = table.assign(cell=cells, width="width " + table["width"].astype(str)).pivot(
        index="step", columns="width", values="cell"
    )
    wide = wide.fillna("")[list(dict.fromkeys("width " + table["width"].astype(str)))]
    positive = table.assign(peak_mib=table["peak_mib"].clip(lower=0.1))
    for column, name in (("seconds", "exponent of time"), ("peak_mib", "of memory")):
        wide[name] = {
            step: f"{exponent(rows, column):.1f}" for step, rows in positive.groupby("step")
        }
    return wide.loc[list(dict.fromkeys(table["step"]))].rename_axis(columns=None).reset_index()


def growth_sentence(table: pd.DataFrame, weights: float = 860e6) -> str:
    """What the largest width's figures make for a model of so many weights, by the fitted
    exponents.
    """
    found = {}
    for step, rows in table.groupby("step", sort=False):
        last = rows.loc[rows["weights"].idxmax()]
        found[step] = [
            last[c] * (weights / last["weights"]) ** exponent(rows, c)
            for c in ("seconds", "peak_mib")
        ]
    breaks = max(found, key=lambda step: found[step][1])
    each = {step: " per pass" if step == "estimate_sensitivity" else "" for step in found}
    said = "; ".join(
        f"{step} {s / 60:,.1f} min{each[step]} and {mib / 1024:,.1f} GiB"
        for step, (s, mib) in found.items()
    )
    return (
        f"By these exponents a U-Net of {weights / 1e6:.0f} million weights takes: {said}. "
        f"`{breaks}` needs the most memory, so it is the first to run out of it."
    )


def blocks_table(table: pd.DataFrame) -> pd.DataFrame:
    """results/benchmarks/blocks.csv as it is shown."""
    over = [table[f"over_whole{end}"].map("{:.2f}".format) for end in ("", "_low", "_high")]
    channels = (
        table["channels"].astype(str).mask(table["channels"] == table["channels"].max(), "all")
    )
    return pd.DataFrame(
        {
            "width": table["width"],
            "weights in the largest block": table["columns"],
            "channels per pass": channels,
            "curvature, MiB": table["curvature_mib"].map("{:,.0f}".format),
            "time of a pass": table["pass_ratio"].map("{:.1f}".format),
            "damage at 4 bits": table["damage"].map("{:.2e}".format),
            "damage divided by that of the width's first row": over[0]
            + " ["
            + over[1]
            + ", "
            + over[2]
            + "]",
        }
    )


def passes_sentence(table: pd.DataFrame) -> str:
    """What shrinking does to plans of few passes, and how well it predicts their damage."""
    by = {kind: rows for kind, rows in table.groupby("estimates")}
    worst = {kind: rows["over_uniform"].max() for kind, rows in by.items()}
    low, high = by["shrunk"]["over_predicted"].min(), by["shrunk"]["over_predicted"].max()
    mean = table.groupby(["passes", "network", "estimates"])["over_uniform"].mean().unstack()
    many = (mean["plain"] / mean["shrunk"]).loc[MANY_PASSES:]
    few = (mean[FOUR] / mean["shrunk"])[mean.index.isin(FEW_PASSES, level="passes")]
    return (
        "Damage of the allocator's plan divided by uniform INT4's, at equal bytes, on fresh "
        "inputs; in parentheses: without "
        "shrinking (plain means). Below 1: better than uniform. A cell is the mean over three "
        "plans, or one for the diffusion "
        f"model. The worst of {len(by['shrunk'])} plans does {worst['shrunk']:.2f} times uniform "
        f"INT4's damage with shrunk "
        f"estimates; with plain means, {worst['plain']:.1f} times. With shrunk estimates the "
        f"measured damage is {low:.2f} to "
        f"{high:.2f} times the predicted one. From {MANY_PASSES} passes on, plain means give "
        f"{many.min():.2f} to {many.max():.2f} "
        f"times the damage of shrunk estimates. Four draws of noise per pass (`draws=4`) multiply "
        f"the damage at {FEW_PASSES[0]} to "
        f"{FEW_PASSES[-1]} passes by {few.min():.2f} to {few.max():.2f} (mean {few.mean():.2f})."
    )
