"""What `make terrain` shows, as tables and sentences: a public model quantized, in decibels."""

import pandas as pd


def passes_table(table: pd.DataFrame) -> pd.DataFrame:
    """results/terrain/passes.csv as it is shown: decibels of the plan, and those that it predicts
    of itself.
    """
    shown = table[["decibels", "predicted"]].map("{:.1f}".format)
    return (
        shown.set_axis(["decibels", "decibels predicted by the plan"], axis=1)
        .assign(passes=table["passes"])
        .iloc[:, [2, 0, 1]]
    )


def passes_sentence(table: pd.DataFrame) -> str:
    """What the last passes gained, and by how much a plan overrates itself."""
    by, off = (
        table.set_index("passes").sort_index()["decibels"].round(1),
        table["predicted"] - table["decibels"],
    )
    before, most = by.index[-2:]
    return (
        f"From {before} to {most} passes the plan gains {by[most] - by[before]:.1f} dB, so more "
        f"passes may gain more. Predicted "
        f"minus measured: {off.min():+.1f} to {off.max():+.1f} dB."
    )


def rows_table(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `make terrain` beside the allocator at the same bytes: decibels, higher is closer to
    FP32.
    """
    ours, coded = (
        table[table["method"] == method].set_index("format")["decibels"].map("{:.1f}".format)
        for method in ("allocator", "entropy-coded")
    )
    others, found = table[~table["method"].isin(["allocator", "entropy-coded", "fp32"])], []
    for row in others.sort_values("mem_mib", ascending=False, kind="stable").itertuples():
        name = row.method if row.method.startswith("INT4") else f"{row.method} {row.format}"
        beside = ours.get(f"bytes of {name}", "not made yet")
        in_file = coded.get(f"bytes of {name}", "")
        found.append(
            (
                name,
                f"{row.mem_mib:.2f} MiB ({row.mem_share:.1%})",
                f"{row.decibels:.1f}",
                beside,
                in_file,
            )
        )
    columns = [
        "row",
        "in memory (share of FP32)",
        "decibels",
        "decibels, allocator at these bytes",
        "decibels, coded file of these bytes",
    ]
    return pd.DataFrame(found, columns=columns)


def character_table(table: pd.DataFrame) -> pd.DataFrame:
    """How far slopes, roughness and spectrum of some rows are from FP32's maps, beside what other
    noise does.
    """
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
    return (
        found.set_axis(["slope, m per cell", "roughness, m", "spectrum, dB"], axis=1)
        .rename_axis("maps")
        .reset_index()
    )


def rows_sentence(table: pd.DataFrame) -> str:
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
        f"At {ours['mem_share']:.1%} of FP32's bytes the allocator has {ours['decibels']:.1f} dB "
        f"and uniform INT4 "
        f"{int4['decibels']:.1f} dB; uniform INT8 has {int8['decibels']:.1f} dB at "
        f"{int8['mem_share']:.1%}. At a tenth of FP32's "
        f"bytes the allocator has {tenth['decibels']:.1f} dB, and an entropy-coded file "
        f"{coded['decibels']:.1f} dB."
    )
