"""What the benchmarks and the terrain model show, as tables and sentences."""

import numpy as np
import pandas as pd

MANY_PASSES, FEW_PASSES = 64, (2, 4, 8, 16, 32)
FOUR = "shrunk, 4 draws"
PER_BIT = 6.0  # decibels
OURS = "lafq, uniform"


def passes_table(table: pd.DataFrame) -> pd.DataFrame:
    """results/benchmarks/passes.csv as it is shown: damage over uniform INT4's, shrunk estimates and, in brackets, plain means."""
    mean = table.groupby(["network", "passes", "estimates"], sort=False)["over_uniform"].mean().unstack("estimates")
    cells = mean["shrunk"].map("{:.2g}".format) + " (" + mean["plain"].map("{:.2g}".format) + ")"
    return cells.unstack("network").loc[:, table["network"].unique()].rename_axis(columns=None).reset_index()


def terrain_passes_table(table: pd.DataFrame) -> pd.DataFrame:
    """results/terrain/passes.csv as it is shown: decibels of the plan, and those that it predicts of itself."""
    shown = table[["decibels", "predicted"]].map("{:.1f}".format)
    return shown.set_axis(["decibels", "decibels predicted by the plan"], axis=1).assign(passes=table["passes"]).iloc[:, [2, 0, 1]]


def terrain_passes_sentence(table: pd.DataFrame) -> str:
    """What the last passes gained, and by how much a plan overrates itself."""
    by, off = table.set_index("passes").sort_index()["decibels"].round(1), table["predicted"] - table["decibels"]
    before, most = by.index[-2:]
    return (
        f"From {before} to {most} passes the plan gains {by[most] - by[before]:.1f} dB, so more passes may gain more. Predicted "
        f"minus measured: {off.min():+.1f} to {off.max():+.1f} dB."
    )


def terrain_table(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `make terrain` beside the allocator at the same bytes: decibels, higher is closer to FP32."""
    ours, coded = (
        table[table["method"] == method].set_index("format")["decibels"].map("{:.1f}".format)
        for method in ("allocator", "entropy-coded")
    )
    others, found = table[~table["method"].isin(["allocator", "entropy-coded", "fp32"])], []
    for row in others.sort_values("mem_mib", ascending=False, kind="stable").itertuples():
        name = row.method if row.method.startswith("INT4") else f"{row.method} {row.format}"
        beside = ours.get(f"bytes of {name}", "not made yet")
        in_file = coded.get(f"bytes of {name}", "")
        found.append((name, f"{row.mem_mib:.2f} MiB ({row.mem_share:.1%})", f"{row.decibels:.1f}", beside, in_file))
    columns = [
        "row",
        "in memory (share of FP32)",
        "decibels",
        "decibels, allocator at these bytes",
        "decibels, coded file of these bytes",
    ]
    return pd.DataFrame(found, columns=columns)


def terrain_character(table: pd.DataFrame) -> pd.DataFrame:
    """How far slopes, roughness and spectrum of some rows are from FP32's maps, beside what other noise does."""
    chosen = {
        "allocator at INT4's bytes": ("allocator", "bytes of uniform int4"),
        "allocator at 10% of FP32": ("allocator", "10% of FP32"),
        "entropy-coded file of 10% of FP32": ("entropy-coded", "10% of FP32"),
        "uniform INT4": ("uniform", "int4"),
        "uniform INT8": ("uniform", "int8"),
        "FP32, other noise": ("fp32", "other noise"),
    }
    by = table.set_index(["method", "format"])[["slope", "roughness", "spectrum"]]
    found = pd.DataFrame({name: by.loc[key] for name, key in chosen.items()}).T.map("{:.2g}".format)
    return found.set_axis(["slope, m per cell", "roughness, m", "spectrum, dB"], axis=1).rename_axis("maps").reset_index()


def fisher_cost(table: pd.DataFrame) -> pd.DataFrame:
    """The benchmark of Fisher methods as it is shown."""
    digits = {"cost_ratio": "{:.2f}", "relative_error": "{:.2g}"}
    return table.assign(**{c: table[c].map(f.format) for c, f in digits.items()})


def running_table(table: pd.DataFrame) -> pd.DataFrame:
    """results/benchmarks/running.csv as it is shown."""
    digits = {"mem_mib": "{:.2f}", "damage": "{:.2g}", "time_batch_1": "{:.2f}", "time_batch_100": "{:.2f}"}
    return table.assign(**{c: table[c].map(f.format) for c, f in digits.items()})


def peers_table(table: pd.DataFrame, weights: str) -> pd.DataFrame:
    """The allocator's damage over each library's at its bytes, and these as a share of FP32's, one column per number of bits.

    weights: "all", or "shared" for the allocator that may quantize only what the library did.
    """
    known = table[table["damage"].notna()]
    over = [known[f"over_{weights}{end}"].map("{:.2g}".format) for end in ("", "_low", "_high")]
    cells = over[0] + " [" + over[1] + ", " + over[2] + "] at " + known["mem_share"].map("{:.1%}".format)
    library = (known["library"] + " " + known["version"].fillna("")).str.strip()
    shown = known.assign(cell=cells, library=library, bits=known["bits"].astype(str) + " bits")
    wide = shown.pivot(index=["width", "library"], columns="bits", values="cell").fillna("")
    order = pd.MultiIndex.from_frame(shown[["width", "library"]].drop_duplicates())
    return wide.loc[order, list(dict.fromkeys(shown["bits"]))].rename_axis(columns=None).reset_index()


def peers_sentence(table: pd.DataFrame) -> str:
    """The allocator's worst ratio to another library, and which libraries failed where."""
    others = table[table["library"] != OURS]
    known = others[others["damage"].notna()]
    said = {}
    for kind in ("all", "shared"):
        row = known.loc[known[f"over_{kind}"].idxmax()]
        said[kind] = f"{row[f'over_{kind}']:.2g} times ({row['library']}, {row['bits']} bits, width {row['width']})"
    failed = [f"{r.library}, {r.bits} bits, width {r.width}: {r.error}" for r in others[others["damage"].isna()].itertuples()]
    return (
        f"In {len(known)} comparisons at equal bytes the allocator does at most {said['all']} the damage of the library. The "
        f"maximum is {said['shared']} if it may quantize only the weights that the library quantized."
        + (f" What failed: {'; '.join(failed)}." if failed else "")
    )


def groups_table(table: pd.DataFrame) -> pd.DataFrame:
    """results/benchmarks/groups.csv as it is shown."""
    digits = {"bits_per_weight": "{:.2f}", "damage": "{:.2e}", "decibels": "{:+.1f}", "decibels_per_bit": "{:.1f}"}
    table = table.drop(columns=[c for c in table if c.startswith("over")])
    return table.assign(**{c: [f.format(v) if pd.notna(v) else "" for v in table[c]] for c, f in digits.items()})


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
        f"At 2 bits, four levels do {whole['midrise2'] / whole['int2']:.2f} times the damage of three. Groups bring more than "
        f"{PER_BIT:g} dB per extra bit in {len(pay)} of {len(groups)} rows ({named}). "
        "An allocator that may choose groups of 32, 64 or 128 weights does, divided by its damage without groups: "
        f"{'; '.join(found)}."
    )


def exponent(rows: pd.DataFrame, column: str) -> float:
    """How a column grows with the number of weights: the slope of the logarithms between the two largest models."""
    last = np.log(rows.nlargest(2, "weights")[["weights", column]].to_numpy())
    return float((last[0, 1] - last[1, 1]) / (last[0, 0] - last[1, 0]))


def growth_table(table: pd.DataFrame) -> pd.DataFrame:
    """results/benchmarks/growth.csv by step: seconds and peak MiB at each width, and their exponents."""
    seconds = table["seconds"].map(lambda s: f"{s:,.0f} s" if s >= 10 else f"{s:.2g} s")
    cells = seconds + ", " + table["peak_mib"].map("{:,.0f} MiB".format)
    wide = table.assign(cell=cells, width="width " + table["width"].astype(str)).pivot(index="step", columns="width", values="cell")
    wide = wide.fillna("")[list(dict.fromkeys("width " + table["width"].astype(str)))]
    positive = table.assign(peak_mib=table["peak_mib"].clip(lower=0.1))
    for column, name in (("seconds", "exponent of time"), ("peak_mib", "of memory")):
        wide[name] = {step: f"{exponent(rows, column):.1f}" for step, rows in positive.groupby("step")}
    return wide.loc[list(dict.fromkeys(table["step"]))].rename_axis(columns=None).reset_index()


def growth_sentence(table: pd.DataFrame, weights: float = 860e6) -> str:
    """What the largest width's figures make for a model of so many weights, by the fitted exponents."""
    found = {}
    for step, rows in table.groupby("step", sort=False):
        last = rows.loc[rows["weights"].idxmax()]
        found[step] = [last[c] * (weights / last["weights"]) ** exponent(rows, c) for c in ("seconds", "peak_mib")]
    breaks = max(found, key=lambda step: found[step][1])
    each = {step: " per pass" if step == "estimate_sensitivity" else "" for step in found}
    said = "; ".join(f"{step} {s / 60:,.1f} min{each[step]} and {mib / 1024:,.1f} GiB" for step, (s, mib) in found.items())
    return (
        f"By these exponents a U-Net of {weights / 1e6:.0f} million weights takes: {said}. "
        f"`{breaks}` needs the most memory, so it is the first to run out of it."
    )


def blocks_table(table: pd.DataFrame) -> pd.DataFrame:
    """results/benchmarks/blocks.csv as it is shown."""
    over = [table[f"over_whole{end}"].map("{:.2f}".format) for end in ("", "_low", "_high")]
    channels = table["channels"].astype(str).mask(table["channels"] == table["channels"].max(), "all")
    return pd.DataFrame(
        {
            "width": table["width"],
            "weights in the largest block": table["columns"],
            "channels per pass": channels,
            "curvature, MiB": table["curvature_mib"].map("{:,.0f}".format),
            "time of a pass": table["pass_ratio"].map("{:.1f}".format),
            "damage at 4 bits": table["damage"].map("{:.2e}".format),
            "damage divided by that of the width's first row": over[0] + " [" + over[1] + ", " + over[2] + "]",
        }
    )


def passes_sentence(table: pd.DataFrame) -> str:
    """What shrinking does to plans of few passes, and how well it predicts their damage."""
    by = {kind: rows for kind, rows in table.groupby("estimates")}
    worst = {kind: rows["over_uniform"].max() for kind, rows in by.items()}
    low, high = by["shrunk"]["over_predicted"].min(), by["shrunk"]["over_predicted"].max()
    mean = table[table["passes"] >= MANY_PASSES].groupby(["network", "passes", "estimates"])["over_uniform"].mean().unstack()
    many = mean["plain"] / mean["shrunk"]
    by_passes = table.groupby(["estimates", "network", "passes"])["over_uniform"].mean()
    four = by_passes[FOUR] / by_passes["shrunk"]
    few = four[four.index.get_level_values("passes").isin(FEW_PASSES)]
    return (
        "Damage of the allocator's plan divided by uniform INT4's, at equal bytes, on fresh inputs; in parentheses: without "
        "shrinking (plain means). Below 1: better than uniform. A cell is the mean over three plans, or one for the diffusion "
        f"model. The worst of {len(by['shrunk'])} plans does {worst['shrunk']:.2f} times uniform INT4's damage with shrunk "
        f"estimates; with plain means, {worst['plain']:.1f} times. With shrunk estimates the measured damage is {low:.2f} to "
        f"{high:.2f} times the predicted one. From {MANY_PASSES} passes on, plain means give {many.min():.2f} to {many.max():.2f} "
        f"times the damage of shrunk estimates. Four draws of noise per pass (`draws=4`) multiply the damage at {FEW_PASSES[0]} to "
        f"{FEW_PASSES[-1]} passes by {few.min():.2f} to {few.max():.2f} (mean {few.mean():.2f})."
    )


def terrain_sentence(table: pd.DataFrame) -> str:
    """The allocator at the bytes of uniform INT4, and at a tenth of FP32's, in decibels."""
    by = table.set_index(["method", "format"])
    ours, tenth, int4, int8, coded = (
        by.loc[key]
        for key in (
            ("allocator", "bytes of uniform int4"),
            ("allocator", "10% of FP32"),
            ("uniform", "int4"),
            ("uniform", "int8"),
            ("entropy-coded", "10% of FP32"),
        )
    )
    return (
        f"At {ours['mem_share']:.1%} of FP32's bytes the allocator has {ours['decibels']:.1f} dB and uniform INT4 "
        f"{int4['decibels']:.1f} dB; uniform INT8 has {int8['decibels']:.1f} dB at {int8['mem_share']:.1%}. At a tenth of FP32's "
        f"bytes the allocator has {tenth['decibels']:.1f} dB, and an entropy-coded file {coded['decibels']:.1f} dB."
    )
