"""What the study of budgets found, in sentences."""

import numpy as np
import pandas as pd

from lafq.study.budget.methods import CODED, FEEDBACK
from lafq.study.budget.rules import LAYERWISE, RATE, over_global
from lafq.study.rows import BUDGET_KEY

CODED_RATE = 3.0  # bits per weight of the file
RISE = 0.03  # of the FP32 model's FID


def with_fid(table: pd.DataFrame, evidence: pd.DataFrame | None) -> pd.DataFrame:
    """Rows of `budget.measure_candidates` with fid_mnist_delta, _low, _high and n_images, empty
    where `make evidence` has none.
    """
    names = {f"delta_fid_mnist{end}": f"fid_mnist_delta{end}" for end in ("", "_low", "_high")}
    columns = [*names.values(), "n_images"]
    if evidence is None:
        return table.assign(**dict.fromkeys(columns, np.nan))
    key = BUDGET_KEY
    found = evidence.rename(columns=names).assign(budget_bits=evidence["budget_bits"].astype(float))
    return table.merge(found[key + columns], on=key, how="left")


def smallest_with_fid(table: pd.DataFrame, baseline_fid: float) -> pd.Series | None:
    """The allocator's smallest row whose FID rise, by the upper end of its interval, is under 3 %
    of the FP32 model's FID.
    """
    rows = table[
        table["method"].isin(["allocator", "allocator, tuned"])
        & (table["fid_mnist_delta_high"] < RISE * baseline_fid)
    ]
    return rows.loc[rows["mem_mib"].idxmin()] if len(rows) else None


def against_int8(table: pd.DataFrame) -> str:
    """The allocator at 4 bits per weight against uniform INT8; the interval pairs both over the
    digits.
    """
    ours, int8 = _mixed(table).loc[RATE], _int8(table)
    same = table[
        (table["method"] == f"uniform, {FEEDBACK}")
        & np.isclose(table["budget_bits"], int8["budget_bits"])
    ]
    other = (
        f" If both use error feedback: {ours['damage'] / same['damage'].item():.2f} times."
        if len(same)
        else ""
    )
    return (
        f"At {ours['mem_mib']:.2f} MiB ({ours['mem_share']:.1%} of FP32's bytes) the allocator "
        f"does {_over_int8(ours)} "
        f"times the damage of uniform INT8 (nearest code) at {int8['mem_mib']:.2f} MiB.{other}"
    )


def best_rule(table: pd.DataFrame) -> str:
    """Which rule does the least damage at equal bytes and with equal rounding."""
    rows = table[np.isclose(table["budget_bits"], RATE) & table["method"].str.endswith(FEEDBACK)]
    rows = (
        rows[rows["over_global"].notna()]
        .assign(rule=rows["method"].str.split(",").str[0])
        .set_index("rule")
    )
    others = rows.drop("global")
    said, own = (
        {rule: over_global(row) for rule, row in others.iterrows()},
        [r for r in others.index if r not in LAYERWISE],
    )
    worse = (others["over_global_low"] > 1).sum()
    best = (
        "the least damage"
        if worse == len(others)
        else f"less damage than {worse} of the {len(others)} others"
    )
    return (
        f"**Of {len(rows)} threshold rules, global does {best}.** All (the poster's "
        f"{len(rows) - len(own)}, {', '.join(own)}) "
        f"share one rounding and average {RATE:g} bits per weight. Group does {said['group']} "
        f"times global's "
        f"damage, ratio {said['ratio']} times."
    )


def both_draws(table: pd.DataFrame, fresh: pd.DataFrame) -> pd.DataFrame:
    """Damage over that of uniform INT8, paired: on the digits and noise that settings were chosen
    on, and on fresh ones.
    """
    key = ["method", "granularity", "budget_bits"]
    both = fresh[key].merge(table, on=key)
    return fresh[["method", "budget_bits"]].assign(
        **{
            "damage / INT8's, first digits": both.apply(_over_int8, axis=1),
            "damage / INT8's, fresh digits": fresh.apply(_over_int8, axis=1),
        }
    )


def change_on_fresh_digits(table: pd.DataFrame, fresh: pd.DataFrame) -> str:
    """How far the ratios of `both_draws` on fresh digits are from those on the digits that settings
    were chosen on.
    """
    key, plans = ["method", "granularity", "budget_bits"], fresh[fresh["method"] != "uniform"]
    both = plans.merge(table, on=key, suffixes=("", "_before"))
    ratio = both["over_int8"] / both["over_int8_before"]
    least, most = ratio.min(), ratio.max()
    return f"Fresh digits multiply these quotients by {least:.2f} to {most:.2f} ({len(both)} rows)."


def coded_sentence(table: pd.DataFrame) -> str:
    """What entropy-coded weights do at three bits per weight, beside uniform INT8."""
    rows, int8 = table[table["method"] == CODED].sort_values("budget_bits"), _int8(table)
    at = rows[np.isclose(rows["budget_bits"], CODED_RATE)]
    said = ""
    if len(at):
        row, full = at.iloc[0], at["mem_mib"].iloc[0] / at["mem_share"].iloc[0]
        said = (
            f"**lafq's compressed file ({row['file_mib'] / full:.1%} of FP32's bytes) does "
            f"{_over_int8(row)} times the damage of "
            f"uniform INT8 (nearest code).** LZMA packs both: {row['file_mib']:.2f} MiB (in memory "
            f"{row['mem_mib']:.2f}) and "
            f"{int8['file_mib']:.2f} MiB."
        )
    return said


def coded_beside(table: pd.DataFrame) -> str:
    """Uniform INT8 with the same rounding, and what an entropy-coded plan does at the allocator's
    bytes in memory.
    """
    fixed = table[
        (table["method"] == "allocator, all weights") & np.isclose(table["budget_bits"], CODED_RATE)
    ]
    same = table[
        (table["method"] == f"uniform, {FEEDBACK}")
        & np.isclose(table["budget_bits"], _int8(table)["budget_bits"])
    ]
    rows = table[table["method"] == CODED]
    if fixed.empty or same.empty or rows.empty:
        return ""
    ours = fixed.iloc[0]
    nearest = rows.loc[(rows["mem_mib"] - ours["mem_mib"]).abs().idxmin()]
    less = "less" if ours["damage"] < nearest["damage"] else "no less"
    return (
        f"Uniform INT8 with error feedback does {_over_int8(same.iloc[0])} times the damage of "
        f"nearest code. In "
        "*memory*, "
        f'"allocator, all weights" does {less} damage than "allocator, entropy-coded": {ours["damage"]:.1e} ({ours["mem_mib"]:.2f} '
        f"MiB) against {nearest['damage']:.1e} ({nearest['mem_mib']:.2f} MiB)."
    )


def coded_equal(table: pd.DataFrame) -> str:
    """At how many bits per weight an entropy-coded file does uniform INT8's damage; "" outside the
    rows.
    """
    rows = table[table["method"] == CODED].sort_values("budget_bits")
    bits = bits_of_equal_damage(rows, _int8(table)["damage"])
    said = (
        f"At {bits:.1f} bits per weight (interpolated) lafq's file does as much damage as INT8's."
    )
    return "" if np.isnan(bits) else said


def coded_summary(table: pd.DataFrame, evidence: pd.DataFrame | None) -> str:
    """`coded_sentence`, `coded_equal`, `coded_beside` and `coded_with_fid`."""
    said = (
        coded_sentence(table),
        coded_equal(table),
        coded_beside(table),
        coded_with_fid(table, evidence),
    )
    return " ".join(sentence for sentence in said if sentence)


def coded_with_fid(table: pd.DataFrame, evidence: pd.DataFrame | None) -> str:
    """The smallest entropy-coded file whose FID hardly rises, of those whose FID has been measured;
    "" where there is none.
    """
    if evidence is None:
        return ""
    limit = RISE * evidence[evidence["method"] == "baseline"]["fid_mnist"].item()
    rows = table[(table["method"] == CODED) & (table["fid_mnist_delta_high"] < limit)]
    if rows.empty:
        return ""
    row = rows.loc[rows["file_mib"].idxmin()]
    share = row["file_mib"] / (row["mem_mib"] / row["mem_share"])
    count = ((table["method"] == CODED) & table["fid_mnist_delta"].notna()).sum()
    return (
        f"We measured FID for {count} coded files. A file passes if the 95 % interval of its FID "
        f"rise ends below {limit:.2f}, "
        f"which is 3 % of FP32's FID (N = {row['n_images']:,.0f}). The smallest file that passes "
        f"has {row['file_mib']:.2f} MiB "
        f"({share:.1%} of FP32's bytes)."
    )


def order_by_fid(rows: pd.DataFrame) -> str:
    """The methods of rows at equal bytes by FID on MNIST features, the lowest first."""
    names = (
        rows[rows["method"] != "baseline"]
        .sort_values("fid_mnist")["method"]
        .str.removesuffix(f", {FEEDBACK}")
    )
    return f"By FID (MNIST features), best first: {'; '.join(names)}. Damage can order them differently."


def bits_of_equal_damage(rows: pd.DataFrame, damage: float) -> float:
    """Budget in bits per weight at which rows, sorted by it, do this damage, between two of them
    log-linear; NaN outside.
    """
    logs = np.log(rows["damage"].to_numpy())[::-1]
    return float(
        np.interp(
            np.log(damage), logs, rows["budget_bits"].to_numpy()[::-1], left=np.nan, right=np.nan
        )
    )


def summary_sentences(table: pd.DataFrame, evidence: pd.DataFrame | None) -> str:
    """`against_int8`, and how small FID lets the allocator's plan be."""
    said = against_int8(table)
    baseline = (
        None if evidence is None else evidence[evidence["method"] == "baseline"]["fid_mnist"].item()
    )
    found = None if baseline is None else smallest_with_fid(table, baseline)
    if found is not None:
        said += (
            f" The smallest model whose whole FID-rise interval lies below {RISE * baseline:.2f} "
            f"(3 % of FP32's FID; N = "
            f'{found["n_images"]:,.0f}) is "{found["method"]}" at {found["mem_mib"]:.2f} MiB ({found["mem_share"]:.1%}).'
        )
    return said


def at_int4_bytes(rows: pd.DataFrame, width: int) -> str:
    """What the rows of `make evidence` at the bytes of uniform INT4 do to FID, for a model of this
    width.
    """
    by = rows.assign(
        name=rows["method"]
        .str.split(",")
        .str[0]
        .where(rows["method"] != "uniform", rows["format"].str.upper())
    )
    by = by.set_index("name")

    def change(name: str) -> str:
        value, low, high = (
            f"{by.loc[name, f'delta_fid_mnist{end}']:+.2f}" for end in ("", "_low", "_high")
        )
        return f"{value} [{low}, {high}]"

    nearest = by.loc[["allocator", "global", "ratio", "INT4"], "psnr"].idxmax()
    return (
        f"Width {width}, {by.loc['INT4', 'mem_mib']:.2f} MiB ({by.loc['INT4', 'mem_share']:.1%} of "
        f"FP32), N = "
        f"{by.loc['INT4', 'n_images']:,}: FID (MNIST features) changes by {change('allocator')} "
        f"with the allocator, "
        f"{change('global')} with one threshold, {change('ratio')} with a threshold per layer "
        f"(ratio) and {change('INT4')} with "
        f"uniform INT4. Uniform INT8 ({by.loc['INT8', 'mem_share']:.1%} of FP32) changes it by "
        f"{change('INT8')}. The "
        f"highest `psnr` at INT4's bytes: {nearest}."
    )


def on_images(claims: pd.DataFrame, width: int, images: int) -> str:
    """What one threshold per layer costs in FID over one for all, from the claims of
    `rules.image_claims`.
    """
    row = claims[claims["quantity"].str.startswith("FID of ratio")].iloc[0]
    return (
        f"At width {width} and uniform INT4's bytes, ratio's FID is {row['measured']:.1f} "
        f"[{row['low']:.1f}, {row['high']:.1f}] "
        f"above global's (MNIST features, N = {images:,})."
    )


def _over_int8(row: pd.Series) -> str:
    value, low, high = (
        f"{v:.2f}" if v >= 0.1 else f"{v:.2g}"
        for v in row[[f"over_int8{end}" for end in ("", "_low", "_high")]]
    )
    return f"{value} [{low}, {high}]"


def _mixed(table: pd.DataFrame) -> pd.DataFrame:
    """The allocator's rows of granularity "mixed", by budget."""
    rows = table[(table["method"] == "allocator") & (table["granularity"] == "mixed")]
    return rows.sort_values("budget_bits").set_index("budget_bits")


def _int8(table: pd.DataFrame) -> pd.Series:
    """The largest uniform integer row."""
    uniform = table[(table["method"] == "uniform") & (table["budget_bits"] < 10)]
    return uniform.loc[uniform["budget_bits"].idxmax()]
