"""Fisher values -> which weights are kept in full precision.

Every rule takes `scores`, the Fisher values keyed by parameter name, and returns a boolean tensor
of the same shape for
each name: True where the weight is kept. `by_granularity` makes the scores: of the granularity
"tensor" one value per weight tensor (the released code), of "weight" the Fisher values themselves
(the poster). A layer is the part of the name before the first dot.

Source: "Layer-Adaptive Quantization on Diffusion Model using Fisher Information" (IEIE 2024),
quantization section.
"""

import math

import torch
from torch import Tensor

GROUPS = {
    "Layer1-2": ("Layer1", "Layer2"),
    "Layer3-5": ("Layer3", "Layer4", "Layer5"),
    "Layer6": ("Layer6",),
}
GRANULARITIES = ("tensor", "channel", "weight")


def by_granularity(
    fisher: dict[str, Tensor], granularity: str, axes: dict[str, int] | None = None
) -> dict[str, Tensor]:
    """One score for each thing that is kept or quantized as one: its mean Fisher value.

    granularity: "tensor" gives 0-dim scores, "channel" (output channels,), "weight" the Fisher
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


def by_layer(scores: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The scores of each layer, in the order of the names."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, score in scores.items():
        layers.setdefault(name.split(".", 1)[0], {})[name] = score
    return layers


def keep_global(scores: dict[str, Tensor], tau: float) -> dict[str, Tensor]:
    """One threshold for all layers: keep F >= tau."""
    return {n: s >= tau for n, s in scores.items()}


def group_means(scores: dict[str, Tensor]) -> dict[str, float]:
    """Mean Fisher value over the units of each group."""
    layers = by_layer(scores)
    return {
        group: _values([s for name in names for s in layers.get(name, {}).values()]).mean().item()
        for group, names in GROUPS.items()
    }


def relative_to_group(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores divided by their group's mean: a threshold c on these is the group-wise rule with tau
    = c * the group's mean.

    Raises ValueError for a layer in no group.
    """
    known = [layer for layers in GROUPS.values() for layer in layers]
    if unknown := [layer for layer in by_layer(scores) if layer not in known]:
        raise ValueError(f"unknown layer {unknown[0]!r}: the groups cover {', '.join(known)}")
    mean_of = {
        layer: mean for group, mean in group_means(scores).items() for layer in GROUPS[group]
    }
    return {n: s / mean_of[n.split(".", 1)[0]] for n, s in scores.items()}


def standardized(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """(F - mean) / std over each layer's units (population std): a threshold k on these is the
    poster's mean/std rule, which keeps F >= mean + k * std."""
    result = {}
    for layer in by_layer(scores).values():
        values = _values(list(layer.values())).double()
        mean, std = values.mean(), values.std(correction=0)
        result |= {n: ((s - mean) / std if std > 0 else s - mean) for n, s in layer.items()}
    return result


def threshold_grid(scores: dict[str, Tensor], count: int) -> list[float]:
    """Thresholds worth trying, highest first: every value where there are at most `count`, else as
    many quantiles.

    The first keeps nothing, the last everything.
    """
    values = _values(list(scores.values())).unique()
    if len(values) > count:
        values = values[
            torch.linspace(0, len(values) - 1, count, dtype=torch.float64).round().long()
        ]
    return [math.inf, *values.flip(0).tolist()]


def keep_ratio(scores: dict[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Per layer, keep the floor(ratio * n) units of highest Fisher value, n the layer's units; ties
    go to the first.

    Raises ValueError for a ratio outside [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(
            f"ratio {ratio} is outside [0, 1]: it is the share of a layer's units to keep"
        )
    keep = {}
    for layer in by_layer(scores).values():
        values = _values(list(layer.values()))
        # 1e-9: 0.29 * 100 is 28.999999999999996 in binary.
        count = math.floor(ratio * len(values) + 1e-9)
        mask = torch.zeros_like(values, dtype=torch.bool)
        mask[values.argsort(descending=True, stable=True)[:count]] = True
        parts = mask.split([s.numel() for s in layer.values()])
        keep |= {n: part.view(s.shape) for (n, s), part in zip(layer.items(), parts, strict=True)}
    return keep


def _values(scores: list[Tensor]) -> Tensor:
    return torch.cat([s.reshape(-1) for s in scores])
