"""The figures that 06_budget is held against: each beside the one that was wanted, reached or not."""

import numpy as np
import pandas as pd

from lafq import paths
from lafq.paper.budget_study.methods import FEEDBACK

RISE = 0.03  # of the baseline's FID
COLUMNS = ["figure", "wanted", "measured", "reached"]
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


def over_int8(table: pd.DataFrame, granularity: str = "mixed") -> tuple[float, float, float]:
    """Damage of the allocator at 4.0 bits per weight over uniform INT8's, and the ends of its interval (the allocator's own)."""
    ours = _at(table, "allocator", granularity, RATE)
    int8 = _uniform(table, "uniform").iloc[-1]["damage"]
    return tuple(ours[c] / int8 for c in ("damage", "damage_low", "damage_high"))


def over_best_uniform(table: pd.DataFrame, method: str, granularity: str = "mixed") -> pd.Series:
    """By budget up to INT8's: damage of the allocator over that of the best uniform format that fits the same bytes."""
    uniform = _uniform(table, method)
    ours = table[(table["method"] == "allocator") & (table["granularity"] == granularity)]
    ours = ours[ours["budget_bits"].between(uniform["budget_bits"].min(), uniform["budget_bits"].max())]
    best = [uniform[uniform["budget_bits"] <= bits]["damage"].min() for bits in ours["budget_bits"]]
    return pd.Series((ours["damage"] / best).tolist(), index=ours["budget_bits"].tolist())


def smallest_with_fid(table: pd.DataFrame, baseline_fid: float) -> pd.Series | None:
    """The smallest row whose FID rise, by the upper end of the interval, is under 3 % of the baseline's FID; of the allocator's
    own, tuned or not."""
    rows = table[table["method"].isin(["allocator", "allocator, tuned"]) & (table["fid_mnist_delta_high"] < RISE * baseline_fid)]
    return rows.loc[rows["mem_mib"].idxmin()] if len(rows) else None


def wanted(table: pd.DataFrame, gaps: pd.DataFrame, evidence: pd.DataFrame | None) -> pd.DataFrame:
    """Rows of COLUMNS; a figure that has not been measured says so."""
    ratio, low, high = over_int8(table)
    rows = [("damage at 4.0 bits per weight over uniform INT8's", 0.5, f"{ratio:.2f} [{low:.2f}, {high:.2f}]", ratio)]
    for method, name in (("uniform", "best uniform format"), (f"uniform, {FEEDBACK}", f"best uniform format with {FEEDBACK}")):
        ratios = over_best_uniform(table, method)
        text = f"{ratios.max():.2g}, at {ratios.idxmax()} bits per weight"
        rows.append((f"damage over that of the {name} that fits, largest over the budgets up to INT8's", 0.4, text, ratios.max()))
    share, text = np.inf, "not measured (`make evidence`)"
    if evidence is not None:
        base = evidence[evidence["method"] == "baseline"]["fid_mnist"].item()
        found = smallest_with_fid(table, base)
        share = np.inf if found is None else found["mem_share"]
        text = "none of those sampled"
        if found is not None:
            text = f"{share:.4f}, {found['mem_mib']:.2f} MiB ({found['method']}, N = {found['n_images']:.0f})"
    rows.append(
        ("smallest share of FP32's bytes with FID rise (upper end of its interval) under 3 % of the baseline's", 0.12, text, share)
    )
    rows.append(
        ("gap to the integer program (one format per tensor), at most", 0.02, f"{gaps['gap'].max():.2%}", gaps["gap"].max())
    )
    path = paths.RESULTS / "benchmarks" / "allocation.csv"
    slowest, text = np.inf, "not measured"
    if path.is_file():
        seconds = pd.read_csv(path).groupby("curvature")["seconds"].max()
        slowest, text = seconds.max(), f"{seconds[True]:.0f}, without {FEEDBACK} {seconds[False]:.0f}"
    rows.append(("seconds to allocate the width-64 model after Fisher (`make benchmark`)", 60, text, slowest))
    told = [(figure, f"{bound} or less", text, "yes" if value <= bound else "no") for figure, bound, text, value in rows]
    return pd.DataFrame(told, columns=COLUMNS)


def summary_sentence(table: pd.DataFrame) -> str:
    """The one sentence of 06_budget, and from which budget on the first figure of `wanted` is reached."""
    ratio, low, high = over_int8(table)
    ours, int8 = _at(table, "allocator", "mixed", RATE), _uniform(table, "uniform").iloc[-1]
    rows = table[(table["method"] == "allocator") & (table["granularity"] == "mixed")].sort_values("budget_bits")
    half = rows[rows["damage"] <= 0.5 * int8["damage"]]
    from_there = f"from {half['budget_bits'].iloc[0]:g} bits per weight on" if len(half) else "nowhere"
    return (
        f"At {ours['mem_mib']:.2f} MiB ({ours['mem_share']:.1%} of FP32, 4 bits per weight) the allocator does {ratio:.2f} "
        f"[{low:.2f}, {high:.2f}] times the damage to the model's output that uniform INT8 does at {int8['mem_mib']:.2f} MiB. "
        f"It does half of that damage or less {from_there}."
    )


def _at(table: pd.DataFrame, method: str, granularity: str, bits: float) -> pd.Series:
    return table[(table["method"] == method) & (table["granularity"] == granularity) & np.isclose(table["budget_bits"], bits)].iloc[
        0
    ]


def _uniform(table: pd.DataFrame, method: str) -> pd.DataFrame:
    """The uniform integer rows, smallest first."""
    rows = table[(table["method"] == method) & (table["budget_bits"] < 10)]
    return rows.sort_values("budget_bits")
