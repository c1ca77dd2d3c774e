"""What 06_budget found, in sentences."""

import numpy as np
import pandas as pd

RISE = 0.03  # of the FP32 model's FID
RATE = 4.0  # bits per weight


def with_fid(table: pd.DataFrame, evidence: pd.DataFrame | None) -> pd.DataFrame:
    """Rows of `budget.measure_candidates` with fid_mnist_delta, _low, _high and n_images, empty where `make evidence` has none."""
    names = {f"delta_fid_mnist{end}": f"fid_mnist_delta{end}" for end in ("", "_low", "_high")}
    columns = [*names.values(), "n_images"]
    if evidence is None:
        return table.assign(**dict.fromkeys(columns, np.nan))
    key = ["method", "granularity", "budget_bits"]
    found = evidence.rename(columns=names).assign(budget_bits=evidence["budget_bits"].astype(float))
    return table.merge(found[key + columns], on=key, how="left")


def smallest_with_fid(table: pd.DataFrame, baseline_fid: float) -> pd.Series | None:
    """The allocator's smallest row whose FID rise, by the upper end of its interval, is under 3 % of the FP32 model's FID."""
    rows = table[table["method"].isin(["allocator", "allocator, tuned"]) & (table["fid_mnist_delta_high"] < RISE * baseline_fid)]
    return rows.loc[rows["mem_mib"].idxmin()] if len(rows) else None


def against_int8(table: pd.DataFrame) -> str:
    """The allocator at 4 bits per weight against uniform INT8."""
    ours, int8 = _mixed(table).loc[RATE], _int8(table)
    ratio, low, high = (ours[c] / int8["damage"] for c in ("damage", "damage_low", "damage_high"))
    return (
        f"At {ours['mem_mib']:.2f} MiB ({ours['mem_share']:.1%} of FP32, 4 bits per weight) the allocator does {ratio:.2f} "
        f"[{low:.2f}, {high:.2f}] times the damage to the model's output that uniform INT8 does at {int8['mem_mib']:.2f} MiB."
    )


def summary_sentences(table: pd.DataFrame, evidence: pd.DataFrame | None) -> str:
    """`against_int8`, from where on the allocator does half of INT8's damage, and how small FID lets it be."""
    half = _mixed(table)["damage"] <= 0.5 * _int8(table)["damage"]
    from_there = f"from {half.index[half][0]:g} bits per weight on" if half.any() else "nowhere"
    said = f"{against_int8(table)} It does at most half of that damage {from_there}."
    baseline = None if evidence is None else evidence[evidence["method"] == "baseline"]["fid_mnist"].item()
    found = None if baseline is None else smallest_with_fid(table, baseline)
    if found is not None:
        said += (
            f" With N = {found['n_images']:,.0f} images, FID rises by less than 3 % of FP32's (upper end of the 95 % interval) at "
            f"{found['mem_mib']:.2f} MiB ({found['mem_share']:.1%} of FP32; {found['method']})."
        )
    return said


def _mixed(table: pd.DataFrame) -> pd.DataFrame:
    """The allocator's rows of granularity "mixed", by budget."""
    rows = table[(table["method"] == "allocator") & (table["granularity"] == "mixed")]
    return rows.sort_values("budget_bits").set_index("budget_bits")


def _int8(table: pd.DataFrame) -> pd.Series:
    """The largest uniform integer row."""
    uniform = table[(table["method"] == "uniform") & (table["budget_bits"] < 10)]
    return uniform.loc[uniform["budget_bits"].idxmax()]
