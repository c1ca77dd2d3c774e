"""A row of a table: the rule and setting that made a quantization plan, how it stores and rounds
the weights, and the plan itself.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from lafq.quantization.formats import MIB
from lafq.quantization.model import kept_weights, nbytes, quantize
from lafq.quantization.plan import Entries
from lafq.quantization.tuning import BATCH, tune
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.unet import quantizable

KEY = ["rule", "setting", "format", "granularity", "rounding"]
BUDGET_KEY = ["rule", "format", "granularity", "rounding", "budget_bits"]


class Row(NamedTuple):
    """A model to evaluate: its key in every table, and its quantization plan.

    rule: what chose the plan: "baseline", "uniform", a threshold rule, "allocate", or
    "allocate_all" where the allocator may also choose for the input and output convolutions.
    setting: the rule's threshold, ratio or bits per weight, as text.
    format: the low format; "any" where the allocator chose, "coded" in an entropy-coded file.
    rounding: "none", "nearest" (code), "feedback" (error feedback), or "tuned" (feedback, then
    biases and norms for `tuned` steps).
    inception: whether Inception features are computed for it. target: how the threshold was found
    from the Fisher values ("" where the threshold itself is given). made: what the recipe of its
    images says of rounding and Fisher information, where that is not as in the paper's rows
    (`recipe`). bits: the budget in bits per weight (0: none).
    """

    rule: str
    setting: str
    format: str
    granularity: str
    rounding: str
    plan: Entries
    inception: bool = False
    target: str = ""
    made: dict[str, Any] | None = None
    bits: float = 0.0
    tuned: int = 0

    @property
    def key(self) -> dict[str, str]:
        """Its columns KEY."""
        return dict(zip(KEY, self, strict=False))

    @property
    def budget_key(self) -> dict[str, str | float]:
        """Its columns BUDGET_KEY."""
        key = self.key | {"budget_bits": round(self.bits, 3)}
        return {name: key[name] for name in BUDGET_KEY}


BASELINE = Row("baseline", "none", "fp32", "none", "none", {})


# How recipes spell rules and roundings. Keys of kept images are made of these words, and images
# take hours: none may change.
NEAREST_CODE = "nearest code, scale of the largest weight"
FEEDBACK = "error feedback, unshrunk scales"
RECIPE_ROUNDING = {"nearest": "", "feedback": ", error feedback"}
RECIPE_ALLOCATOR = {"nearest": ", nearest code", "feedback": "", "tuned": ", tuned"}


def recipe(
    row: Row, weights: str, fisher: dict[str, int], names: Collection[str] = ()
) -> dict[str, Any]:
    """How the weights of a row are made from the FP32 weights with the sha256 `weights`.

    fisher: samples, bins and seed of the empirical Fisher information. names: of all weights that
    the uniform rows quantize. A plan that stores them all alike is the uniform row, or the
    baseline, whatever rule made it; nothing else is read from the plan.
    """
    low = {entry for entry in row.plan.values() if isinstance(entry, str)}
    if not row.plan and names:
        row = BASELINE
    elif row.rounding == "nearest" and len(low) == 1 and row.plan == dict.fromkeys(names, *low):
        row = Row("uniform", "all", low.pop(), "tensor", "nearest", row.plan)
    found = {
        "weights": weights,
        "rule": _rule_in_recipes(row),
        "threshold": row.setting,
        "format": "bits" if row.bits else row.format,
        "granularity": row.granularity,
        "rounding": NEAREST_CODE,
    }
    if row.rule in ("baseline", "uniform"):
        return found
    if row.format == "coded":
        found |= {"rule": "shipped", "format": "entropy-coded"}
    found |= {
        "threshold": row.target or row.setting,
        "kept": "fp32",
        "fisher": {"kind": "empirical", **fisher},
    }
    return found | (row.made or {})


def _rule_in_recipes(row: Row) -> str:
    if row.rule == "allocate_all":
        return "allocator, all weights"
    if row.rule == "allocate":
        return f"allocator{RECIPE_ALLOCATOR[row.rounding]}"
    return row.rule + RECIPE_ROUNDING.get(row.rounding, "")


def by_budget(table: pd.DataFrame) -> pd.DataFrame:
    """A table of rows with the budget in bits per weight (BUDGET_KEY) in place of the setting."""
    table = table.rename(columns={"setting": "budget_bits"})
    return table[[*BUDGET_KEY, *table.columns.drop(BUDGET_KEY)]]


def quantized(model: nn.Module, row: Row, seed: int) -> nn.Module:
    """The quantized copy of a model under a row's plan, tuned on noised training digits where the
    row says so.
    """
    small = quantize(model, row.plan)
    if row.tuned:
        # Plans are made from the digits of `seed` and validated on those of seed + 1.
        tune(
            model,
            small,
            noised_batches(mnist(train=True)[0], row.tuned * BATCH, seed + 2, BATCH),
            row.tuned,
        )
    return small


def sizes(model: nn.Module, plans: list[Entries]) -> pd.DataFrame:
    """Kept share of the six layers' weights, stored MiB of the whole model and their share of
    FP32's, one row per plan.
    """
    full, stored = nbytes(model, {}), [nbytes(model, plan) for plan in plans]
    columns = {"kept_share": [kept_share(model, plan) for plan in plans]}
    return pd.DataFrame(
        columns | {"mem_mib": [n / MIB for n in stored], "mem_share": [n / full for n in stored]}
    )


def kept_share(model: nn.Module, plan: Entries) -> float:
    """Share of the six layers' weights that the plan leaves in FP32."""
    weights = quantizable(model)
    return sum(kept_weights(model, plan, n) for n in weights) / sum(
        w.numel() for w in weights.values()
    )
