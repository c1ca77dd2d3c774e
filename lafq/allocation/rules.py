"""A rule is a score of every weight, made of its Fisher value F: what scores a threshold
or more is kept in full precision.

    global     F                                    keep F >= tau
    group      F / mean of F over the group         keep F >= c * mean
    mean_std   (F - mean) / std over the layer      keep F >= mean + k * std
    ratio      share of the layer that ranks below  keep the first r of every layer, at 1 - r

Scores are of the granularity "weight" (the poster), "tensor" (the released code) or "channel":
`by_granularity` averages F first. A rule sees names of parameters only; `layer_of` and `group_of`
tell what layer and what group a name belongs to.

Source: "Layer-Adaptive Quantization on Diffusion Model using Fisher Information" (IEIE 2024),
quantization section.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Scores = dict[str, Tensor]
PartOf = Callable[[str], str]
GRANULARITIES = ("tensor", "channel", "weight")


def global_score(fisher: Scores, layer_of: PartOf, group_of: PartOf) -> Scores:
    """F itself: one threshold for all layers."""
    return dict(fisher)


def group_score(fisher: Scores, layer_of: PartOf, group_of: PartOf) -> Scores:
    """F over the mean of its group."""
    return _by_part(fisher, group_of, lambda f: f / f.mean())


def mean_std_score(fisher: Scores, layer_of: PartOf, group_of: PartOf) -> Scores:
    """(F - mean) / std over its layer's units (population std); F - mean where all are equal."""

    def standardized(f: Tensor) -> Tensor:
        mean, std = f.double().mean(), f.double().std(correction=0)
        return (f - mean) / std if std > 0 else f - mean

    return _by_part(fisher, layer_of, standardized)


def ratio_score(fisher: Scores, layer_of: PartOf, group_of: PartOf) -> Scores:
    """The share of its layer's units that rank below it, float64; of equal ones the first ranks
    highest. At the threshold 1 - r the floor(r * n) highest of n are kept.
    """

    def share_below(f: Tensor) -> Tensor:
        place = torch.arange(1, len(f) + 1, dtype=torch.float64, device=f.device)
        share = torch.empty_like(place)
        share[f.argsort(descending=True, stable=True)] = 1 - place / len(f)
        return share

    return _by_part(fisher, layer_of, share_below)


# Each is called as score(fisher, layer_of, group_of).
RULES: dict[str, Callable[[Scores, PartOf, PartOf], Scores]] = {
    "global": global_score,
    "group": group_score,
    "mean_std": mean_std_score,
    "ratio": ratio_score,
}


def keep_above(scores: Scores, threshold: float) -> dict[str, Tensor]:
    """Boolean tensors of the scores' shapes: True, to be kept, at the threshold and above."""
    return {name: score >= threshold for name, score in scores.items()}


def by_granularity(fisher: Scores, granularity: str, axes: dict[str, int] | None = None) -> Scores:
    """The mean Fisher value of each thing that is kept or quantized as one: 0-dim for "tensor",
    (output channels,) for "channel", F itself for "weight"; ValueError for another granularity.

    axes: by name the axis of the output channels where it is not 0 (1 in a transposed convolution).
    """
    if granularity not in GRANULARITIES:
        choices = ", ".join(GRANULARITIES)
        raise ValueError(f"unknown granularity {granularity!r}: choose one of {choices}")
    if granularity == "weight":
        return dict(fisher)
    if granularity == "tensor":
        return {name: f.mean() for name, f in fisher.items()}
    axes = axes or {}
    return {n: f.movedim(axes.get(n, 0), 0).flatten(1).mean(1) for n, f in fisher.items()}


def threshold_grid(scores: Scores, count: int) -> list[float]:
    """Thresholds worth trying, highest first: every value where there are at most `count`, else as
    many quantiles. The first keeps nothing, the last everything.
    """
    values = torch.cat([score.flatten() for score in scores.values()]).unique()
    if len(values) > count:
        places = torch.linspace(0, len(values) - 1, count, dtype=torch.float64)
        values = values[places.round().long()]
    return [math.inf, *values.flip(0).tolist()]


def _by_part(fisher: Scores, part_of: PartOf, score: Callable[[Tensor], Tensor]) -> Scores:
    """Scores of the values (n,) of every layer or group together."""
    parts: dict[str, list[str]] = {}
    for name in fisher:
        parts.setdefault(part_of(name), []).append(name)
    scores = {}
    for names in parts.values():
        values = [fisher[name].flatten() for name in names]
        pieces = score(torch.cat(values)).split([len(v) for v in values])
        scores |= {n: piece.view(fisher[n].shape) for n, piece in zip(names, pieces, strict=True)}
    return {name: scores[name] for name in fisher}
