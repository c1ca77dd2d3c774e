"""A candidate: a quantization plan with the names under which its row stands in every table."""

from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from lafq.diffusion.unet import quantizable
from lafq.quantization.formats import MIB
from lafq.quantization.model import kept_weights, nbytes
from lafq.quantization.plan import Plan

KEY = ["method", "threshold", "format", "unit"]


class Candidate(NamedTuple):
    """A row to evaluate: its key in every table, its precision plan, and whether Inception shall see its images.

    target: what picks the threshold, where it is found from the Fisher values ("" where the threshold itself is given). made:
    what the recipe of its images says of rounding and Fisher information, where that is not as in the paper's rows (see
    `samples.recipe`).
    """

    method: str
    threshold: str
    format: str
    unit: str
    plan: Plan
    inception: bool = False
    target: str = ""
    made: dict[str, Any] | None = None


BASELINE = Candidate("baseline", "none", "fp32", "none", {})


def sizes(model: nn.Module, plans: list[Plan]) -> pd.DataFrame:
    """Kept share, stored MiB and share of the FP32 bytes, one row a plan."""
    full = nbytes(model, {})
    stored = [(kept_share(model, plan), nbytes(model, plan)) for plan in plans]
    table = pd.DataFrame(stored, columns=["kept_share", "mem_mib"])
    return table.assign(mem_mib=table["mem_mib"] / MIB, mem_share=table["mem_mib"] / full)


def kept_share(model: nn.Module, plan: Plan) -> float:
    """Share of the six layers' weights that the plan leaves in FP32."""
    weights = quantizable(model)
    return sum(kept_weights(model, plan, n) for n in weights) / sum(w.numel() for w in weights.values())
