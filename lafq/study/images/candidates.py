"""A candidate: a quantization plan with the names under which its row stands in every table."""

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

KEY = ["method", "threshold", "format", "granularity"]


class Candidate(NamedTuple):
    """A row to evaluate: its key in every table, its quantization plan, and whether Inception
    features are computed for it.

    target: how the threshold was found from the Fisher values ("" where the threshold itself is
    given). made: what the provenance of its images says of rounding and Fisher information, where
    that is not as in the paper's rows (`samples.provenance`). bits: the budget in bits per weight
    (0: none). tuned: for how many steps biases and norms are tuned after rounding.
    """

    method: str
    threshold: str
    format: str
    granularity: str
    plan: Entries
    inception: bool = False
    target: str = ""
    made: dict[str, Any] | None = None
    bits: float = 0.0
    tuned: int = 0


BASELINE = Candidate("baseline", "none", "fp32", "none", {})


def quantized(model: nn.Module, candidate: Candidate, seed: int) -> nn.Module:
    """The quantized copy of a model under a candidate's plan, tuned on noised training digits where
    the candidate says so.
    """
    small = quantize(model, candidate.plan)
    if candidate.tuned:
        # Plans are made from the digits of `seed` and validated on those of seed + 1.
        tune(
            model,
            small,
            noised_batches(mnist(train=True)[0], candidate.tuned * BATCH, seed + 2, BATCH),
            candidate.tuned,
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
