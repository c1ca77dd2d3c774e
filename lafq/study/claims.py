"""Claims, each as one number with a 95 % interval and a verdict that follows from it.

C1 and C2 are about Fisher information: intervals resample blocks of samples, the same blocks for
all weight tensors. C3 and C4 are about images: intervals resample the images, the same ones in
every row. Claims about threshold rules, which the poster does not make, compare several thresholds
with one for all, on damage and on images. Over training runs the interval is Student's t.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from lafq.rng import generator
from lafq.study import poster
from lafq.study.diffusion.subject import FRONT, layer_of
from lafq.study.images import metrics
from lafq.study.images.features import FeatureExtractor, inception_extractor, mnist_extractor
from lafq.study.results import load_rows
from lafq.study.workspace import Workspace, load_optional, load_table

# Inception features at N = 100: a third of the gain that the poster shows for ratio 0.35 over its
# baseline (59.30 - 56.21 = 3.09). Set on 2026-11-25, when the results of the small profile were
# known, and of the poster's size those at 100 steps; the rows at 1,000 steps were drawn afterwards.
# MNIST features, at any N: a share of FP32's FID, set when all results were known. Neither is a
# preregistration. Inception features at other N have no margin.
FID_MARGIN, MARGIN_IMAGES = 1.0, 100
MNIST_MARGIN = 0.03
LEVEL = 0.05
Claim = dict[str, Any]
Images = dict[str, np.ndarray]  # uint8 (N, 32, 32), by `sample`
HALF = 500
LAYERWISE = ("ratio", "group", "mean_std")
RATIOS_OF_MEANS = ("C1", "C2")
ABOVE = ("C1", "C2", "C2 share")  # the others say that their number lies below NULL
NULL = {"C1": 1.0, "C2": 1.0, "C2 share": 0.5, "C4 bytes": 1.0}  # others: 0
OF_A_RUN = ["seed", "steps", "claim", "measured", "low", "high", "verdict", "p", "margin"]
COMPARED = ["rule", "setting", "format", "granularity", "mem_mib"]  # of the row that C4 compares
RATE = 4.0  # bits per weight at which claims about rules are tested


def verdict(
    low: float, high: float, *, above: bool, null: float = 0.0, margin: float = 0.0, p: float = 0.0
) -> str:
    """ "supported", "contradicted", "not seen: below 1 FID" (the margin) or "inconclusive".

    The claim says that a quantity lies above `null` (or, with above=False, below it); low..high is
    its 95 % interval. "Not seen": the whole interval lies within `margin` of null. "Supported"
    and "contradicted": the whole interval lies on one side of null, and `p`, where it has been
    corrected for several tests, is below 0.05.
    """
    low, high = (low - null, high - null) if above else (null - high, null - low)
    if -margin < low and high < margin:
        return f"not seen: below {margin:.2g} FID"
    if p >= LEVEL or low <= 0 <= high:
        return "inconclusive"
    return "supported" if low > 0 else "contradicted"


def holm(p: list[float]) -> list[float]:
    """P values corrected for their number (Holm 1979, Scandinavian Journal of Statistics 6)."""
    ascending = pd.Series(p, dtype=float).sort_values()
    corrected = (ascending * np.arange(len(p), 0, -1)).cummax().clip(upper=1)
    return corrected.sort_index().tolist()


def _claim(
    claim: str, measured: float, low: float, high: float, margin: float = math.nan, **fields: Any
) -> Claim:
    """A row of claims.csv (columns: results/README.md); fields: what the number is of."""
    side = {"above": claim in ABOVE, "null": NULL.get(claim, 0.0)}
    fields = {"p": math.nan, "margin": margin} | fields
    holds = verdict(low, high, **side, margin=margin, p=fields["p"])
    number = {"claim": claim, "measured": measured, "low": low, "high": high}
    return number | {"verdict": holds} | fields


class Judge(NamedTuple):
    """FID of rows' images, by `sample`, with its draws, on these features; the verdicts' margin."""

    fid: Callable[[str], tuple[float, Tensor]]
    features: str
    n_images: int
    margin: float

    def claim(self, claim: str, measured: float, draws: Tensor, **fields: Any) -> Claim:
        """A claim that a difference of FIDs is below 0."""
        ends = metrics.interval(measured, draws)
        fields |= {"features": self.features, "n_images": self.n_images}
        return _claim(claim, measured, *ends, self.margin, **fields)

    def difference(self, claim: str, sample: str, other: str, **fields: Any) -> Claim:
        """A claim that the FID of one sample is below the other's."""
        (ours, draws), (theirs, their_draws) = self.fid(sample), self.fid(other)
        return self.claim(claim, ours - theirs, draws - their_draws, **fields)


def judge(
    table: pd.DataFrame, images: Images, seed: int, inception: FeatureExtractor | None = None
) -> Judge:
    """The judge of a table's rows, on Inception's or else on the classifier's features."""
    count = len(next(iter(images.values())))
    extractor = inception or mnist_extractor()

    @cache
    def fid(sample: str) -> tuple[float, Tensor]:
        features = extractor.features(torch.from_numpy(images[sample])[:, None]).features
        indices = metrics.resamples(len(features), seed)
        draws = metrics.fid_draws(features, extractor.reference, indices)
        return metrics.fid(features, extractor.reference), draws

    if inception:
        return Judge(fid, "Inception", count, FID_MARGIN if count == MARGIN_IMAGES else math.nan)
    fp32 = [fid(sample)[0] for sample in table.loc[table["rule"] == "baseline", "sample"]]
    return Judge(fid, "MNIST", count, MNIST_MARGIN * fp32[0] if fp32 else math.nan)


def fisher_claims(blocks: pd.DataFrame, weights: pd.Series, kind: str, seed: int) -> list[Claim]:
    """C1 and C2 on rows `parameter, t_low, block, fisher` of a kind of Fisher information; weights:
    number of weights by parameter. C2 share: whether Layers 1-2 have more than half of the trace.
    """
    back = ~blocks["parameter"].map(layer_of).isin(FRONT)
    trace = blocks["fisher"] * blocks["parameter"].map(weights)
    sums = trace.groupby([back, blocks["t_low"], blocks["block"]]).sum()
    sums = sums.unstack("block").dropna(axis=1)
    early = torch.tensor(sums.loc[False].index < HALF)
    measured = torch.tensor(sums.to_numpy()).view(2, len(early), -1)
    front = float(weights[weights.index.map(layer_of).isin(FRONT)].sum() / weights.sum())
    g, (_, bins, count) = generator(seed, measured.shape[-1]), measured.shape
    chosen = torch.randint(count, (metrics.RESAMPLES, 1, bins, count), generator=g)
    draws = measured.expand(len(chosen), -1, -1, -1).gather(3, chosen.expand(-1, 2, -1, -1))
    values, spread = (_c1_and_c2(traces, early, front) for traces in (measured, draws))
    claims = []
    for claim, value in values.items():
        ends = value.item(), *metrics.interval(value.item(), spread[claim])
        ends = map(math.exp, ends) if claim in RATIOS_OF_MEANS else ends
        claims.append(_claim(claim, *ends, kind=kind, front_weights=front))
    return claims


def _c1_and_c2(trace: Tensor, early: Tensor, front_weights: float) -> dict[str, Tensor]:
    """The claims' numbers, of ratios the logarithm. trace: of Layers 1-2 and of the others by
    timestep bin and block (..., 2, bins, blocks); early: which bins are (bins,).
    """
    by_bin = trace.mean(-1)
    halves = by_bin.sum(-2)
    by_side = by_bin.sum(-1)
    share = by_side[..., 0] / by_side.sum(-1)
    return {
        "C1": (halves[..., early].mean(-1) / halves[..., ~early].mean(-1)).log(),
        "C2": (share / front_weights).log() - ((1 - share) / (1 - front_weights)).log(),
        "C2 share": share,
    }


def all_fisher_claims(work: Workspace, seed: int) -> list[Claim]:
    """C1 and C2 on every kind of Fisher information that 02 has estimated."""
    weights = load_table(work, "02_fisher").drop_duplicates("parameter")
    by_name = weights.set_index("parameter")["weights"]
    kinds = [("empirical, noised digits", load_table(work, "02_fisher_blocks"))]
    others = load_optional(work, "02_fisher_kinds")
    if others is not None:
        kinds += others.groupby("kind", sort=False)
    return [c for kind, blocks in kinds for c in fisher_claims(blocks, by_name, kind, seed)]


def best_ratio(table: pd.DataFrame, by: Judge) -> list[Claim]:
    """C3 for each format whose ratio sweep, by weight, is in the table: mean FID of the ratios 0.35
    to 0.40 minus the others'; p values corrected for the number of formats.
    """
    tested, published = [], [f"{r:.2f}" for r in poster.RATIOS]
    for low in ("fp16", "int8"):
        rows = table.query("rule == 'ratio' and format == @low and granularity == 'weight'")
        rows = rows[rows["setting"].isin(published)].drop_duplicates("setting")
        inside = rows["setting"].astype(float).between(*poster.BEST_RATIOS).to_numpy(copy=True)
        if inside.any() and not inside.all():
            values, draws = zip(*map(by.fid, rows["sample"]), strict=True)
            values, draws = torch.tensor(values), torch.stack(draws, 1)
            measured, spread = (
                fid[..., inside].mean(-1) - fid[..., ~inside].mean(-1) for fid in (values, draws)
            )
            best = inside[draws.argmin(1).numpy()].mean()
            fields = {"format": low, "best_share": best, "chance": inside.mean()}
            tested.append((measured.item(), spread, fields))
    corrected = holm([_p_value(measured, spread) for measured, spread, _ in tested])
    return [
        by.claim("C3", measured, spread, p=p, **fields)
        for (measured, spread, fields), p in zip(tested, corrected, strict=True)
    ]


def _p_value(measured: float, draws: Tensor) -> float:
    """Two-sided p of a difference of 0: the smallest alpha whose centred interval leaves 0 out, at
    least one resample's share.
    """
    centred = measured - (draws - draws.mean())
    tail = min((centred >= 0).double().mean().item(), (centred <= 0).double().mean().item())
    return min(1.0, 2 * max(tail, 1 / len(draws)))


def layerwise_images(table: pd.DataFrame, by: Judge) -> Claim:
    """C4, images: the layer-wise INT8 row nearest in size to uniform FP16, against uniform FP16."""
    uniform = table.query("rule == 'uniform' and format == 'fp16'").iloc[0]
    rows = table.query("rule in @LAYERWISE and format == 'int8'")
    row = rows.loc[(rows["mem_mib"] - uniform["mem_mib"]).abs().idxmin()]
    compared = row[COMPARED].to_dict() | {"fp16_mib": uniform["mem_mib"]}
    return by.difference("C4 images", row["sample"], uniform["sample"], **compared)


def layerwise_bytes(table: pd.DataFrame, by: Judge) -> list[Claim]:
    """C4, bytes: the smallest layer-wise INT8 row over uniform INT8, if both have FP32's FID within
    the margin (columns of `evaluate.evaluate`). Bytes have no interval.
    """
    low, high = (table[f"delta_fid_{by.features.lower()}_{end}"] for end in ("low", "high"))
    near = table[(low > -by.margin) & (high < by.margin) & (table["format"] == "int8")]
    int8, rows = near.query("rule == 'uniform'")["mem_mib"], near.query("rule in @LAYERWISE")
    if int8.empty or rows.empty:
        return []
    row = rows.loc[rows["mem_mib"].idxmin()]
    fields = row[COMPARED].to_dict() | {"features": by.features, "n_images": by.n_images}
    ends = [row["mem_mib"] / int8.iloc[0]] * 3
    claim = _claim("C4 bytes", *ends, **fields, int8_mib=int8.iloc[0])
    return [claim | {"low": math.nan, "high": math.nan, "margin": by.margin}]


def claims_on_images(
    table: pd.DataFrame, images: Images, seed: int, inception: FeatureExtractor | None = None
) -> list[Claim]:
    """C3, where its sweep is there, and C4 on rows with their images; features as of `judge`."""
    by = judge(table, images, seed, inception)
    return [*best_ratio(table, by), layerwise_images(table, by), *layerwise_bytes(table, by)]


def image_claims(
    work: Workspace, seed: int, inception_reference: int, names: Sequence[str]
) -> list[Claim]:
    """`claims_on_images` of these tables of rows."""
    tables, images = zip(*(load_rows(work, name) for name in names), strict=True)
    of_sample = {sample: pixels for part in images for sample, pixels in part.items()}
    inception = inception_extractor(inception_reference)
    return claims_on_images(pd.concat(tables, ignore_index=True), of_sample, seed, inception)


def over_runs(by_run: pd.DataFrame) -> pd.DataFrame:
    """Each claim over training runs, at least two, with the fields that all share, and their mean
    margin. The interval is Student's t (of the logarithm where the number is a ratio of means).
    """
    claims = []
    for name, rows in by_run.groupby("claim", sort=False):
        if len(rows) < 2:
            raise ValueError("one training run: an interval over runs needs at least two")
        to, back = (math.log, math.exp) if name in RATIOS_OF_MEANS else (float, float)
        values = rows["measured"].map(to)
        low, high = stats.ttest_1samp(values, 0).confidence_interval(metrics.LEVEL)
        ends = map(back, (values.mean(), low, high))
        shared = rows.loc[:, rows.nunique() == 1].iloc[0].drop(OF_A_RUN, errors="ignore")
        claims.append(_claim(name, *ends, rows["margin"].mean(), runs=len(rows), **shared))
    return pd.DataFrame(claims)


def rule_image_claims(table: pd.DataFrame, images: Images, seed: int) -> list[Claim]:
    """FID of every layer-wise rule's row minus that of the global one; the table's rows are rounded
    alike and of equal bytes, their budget in bits per weight as `setting`.
    """
    by, rows = judge(table, images, seed), table.set_index("rule")
    bits = {rule: float(rows.loc[rule, "setting"]) for rule in LAYERWISE if rule in rows.index}
    return [
        by.difference("rules images", *rows["sample"][[rule, "global"]], rule=rule, budget_bits=b)
        for rule, b in bits.items()
    ]
