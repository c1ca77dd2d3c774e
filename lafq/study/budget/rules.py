"""Do thresholds by layer beat one threshold for the whole model, at equal bytes and with equal
rounding?
"""

import numpy as np
import pandas as pd

from lafq.study.claims import Claim, judge
from lafq.study.images import metrics
from lafq.study.verdict import verdict

RATE = 4.0  # bits per weight at which the claims are tested
LAYERWISE = {
    "ratio": "ratio (one threshold per layer)",
    "group": "group (one threshold per group)",
    "mean_std": "mean_std (one threshold per layer)",
}
SAID = "several thresholds are better than one for all"


def rules_at_equal_bytes(table: pd.DataFrame, rounding: str) -> pd.DataFrame:
    """Damage of every threshold rule over that of one threshold for all, by budget; rows of
    `budget.measure_candidates`.

    One row per rule, one column per
    budget, intervals in brackets.
    """
    rows = table[(table["rounding"] == rounding) & table["over_global"].notna()]
    cells = [over_global(row) for _, row in rows.iterrows()]
    cells = np.where(
        rows["rule"] == "global",
        [f"1 (damage {d:.1e})" for d in rows["damage"]],
        cells,
    )
    named = rows.assign(cell=cells)
    named["budget"] = [f"{bits:g} bits per weight" for bits in named["budget_bits"]]
    found = named.pivot(index="rule", columns="budget", values="cell")
    return (
        found.loc[named["rule"].unique(), named["budget"].unique()]
        .rename_axis(columns=None)
        .reset_index()
    )


def over_global(row: pd.Series) -> str:
    """A row's damage over that of one threshold, with its interval."""
    value, low, high = (
        f"{v:,.0f}" if v >= 10 else f"{v:.1f}"
        for v in row[[f"over_global{end}" for end in ("", "_low", "_high")]]
    )
    return f"{value} [{low}, {high}]"


def damage_claims(table: pd.DataFrame, rounding: str) -> list[Claim]:
    """Damage of every layer-wise rule over that of the global one, rounded alike, at RATE bits per
    weight.
    """
    alike = table[np.isclose(table["budget_bits"], RATE) & (table["rounding"] == rounding)]
    at_rate = alike[alike["granularity"] == "weight"].set_index("rule")
    found = []
    for rule, words in LAYERWISE.items():
        row = at_rate.loc[rule]
        ends = row["over_global_low"], row["over_global_high"]
        quantity = f"damage of {words} divided by that of global ({RATE:g} bits per weight, equal bytes and rounding)"
        said = verdict(*ends, above=False, null=1.0)
        found.append(Claim("rules", SAID, quantity, row["over_global"], *ends, said))
    return found


def image_claims(
    table: pd.DataFrame,
    images: dict[str, np.ndarray],
    seed: int,
    size: str = f"{RATE:g} bits per weight",
) -> list[Claim]:
    """FID of every layer-wise rule's row minus that of the global one; the table's rows are rounded
    alike and of equal bytes.

    size: these bytes, in words.
    """
    by, samples = judge(images, seed, None), table.set_index("rule")["sample"]
    whole, found = by.scored(samples["global"]), []
    for rule in (rule for rule in LAYERWISE if rule in samples):
        own = by.scored(samples[rule])
        value = own.values[by.metric] - whole.values[by.metric]
        ends = metrics.interval(value, own.draws[by.metric] - whole.draws[by.metric])
        quantity = f"FID of {LAYERWISE[rule]} minus that of global ({size}; {by.features})"
        found.append(Claim("rules", SAID, quantity, value, *ends, verdict(*ends, above=False)))
    return found
