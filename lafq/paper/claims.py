"""The paper's claims, each as one number with a 95 % interval and a verdict that follows from it.

A claim says that a number lies on one side of a bound. It "holds" when the whole interval does, "does not hold" when the
whole interval lies on the other side, and "cannot be told" otherwise.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lafq.evaluation import bootstrap
from lafq.evaluation.scoring import make_scorer
from lafq.paper import poster
from lafq.rng import generator

FRONT = ("Layer1", "Layer2")
HALF = 500
LAYERWISE = ("group", "mean_std", "ratio")


class Claim(NamedTuple):
    """A row of claims.csv: `quantity` is what was measured, `measured` its value with the interval low..high."""

    claim: str
    paper: str
    quantity: str
    measured: float
    low: float
    high: float
    verdict: str


def sentence(claim: Claim) -> str:
    """A claim in words."""
    return (
        f"{claim.claim} ({claim.paper}) {claim.verdict}: {claim.quantity} is {claim.measured:.4g}, "
        f"95 % interval {claim.low:.4g} to {claim.high:.4g}."
    )


def verdict(low: float, high: float, bound: float, above: bool) -> str:
    """Whether the interval low..high lies above (or, with above=False, below) the bound."""
    if not above:
        low, high, bound = -high, -low, -bound
    return "holds" if low > bound else "does not hold" if high < bound else "cannot be told"


def later_steps(timesteps: pd.DataFrame, seed: int) -> Claim:
    """C1 on `parameter, weights, t_low, fisher` rows; the interval resamples the weight tensors."""
    early = timesteps["t_low"] < HALF
    sums = [_sums(timesteps[part]) for part in (early, ~early)]
    measured, low, high = _ratio(*sums, seed, together=True)
    quantity = f"mean Fisher per weight at t < {HALF} over that at t >= {HALF}"
    return Claim(
        "C1",
        "later steps of the reverse process (t near 0) have higher Fisher values",
        quantity,
        measured,
        low,
        high,
        verdict(low, high, 1, True),
    )


def front_layers(timesteps: pd.DataFrame, seed: int) -> Claim:
    """C2 on `parameter, layer, weights, fisher` rows; the interval resamples the weight tensors of each side."""
    front = timesteps["layer"].isin(FRONT)
    measured, low, high = _ratio(_sums(timesteps[front]), _sums(timesteps[~front]), seed, together=False)
    quantity = "mean Fisher per weight of Layers 1-2 over that of Layers 3-6"
    return Claim(
        "C2", "Layers 1 and 2 have notably higher Fisher values", quantity, measured, low, high, verdict(low, high, 1, True)
    )


def best_ratio(table: pd.DataFrame, images: dict[str, np.ndarray], low: str, seed: int) -> Claim:
    """C3 for one format, by weight: rows of the ratio sweep with their images; the interval resamples the images."""
    rows = table[(table["method"] == "ratio") & (table["format"] == low) & (table["granularity"] == "weight")]
    rows = rows[rows["threshold"].isin([f"{r:.2f}" for r in poster.RATIOS])]
    inside = rows["threshold"].astype(float).between(*poster.BEST_RATIOS)
    shares = np.where(inside, 1 / inside.sum(), -1 / (~inside).sum())
    quantity = f"mean FID of the ratios in 0.35-0.40 less that of the others ({low}, single weights)"
    return _contrast("C3", "the best ratio lies in 0.35-0.40", quantity, rows["sample"].tolist(), shares.tolist(), images, seed)


def layerwise_images(table: pd.DataFrame, images: dict[str, np.ndarray], seed: int) -> Claim:
    """C4, images: the layer-wise row with INT8 that is nearest in size to uniform FP16, against uniform FP16."""
    uniform = _uniform_fp16(table)
    rows = table[table["method"].isin(LAYERWISE) & (table["format"] == "int8")]
    row = rows.loc[(rows["mem_mib"] - uniform["mem_mib"]).abs().idxmin()]
    quantity = (
        f"FID of {row['method']} {row['threshold']}, INT8 {row['granularity']} ({row['mem_mib']:.2f} MiB) less uniform FP16's "
        f"({uniform['mem_mib']:.2f} MiB)"
    )
    said = "thresholds by layer give better images than uniform quantization"
    return _contrast("C4 images", said, quantity, [row["sample"], uniform["sample"]], [1, -1], images, seed)


def layerwise_size(table: pd.DataFrame) -> Claim:
    """C4, compression: a count of bytes, so without an interval."""
    rows = table[table["method"].isin(LAYERWISE) & (table["format"] == "fp16") & (table["kept_share"] > 0)]
    row = rows.loc[rows["mem_mib"].idxmin()]
    share = row["mem_mib"] / _uniform_fp16(table)["mem_mib"]
    named = f"{row['method']} {row['threshold']}, FP16 {row['granularity']}"
    quantity = f"bytes of {named} (the smallest that keeps any weight) over uniform FP16's"
    said = "thresholds by layer compress better than uniform quantization"
    return Claim("C4 size", said, quantity, share, share, share, verdict(share, share, 1, above=False))


def claims_table(timesteps: pd.DataFrame, table: pd.DataFrame, images: dict[str, np.ndarray], seed: int) -> pd.DataFrame:
    """All claims: timesteps from 02_fisher, the rows of 03-05 with their images by `sample`."""
    found = [later_steps(timesteps, seed), front_layers(timesteps, seed)]
    found += [best_ratio(table, images, low, seed) for low in ("fp16", "int8")]
    return pd.DataFrame([*found, layerwise_size(table), layerwise_images(table, images, seed)])


def _contrast(
    claim: str, said: str, quantity: str, samples: list[str], shares: list[float], images: dict[str, np.ndarray], seed: int
) -> Claim:
    count = len(images[samples[0]])
    score = make_scorer(count, seed, None)
    value, draws = 0.0, torch.zeros(bootstrap.RESAMPLES, dtype=torch.float64)
    scored = {key: score(torch.from_numpy(images[key])[:, None]) for key in dict.fromkeys(samples)}
    for key, share in zip(samples, shares, strict=True):
        value += share * scored[key].values["fid_mnist"]
        draws = draws + share * scored[key].draws["fid_mnist"]
    low, high = bootstrap.interval(value, draws)
    return Claim(claim, said, f"{quantity}, N = {count}", value, low, high, verdict(low, high, 0, above=False))


def _uniform_fp16(table: pd.DataFrame) -> pd.Series:
    return table[(table["method"] == "uniform") & (table["format"] == "fp16")].iloc[0]


def _sums(rows: pd.DataFrame) -> Tensor:
    """By weight tensor: the sum of its Fisher values and its number of weights, (tensors, 2)."""
    rows = rows.assign(total=rows["fisher"] * rows["weights"])
    return torch.from_numpy(rows.groupby("parameter", sort=False)[["total", "weights"]].sum().to_numpy(float))


def _ratio(a: Tensor, b: Tensor, seed: int, together: bool) -> tuple[float, float, float]:
    """Ratio of two means a weight; interval of its logarithm over resampled tensors (the same of both sides, if together)."""

    def log_mean(sums: Tensor) -> Tensor:
        return (sums[..., 0].sum(-1) / sums[..., 1].sum(-1)).log()

    def draw(count: int, stream: int) -> Tensor:
        return torch.randint(count, (bootstrap.RESAMPLES, count), generator=generator(seed, stream))

    first = draw(len(a), 0)
    second = first if together else draw(len(b), 1)
    value = (log_mean(a) - log_mean(b)).item()
    low, high = bootstrap.interval(value, log_mean(a[first]) - log_mean(b[second]))
    return math.exp(value), math.exp(low), math.exp(high)
