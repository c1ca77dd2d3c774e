"""The paper's claims, each as one number with a 95 % interval and a verdict that follows from it
(`verdict.verdict`).

C1 and C2 are about Fisher information: intervals resample blocks of samples, the same blocks for
all weight tensors. C3 and C4 are
about images: intervals resample the images, the same ones in every row.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lafq.rng import generator
from lafq.study import poster
from lafq.study.diffusion.unet import layer_of
from lafq.study.images import metrics
from lafq.study.images.evaluate import Scored, Scorer
from lafq.study.images.features import FeatureExtractor, mnist_extractor
from lafq.study.verdict import FID_MARGIN, MARGIN_IMAGES, holm, verdict

FRONT = ("Layer1", "Layer2")
HALF = 500
LAYERWISE = ("group", "mean_std", "ratio")
NULL = {"C1": 1.0, "C2": 1.0, "C2 share": 0.5}  # C3 and C4: 0
SAID = {
    "C1": "later steps of the reverse process (t near 0) have higher Fisher values",
    "C2": "Layers 1 and 2 have notably higher Fisher values",
    "C2 share": "Layers 1 and 2 have notably higher Fisher values",
    "C3": "the best ratio lies in 0.35-0.40",
    "C4 images": "thresholds by layer give better images than uniform quantization",
}


class Claim(NamedTuple):
    """A row of claims.csv: `quantity` is what was measured, `measured` its value with the interval
    low..high.

    p: where a claim was tested more than once, corrected for the number of tests. note: what else
    belongs to it.
    """

    claim: str
    paper: str
    quantity: str
    measured: float
    low: float
    high: float
    verdict: str
    p: float = math.nan
    note: str = ""


class Judge(NamedTuple):
    """FID of a row's images, by its `sample`: with its bootstrap draws, the features it is on, and
    the margin of the verdict.
    """

    scored: Callable[[str], Scored]
    metric: str
    features: str
    margin: float


def judge(images: dict[str, np.ndarray], seed: int, inception: FeatureExtractor | None) -> Judge:
    """The judge of rows with these images, uint8 (N, 32, 32): on Inception features, or without
    them on the classifier's.
    """
    count = len(next(iter(images.values())))
    scorer, extractor = Scorer(count, seed), inception or mnist_extractor()

    @cache
    def scored(sample: str) -> Scored:
        return scorer.score(torch.from_numpy(images[sample])[:, None], [extractor])

    features, margin = "MNIST", 0.0
    if inception:
        features, margin = "Inception", FID_MARGIN * (count == MARGIN_IMAGES)
    return Judge(scored, f"fid_{extractor.name}", f"{features} features, N = {count}", margin)


def fisher_claims(blocks: pd.DataFrame, weights: pd.Series, kind: str, seed: int) -> list[Claim]:
    """C1 and C2 on rows `parameter, t_low, block, fisher`; weights: number of weights by parameter;
    kind: of Fisher information.

    C1 compares the two halves of the timesteps. C2 compares Layers 1-2 with Layers 3-6 per weight,
    and asks whether they have more than half of the trace.
    """
    front = {name: layer_of(name) in FRONT for name in weights.index}
    trace = blocks.assign(
        trace=blocks["fisher"] * blocks["parameter"].map(weights),
        front=blocks["parameter"].map(front),
    )
    # Front and other layers, by timestep bin and block: (2, bins, blocks).
    sums = trace.pivot_table(
        index=["front", "t_low"], columns="block", values="trace", aggfunc="sum"
    ).dropna(axis=1)
    value = torch.stack(
        [torch.from_numpy(sums.loc[side].to_numpy(copy=True)) for side in (True, False)]
    )
    early = torch.tensor([t < HALF for t in sums.loc[True].index])
    bins, count = value.shape[1:]
    chosen = torch.randint(
        count, (metrics.RESAMPLES, bins, count), generator=generator(seed, count)
    )
    draws = torch.stack([side.expand(len(chosen), -1, -1).gather(2, chosen) for side in value], 1)
    of_front = weights[[n for n in weights.index if front[n]]].sum() / weights.sum()

    def halves(found: Tensor) -> Tensor:
        by_bin = found.mean(-1).sum(-2)
        return (by_bin[..., early].mean(-1) / by_bin[..., ~early].mean(-1)).log()

    def share(found: Tensor) -> Tensor:
        by_side = found.mean(-1).sum(-1)
        return by_side[..., 0] / by_side.sum(-1)

    def per_weight(found: Tensor) -> Tensor:
        return (share(found) / of_front).log() - ((1 - share(found)) / (1 - of_front)).log()

    quantities = {
        "C1": (halves, f"mean Fisher at t < {HALF} divided by that at t >= {HALF}"),
        "C2": (per_weight, "mean Fisher per weight, Layers 1-2 divided by Layers 3-6"),
        "C2 share": (
            share,
            f"share of all Fisher information in Layers 1-2, which have {of_front:.1%} of the "
            f"weights",
        ),
    }
    found = []
    for claim, (quantity, words) in quantities.items():
        measured = quantity(value).item()
        ends = (measured, *metrics.interval(measured, quantity(draws)))
        ends = ends if claim == "C2 share" else tuple(math.exp(end) for end in ends)
        found.append(
            Claim(
                claim,
                SAID[claim],
                f"{words} ({kind})",
                *ends,
                verdict(*ends[1:], above=True, null=NULL[claim]),
            )
        )
    return found


def best_ratio(
    table: pd.DataFrame, by: Judge, formats: Sequence[str] = ("fp16", "int8")
) -> list[Claim]:
    """C3 for each format whose ratio sweep, by weight, is in the table; p values corrected for the
    number of formats.
    """
    found = []
    for low in formats:
        rows = table[
            (table["rule"] == "ratio")
            & (table["format"] == low)
            & (table["granularity"] == "weight")
        ]
        rows = rows[rows["setting"].isin([f"{r:.2f}" for r in poster.RATIOS])].drop_duplicates(
            "setting"
        )
        inside = rows["setting"].astype(float).between(*poster.BEST_RATIOS).to_numpy(copy=True)
        if inside.all() or not inside.any():
            continue
        scored = [by.scored(sample) for sample in rows["sample"]]
        values = torch.tensor([s.values[by.metric] for s in scored])
        draws = torch.stack([s.draws[by.metric] for s in scored], 1)
        best = inside[draws.argmin(1).numpy()].mean()
        note = f"the best ratio is one of 0.35-0.40 in {best:.0%} of resamples (by chance: {inside.mean():.0%})"
        contrasts = [v[..., inside].mean(-1) - v[..., ~inside].mean(-1) for v in (values, draws)]
        quantity = f"mean FID of ratios 0.35-0.40 minus the others' ({low.upper()}, single weights kept; {by.features})"
        found.append(
            (
                _contrast("C3", quantity, contrasts[0].item(), contrasts[1], by.margin)._replace(
                    note=note
                ),
                contrasts[1],
            )
        )
    corrected = holm([_p_value(claim.measured, draws) for claim, draws in found])
    return [
        claim._replace(
            p=p, verdict=verdict(claim.low, claim.high, above=False, margin=by.margin, p=p)
        )
        for (claim, _), p in zip(found, corrected, strict=True)
    ]


def layerwise_images(table: pd.DataFrame, by: Judge) -> Claim:
    """C4, images: of the layer-wise rows with INT8 the nearest in size to uniform FP16, against
    uniform FP16.
    """
    uniform = table[(table["rule"] == "uniform") & (table["format"] == "fp16")].iloc[0]
    rows = table[table["rule"].isin(LAYERWISE) & (table["format"] == "int8")]
    row = rows.loc[(rows["mem_mib"] - uniform["mem_mib"]).abs().idxmin()]
    named = (
        f"{row['rule']} {row['setting']}, INT8 by {row['granularity']} ({row['mem_mib']:.2f} MiB)"
    )
    quantity = (
        f"FID of {named} minus FID of uniform FP16 ({uniform['mem_mib']:.2f} MiB; {by.features})"
    )
    first, second = by.scored(row["sample"]), by.scored(uniform["sample"])
    draws = first.draws[by.metric] - second.draws[by.metric]
    return _contrast(
        "C4 images", quantity, first.values[by.metric] - second.values[by.metric], draws, by.margin
    )


def _contrast(claim: str, quantity: str, measured: float, draws: Tensor, margin: float) -> Claim:
    low, high = metrics.interval(measured, draws)
    return Claim(
        claim,
        SAID[claim],
        quantity,
        measured,
        low,
        high,
        verdict(low, high, above=False, margin=margin),
    )


def _p_value(measured: float, draws: Tensor) -> float:
    """Two-sided p of a difference of 0: the smallest alpha whose centred interval leaves 0 out, at
    least one resample's share.
    """
    centred = measured - (draws - draws.mean())
    tail = min((centred >= 0).double().mean().item(), (centred <= 0).double().mean().item())
    return min(1.0, 2 * max(tail, 1 / len(draws)))
