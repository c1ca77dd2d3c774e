"""What the benchmarks and the terrain model show, as tables and sentences."""

import pandas as pd

MANY_PASSES = 64


def passes_table(table: pd.DataFrame) -> pd.DataFrame:
    """results/benchmarks/passes.csv as it is shown: damage over uniform INT4's, shrunk estimates and, in brackets, plain means."""
    mean = table.groupby(["network", "passes", "estimates"], sort=False)["over_uniform"].mean().unstack("estimates")
    cells = mean["shrunk"].map("{:.2g}".format) + " (" + mean["plain"].map("{:.2g}".format) + ")"
    return cells.unstack("network").loc[:, table["network"].unique()].rename_axis(columns=None).reset_index()


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
    columns = ["row", "stored (share of FP32)", "decibels", "allocator at these bytes", "entropy-coded file of these bytes"]
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


def quantizers_table(table: pd.DataFrame) -> pd.DataFrame:
    """The benchmark as it is shown: the integer formats that at least two libraries have."""
    shared = table.groupby(["width", "format"])["library"].transform("nunique") > 1
    shown = table[shared].assign(order=table["format"].str[3:].astype(int)).sort_values(["width", "order"], ascending=[True, False])
    digits = {"bytes_ratio": "{:.3f}", "output_mse": "{:.2g}", "time_ratio": "{:.2f}"}
    shown = shown.assign(
        library=shown["library"] + " " + shown["version"], **{c: shown[c].map(f.format) for c, f in digits.items()}
    )
    return shown[["width", "format", "library", *digits, "layers_left_fp32"]]


def quantizers_sentence(table: pd.DataFrame) -> str:
    """How often lafq stores the fewest bytes and has the largest output error among the libraries of the benchmark."""
    groups = [rows for _, rows in table.groupby(["width", "format"]) if rows["library"].nunique() > 1]
    ours = [rows["library"].eq("lafq") for rows in groups]
    fewest = sum(rows[own]["bytes_ratio"].item() == rows["bytes_ratio"].min() for rows, own in zip(groups, ours, strict=True))
    largest = sum(rows[own]["output_mse"].item() == rows["output_mse"].max() for rows, own in zip(groups, ours, strict=True))
    return f"Of {len(groups)} comparisons, lafq stores the fewest bytes in {fewest} and has the largest output error in {largest}."


def passes_sentence(table: pd.DataFrame) -> str:
    """What shrinking does to plans of few passes, and how well it predicts their damage."""
    by = {kind: rows for kind, rows in table.groupby("estimates")}
    worst = {kind: rows["over_uniform"].max() for kind, rows in by.items()}
    low, high = by["shrunk"]["over_predicted"].min(), by["shrunk"]["over_predicted"].max()
    mean = table[table["passes"] >= MANY_PASSES].groupby(["network", "passes", "estimates"])["over_uniform"].mean().unstack()
    many = mean["plain"] / mean["shrunk"]
    return (
        "Damage of the allocator's plan over that of uniform INT4, at INT4's bytes, on inputs that no plan has seen; in "
        "parentheses with plain means. Below 1: better than uniform. The worst of "
        f"{len(by['shrunk'])} plans does {worst['shrunk']:.2f} times uniform INT4's damage with shrunk estimates and "
        f"{worst['plain']:.1f} times with plain means. With shrunk estimates the measured damage is {low:.2f} to {high:.2f} times "
        f"the predicted one. From {MANY_PASSES} passes on, plain means give {many.min():.2f} to {many.max():.2f} times the damage "
        "of shrunk estimates."
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
