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


def layer_of(name: str) -> str:
    """The part of a parameter's name before its first dot."""
    return name.split(".", 1)[0]


def global_score(fisher: Scores, layer_of: PartOf, group_of: PartOf) -> Scores:
    """F itself: one threshold for all layers."""
    return dict(fisher)


def group_score(fisher: Scores, layer_of: PartOf, group_of: PartOf) -> Scores:
    """F over the mean of its group."""
    scores = {}
    for part in _parts(fisher, group_of).values():
        mean = _values(part).mean().item()
        scores |= {name: f / mean for name, f in part.items()}
    return {name: scores[name] for name in fisher}


def mean_std_score(fisher: Scores, layer_of: PartOf, group_of: PartOf) -> Scores:
    """(F - mean) / std over its layer's units (population std); F - mean where all are equal."""
    scores = {}
    for part in _parts(fisher, layer_of).values():
        values = _values(part).double()
        mean, std = values.mean(), values.std(correction=0)
        scores |= {n: ((f - mean) / std if std > 0 else f - mean) for n, f in part.items()}
    return {name: scores[name] for name in fisher}


def ratio_score(fisher: Scores, layer_of: PartOf, group_of: PartOf) -> Scores:
    """The share of its layer's units that rank below it, float64; of equal ones the first ranks
    highest. At the threshold 1 - r the floor(r * n) highest of n are kept.
    """
    scores = {}
    for part in _parts(fisher, layer_of).values():
        order = _values(part).argsort(descending=True, stable=True)
        place = torch.arange(1, len(order) + 1, dtype=torch.float64, device=order.device)
        share = torch.empty_like(place)
        share[order] = 1 - place / len(order)
        pieces = share.split([f.numel() for f in part.values()])
        scores |= {n: s.view(f.shape) for (n, f), s in zip(part.items(), pieces, strict=True)}
    return {name: scores[name] for name in fisher}


# Each is called as score(fisher, layer_of, group_of).
RULES: dict[str, Callable[[Scores, PartOf, PartOf], Scores]] = {
    "global": global_score,
    "group": group_score,
    "mean_std": mean_std_score,
    "ratio": ratio_score,
}


def keep_above(scores: Scores, threshold: float) -> dict[str, Tensor]:
    """Boolean tensors of the scores' shapes: True, to be kept, where a score is at least the
    threshold.
    """
    return {n: s >= threshold for n, s in scores.items()}


def by_granularity(fisher: Scores, granularity: str, axes: dict[str, int] | None = None) -> Scores:
    """The mean Fisher value of each thing that is kept or quantized as one.

    granularity: "tensor" gives 0-dim means, "channel" (output channels,), "weight" the Fisher
    values themselves.
    axes: by parameter name the axis of the output channels where it is not 0 (1 in a transposed
    convolution). Raises ValueError for another granularity.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"unknown granularity {granularity!r}: choose one of {', '.join(GRANULARITIES)}"
        )
    if granularity == "channel":
        return {
            n: f.movedim((axes or {}).get(n, 0), 0).flatten(1).mean(1) for n, f in fisher.items()
        }
    return {n: f.mean() for n, f in fisher.items()} if granularity == "tensor" else dict(fisher)


def threshold_grid(scores: Scores, count: int) -> list[float]:
    """Thresholds worth trying, highest first: every value where there are at most `count`, else as
    many quantiles. The first keeps nothing, the last everything.
    """
    values = _values(scores).unique()
    if len(values) > count:
        values = values[
            torch.linspace(0, len(values) - 1, count, dtype=torch.float64).round().long()
        ]
    return [math.inf, *values.flip(0).tolist()]


def _parts(scores: Scores, part_of: PartOf) -> dict[str, Scores]:
    parts: dict[str, Scores] = {}
    for name, score in scores.items():
        parts.setdefault(part_of(name), {})[name] = score
    return parts


def _values(scores: Scores) -> Tensor:
    return torch.cat([s.reshape(-1) for s in scores.values()])
