"""Claims, each as one number with a 95 % interval and a verdict that follows from it.

C1 and C2 are about Fisher information: intervals resample blocks of samples, the same blocks for
all weight tensors. C3 and C4 are about images: intervals resample the images, the same ones in
every row. Claims about threshold rules, which the poster does not make, compare several thresholds
with one for all, on damage and on images. Over training runs the interval is Student's t.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from lafq.rng import generator
from lafq.study import poster
from lafq.study.diffusion.unet import layer_of
from lafq.study.images import metrics
from lafq.study.images.evaluate import Scored, score
from lafq.study.images.features import FeatureExtractor, inception_extractor, mnist_extractor
from lafq.study.results import load_rows
from lafq.study.workspace import Workspace, load_optional, load_table

# Inception features at N = 100: a third of the gain that the poster shows for ratio 0.35 over its
# baseline (59.30 - 56.21 = 3.09). It was set on 2026-11-25, when the results of the mini profile
# were known, and of the poster's size the rows of its table at 100 steps; it is no preregistration
# for those. The rows at 1,000 steps were drawn afterwards. On other features and at other N there
# is no margin: differences are described.
FID_MARGIN = 1.0
MARGIN_IMAGES = 100
LEVEL = 0.05
FRONT = ("Layer1", "Layer2")
HALF = 500
LAYERWISE = ("group", "mean_std", "ratio")
RATIOS_OF_MEANS = ("C1", "C2")
NULL = {"C1": 1.0, "C2": 1.0, "C2 share": 0.5}  # C3 and C4: 0
RATE = 4.0  # bits per weight at which claims about rules are tested
SAID = {
    "C1": "later steps of the reverse process (t near 0) have higher Fisher values",
    "C2": "Layers 1 and 2 have notably higher Fisher values",
    "C2 share": "Layers 1 and 2 have notably higher Fisher values",
    "C3": "the best ratio lies in 0.35-0.40",
    "C4 images": "thresholds by layer give better images than uniform quantization",
}


# The row that C4 compares is another one in each run.
VARYING = {
    "C4 images": (
        "FID of the layer or group row nearest to uniform FP16 in bytes, minus FID of uniform FP16"
    )
}
RULES_SAID = "several thresholds are better than one for all"
RULE_WORDS = {
    "ratio": "ratio (one threshold per layer)",
    "group": "group (one threshold per group)",
    "mean_std": "mean_std (one threshold per layer)",
}


def verdict(
    low: float, high: float, *, above: bool, null: float = 0.0, margin: float = 0.0, p: float = 0.0
) -> str:
    """ "supported", "contradicted", "effect under 1 FID" (the margin) or "inconclusive".

    The claim says that a quantity lies above `null` (or, with above=False, below it); low..high is
    its 95 % interval. "Effect under": the whole interval lies within `margin` of null. "Supported"
    and "contradicted": the whole interval lies on one side of null, and `p`, where it has been
    corrected for several tests, is below 0.05.
    """
    low, high = (low - null, high - null) if above else (null - high, null - low)
    if -margin < low and high < margin:
        return f"effect under {margin:g} FID"
    if p >= LEVEL or low <= 0 <= high:
        return "inconclusive"
    return "supported" if low > 0 else "contradicted"


def holm(p: list[float]) -> list[float]:
    """P values corrected for their number (Holm 1979, "A simple sequentially rejective multiple
    test procedure").
    """
    order, corrected, largest = sorted(range(len(p)), key=p.__getitem__), [0.0] * len(p), 0.0
    for i, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - i) * p[place]))
        corrected[place] = largest
    return corrected


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
    extractor = inception or mnist_extractor()

    @cache
    def scored(sample: str) -> Scored:
        return score(torch.from_numpy(images[sample])[:, None], [extractor], seed)

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
    of_front = weights[[n for n in weights.index if front[n]]].sum() / weights.sum()
    trace, early = _trace_by_side(blocks, weights, front)
    chosen = torch.randint(
        trace.shape[-1],
        (metrics.RESAMPLES, *trace.shape[1:]),
        generator=generator(seed, trace.shape[-1]),
    )
    draws = torch.stack([side.expand(len(chosen), -1, -1).gather(2, chosen) for side in trace], 1)

    def halves(trace: Tensor) -> Tensor:
        by_bin = trace.mean(-1).sum(-2)
        return (by_bin[..., early].mean(-1) / by_bin[..., ~early].mean(-1)).log()

    def share(trace: Tensor) -> Tensor:
        by_side = trace.mean(-1).sum(-1)
        return by_side[..., 0] / by_side.sum(-1)

    def per_weight(trace: Tensor) -> Tensor:
        return (share(trace) / of_front).log() - ((1 - share(trace)) / (1 - of_front)).log()

    share_words = (
        f"share of all Fisher information in Layers 1-2, which have {of_front:.1%} of the weights"
    )
    quantities = {
        "C1": (halves, f"mean Fisher at t < {HALF} divided by that at t >= {HALF}"),
        "C2": (per_weight, "mean Fisher per weight, Layers 1-2 divided by Layers 3-6"),
        "C2 share": (share, share_words),
    }
    claims = []
    for claim, (quantity, words) in quantities.items():
        measured = quantity(trace).item()
        ends = (measured, *metrics.interval(measured, quantity(draws)))
        ends = ends if claim == "C2 share" else tuple(math.exp(end) for end in ends)
        what = verdict(*ends[1:], above=True, null=NULL[claim])
        claims.append(Claim(claim, SAID[claim], f"{words} ({kind})", *ends, what))
    return claims


def _trace_by_side(
    blocks: pd.DataFrame, weights: pd.Series, front: dict[str, bool]
) -> tuple[Tensor, Tensor]:
    """Fisher trace of Layers 1-2 and of the others by timestep bin and block (2, bins, blocks), and
    which bins are early (bins,).
    """
    trace = blocks.assign(
        trace=blocks["fisher"] * blocks["parameter"].map(weights),
        front=blocks["parameter"].map(front),
    )
    sums = trace.pivot_table(
        index=["front", "t_low"], columns="block", values="trace", aggfunc="sum"
    ).dropna(axis=1)
    sides = [torch.from_numpy(sums.loc[side].to_numpy(copy=True)) for side in (True, False)]
    return torch.stack(sides), torch.tensor([t < HALF for t in sums.loc[True].index])


def all_fisher_claims(work: Workspace, seed: int) -> list[Claim]:
    """C1 and C2 on every kind of Fisher information that 02 has estimated."""
    weights = load_table(work, "02_fisher").drop_duplicates("parameter")
    by_name = weights.set_index("parameter")["weights"]
    kinds = {"empirical, noised digits": load_table(work, "02_fisher_blocks")}
    others = load_optional(work, "02_fisher_kinds")
    if others is not None:
        kinds |= dict(iter(others.groupby("kind", sort=False)))
    return [
        claim
        for kind, blocks in kinds.items()
        for claim in fisher_claims(blocks, by_name, kind, seed)
    ]


def best_ratio(
    table: pd.DataFrame, by: Judge, formats: Sequence[str] = ("fp16", "int8")
) -> list[Claim]:
    """C3 for each format whose ratio sweep, by weight, is in the table; p values corrected for the
    number of formats.
    """
    contrasts = [_inside_minus_others(table, by, low) for low in formats]
    tested = [contrast for contrast in contrasts if contrast is not None]
    corrected = holm([_p_value(claim.measured, draws) for claim, draws in tested])
    return [
        claim._replace(
            p=p, verdict=verdict(claim.low, claim.high, above=False, margin=by.margin, p=p)
        )
        for (claim, _), p in zip(tested, corrected, strict=True)
    ]


def _inside_minus_others(table: pd.DataFrame, by: Judge, low: str) -> tuple[Claim, Tensor] | None:
    """C3 in one format, with its draws: mean FID of the ratios 0.35 to 0.40 minus the others'; None
    where the table does not have both.
    """
    of_format = (table["rule"] == "ratio") & (table["format"] == low)
    rows = table[of_format & (table["granularity"] == "weight")].drop_duplicates("setting")
    rows = rows[rows["setting"].isin([f"{r:.2f}" for r in poster.RATIOS])]
    inside = rows["setting"].astype(float).between(*poster.BEST_RATIOS).to_numpy(copy=True)
    if inside.all() or not inside.any():
        return None
    scored = [by.scored(sample) for sample in rows["sample"]]
    values = torch.tensor([s.values[by.metric] for s in scored])
    draws = torch.stack([s.draws[by.metric] for s in scored], 1)
    best = inside[draws.argmin(1).numpy()].mean()
    value, spread = (
        fid[..., inside].mean(-1) - fid[..., ~inside].mean(-1) for fid in (values, draws)
    )
    quantity = (
        f"mean FID of ratios 0.35-0.40 minus the others' ({low.upper()}, single weights kept; "
        f"{by.features})"
    )
    note = (
        f"the best ratio is one of 0.35-0.40 in {best:.0%} of resamples "
        f"(by chance: {inside.mean():.0%})"
    )
    claim = _contrast("C3", quantity, value.item(), spread, by.margin)
    return claim._replace(note=note), spread


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


def claims_on_images(table: pd.DataFrame, images: dict[str, np.ndarray], seed: int) -> list[Claim]:
    """C3 (INT8) and C4 (images) on the rows of `claimed_rows` with their images (MNIST features)."""
    by = judge(images, seed, None)
    return [*best_ratio(table, by, ["int8"]), layerwise_images(table, by)]


def image_claims(
    work: Workspace, seed: int, inception_reference: int, names: Sequence[str]
) -> list[Claim]:
    """C3, where its sweep is there, and C4, from these tables of rows with their images."""
    tables, images = zip(*(load_rows(work, name) for name in names), strict=True)
    table = pd.concat(tables, ignore_index=True)
    of_sample = {sample: pixels for part in images for sample, pixels in part.items()}
    by = judge(of_sample, seed, inception_extractor(inception_reference))
    return [*best_ratio(table, by), layerwise_images(table, by)]


def over_runs(by_run: pd.DataFrame) -> pd.DataFrame:
    """Each claim over training runs: rows `seed, claim, paper, quantity, measured, ...` become one
    Claim each.

    The interval is Student's t over the runs (of the logarithm where the number is a ratio of
    means), at least two of them.
    """
    claims = []
    for name, rows in by_run.groupby("claim", sort=False):
        ratio = name in RATIOS_OF_MEANS
        forth, back = (math.log, math.exp) if ratio else (float, float)
        mean, low, high = (back(v) for v in _student([forth(v) for v in rows["measured"]]))
        holds = verdict(low, high, above=name in NULL, null=NULL.get(name, 0.0))
        what = VARYING.get(name, rows["quantity"].iloc[0])
        quantity = f"{what}; {'geometric mean' if ratio else 'mean'} of {len(rows)} training runs"
        claims.append(Claim(name, rows["paper"].iloc[0], quantity, mean, low, high, holds))
    return pd.DataFrame(claims)


def _student(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval."""
    if len(values) < 2:
        raise ValueError(f"{len(values)} training run: an interval over runs needs at least two")
    low, high = stats.ttest_1samp(values, 0).confidence_interval(metrics.LEVEL)
    return sum(values) / len(values), float(low), float(high)


def damage_claims(table: pd.DataFrame, rounding: str) -> list[Claim]:
    """Damage of every layer-wise rule over that of the global one, rounded alike, at RATE bits per
    weight; rows of `damage.measure_damage`.
    """
    alike = np.isclose(table["budget_bits"], RATE) & (table["rounding"] == rounding)
    at_rate = table[alike & (table["granularity"] == "weight")].set_index("rule")
    claims = []
    for rule, words in RULE_WORDS.items():
        row = at_rate.loc[rule]
        ends = row["over_global_low"], row["over_global_high"]
        quantity = (
            f"damage of {words} divided by that of global ({RATE:g} bits per weight, equal bytes "
            f"and rounding)"
        )
        holds = verdict(*ends, above=False, null=1.0)
        claims.append(Claim("rules", RULES_SAID, quantity, row["over_global"], *ends, holds))
    return claims


def rule_image_claims(
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
    whole, claims = by.scored(samples["global"]), []
    for rule in (rule for rule in RULE_WORDS if rule in samples):
        scored = by.scored(samples[rule])
        value = scored.values[by.metric] - whole.values[by.metric]
        ends = metrics.interval(value, scored.draws[by.metric] - whole.draws[by.metric])
        quantity = f"FID of {RULE_WORDS[rule]} minus that of global ({size}; {by.features})"
        holds = verdict(*ends, above=False)
        claims.append(Claim("rules", RULES_SAID, quantity, value, *ends, holds))
    return claims
