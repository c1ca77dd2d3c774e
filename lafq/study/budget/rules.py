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
