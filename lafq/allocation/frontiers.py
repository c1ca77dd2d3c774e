"""What one weight tensor can be stored as: the choices that no other beats in both bytes and
predicted damage.

Storing w as w + dw does the damage 1/2 * sum(F * dw^2): with the true Fisher information F half the
expected squared change of the output, to second order (LeCun et al. 1990, "Optimal Brain Damage",
with the Gauss-Newton diagonal); with a curvature, `rounding.damage`. It is taken with the actual
rounding error, channel by channel (a row each), with `formats.unshrunk_scale` and, with the
curvature, error feedback.

Granularities: "tensor", one format for all rows; "channel", one format per row; "mixed", also a
hundredth of the single weights in FP16, those of the largest F * w^2. Groups of consecutive weights
of a channel may have scales of their own.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lafq.fisher.sensitivity import Sensitivity
from lafq.quantization.channels import ChannelView, WeightSpec, counted_bytes, weight_spec
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import (
    FORMATS,
    FP16_MAX,
    Format,
    ScaleRule,
    fake_quantize,
    scales_by_group,
    unshrunk_scale,
)
from lafq.quantization.model import nbytes, parameters_sha256
from lafq.quantization.plan import Allocation, Plan, Recipe
from lafq.quantization.rounding import Factor, damage, diagonal_of, factor, rounded

ALLOCATED = ("tensor", "channel", "mixed")
SPARSE_SHARE = 0.01
PRICES = 96


class StorageOption(NamedTuple):
    """An entry of a plan for one parameter, its bytes and the damage it is predicted to do."""

    nbytes: int
    damage: float
    entry: str | WeightSpec


class Rows(NamedTuple):
    """A weight tensor and its Fisher values as rows (R, C), its curvature, if it has one, and the
    rule of its scales.
    """

    values: Tensor
    fisher: Tensor
    view: ChannelView
    curvature: Tensor | None
    factors: list[Factor] | None
    scale: ScaleRule = unshrunk_scale

    @classmethod
    def of(cls, model: nn.Module, name: str, sensitivity: Sensitivity) -> "Rows":
        """On the CPU; ValueError for a curvature that is not positive semidefinite."""
        view, weight = channel_view(model, name), model.get_parameter(name).detach()
        values, fisher = view.of(weight.cpu()), view.of(sensitivity.fisher[name].detach().cpu())
        if name not in sensitivity.curvature:
            return cls(values, fisher, view, None, None)
        curvature = sensitivity.curvature[name].cpu()
        return cls(values, fisher, view, curvature, factor(curvature, view.size[1]))

    def damage(self, quadratic: Tensor) -> Tensor:
        """Of each row (R,), c/2 * dw^T H dw, from dw^T H dw."""
        return 0.5 * self.fisher.mean(1).double() * quadratic


class _Option(NamedTuple):
    """A way to share scales and keep weights (R, C): damage (R, formats), bits a row (formats,)."""

    rows: Rows
    formats: list[Format]
    group: int
    kept: Tensor
    damage: Tensor
    bits: Tensor

    def by_price(self) -> Iterable[Tensor]:
        """The numbers (R,) of the formats of least damage + price * bits, for each price of a bit
        from where the first row changes its format to where the last does.
        """
        saved = self.damage.amax(1) - self.damage.amin(1)
        saved = saved[saved > 0] / (self.bits.max() - self.bits.min()).clamp_min(1)
        if not len(saved):
            return []
        low, high = saved.min().log10() - 7, saved.max().log10() + 2
        prices = torch.logspace(low, high, PRICES, dtype=torch.float64).tolist()
        chosen = [(self.damage + price * self.bits).argmin(1) for price in prices]
        return torch.stack(chosen).unique_consecutive(dim=0)

    def cost(self, chosen: Tensor) -> tuple[int, float]:
        """Bytes and damage with the formats of these numbers, int64 (R,)."""
        by_format = {
            self.formats[i]: (chosen == i).nonzero()[:, 0] for i in chosen.unique().tolist()
        }
        size = counted_bytes(self.rows.view, by_format, self.kept.sum(1), "fp16", self.group)
        return size, self.damage.gather(1, chosen[:, None]).sum().item()

    def entry(self, chosen: Tensor) -> str | WeightSpec:
        """That of a plan, with the formats of these numbers."""
        names = tuple(self.formats[i].name for i in chosen.tolist())
        format = names[0] if len(set(names)) == 1 else names
        if self.kept.any():
            return WeightSpec(format, self.rows.view.back(self.kept), "fp16")
        plain = isinstance(format, str) and not self.group
        return format if plain else WeightSpec(format, group=self.group)


def frontier(
    rows: Rows, granularity: str, formats: list[Format], groups: tuple[int, ...] = ()
) -> list[StorageOption]:
    """The undominated choices of one parameter, smallest first; groups keep no single weights."""
    channels, length = rows.view.size
    if rows.values.eq(0).any():  # pruned or masked: levels at halves would make weights of them
        formats = [f for f in formats if not f.qmax % 1]
    if vector := len(rows.view.shape) < 2:
        formats = [f for f in formats if not f.is_integer]
    whole = torch.zeros_like(rows.values, dtype=torch.bool)
    smaller = [group for group in groups if group < length and not length % group]
    options = [_option(rows, formats, group, whole) for group in (0, *smaller)]
    alike = [torch.full((channels,), i) for i in range(len(formats))]
    choices = [(option, chosen) for option in options for chosen in alike]
    if granularity == "mixed" and not vector:
        options.append(_option(rows, formats, 0, _largest(rows)))
    if granularity != "tensor":
        choices += [(option, chosen) for option in options for chosen in option.by_price()]
    sizes, damages = zip(*(option.cost(chosen) for option, chosen in choices), strict=True)
    # Entries name a format for each row, so they are written for the undominated choices alone.
    return [
        StorageOption(sizes[i], damages[i], choices[i][0].entry(choices[i][1]))
        for i in undominated(sizes, damages)
    ]


def undominated(sizes: Sequence[float], damages: Sequence[float]) -> np.ndarray:
    """The numbers of those that no other beats in both bytes and damage, smallest first."""
    order = np.lexsort((damages, sizes))
    sorted_damages = np.asarray(damages)[order]
    least = np.minimum.accumulate(sorted_damages)
    return order[np.append(True, sorted_damages[1:] < least[:-1])]


def planned(
    model: nn.Module, choices: dict[str, StorageOption], recipe: Recipe, file_bytes: int = 0
) -> Allocation:
    """The plan of one choice per parameter, with its report."""
    entries = {name: choice.entry for name, choice in choices.items() if choice.entry != "fp32"}
    plan = Plan(entries, recipe, parameters_sha256(model))
    rows = [_report(name, model.get_parameter(name).numel(), c) for name, c in choices.items()]
    total = sum(choice.damage for choice in choices.values())
    return Allocation(plan, nbytes(model, plan), total, pd.DataFrame(rows), file_bytes)


def _report(name: str, weights: int, choice: StorageOption) -> dict:
    spec = weight_spec(choice.entry)
    channels = [spec.format] if isinstance(spec.format, str) else spec.format
    counts = [f"{channels.count(f)} rows {f}" for f in FORMATS if f in channels]
    words = ", ".join(counts) if len(counts) > 1 else channels[0]
    return {
        "parameter": name,
        "weights": weights,
        "bits_per_weight": 8 * choice.nbytes / weights,
        "formats": words + (f", groups of {spec.group}" if spec.group else ""),
        "kept": 0 if spec.keep_mask is None else int(spec.keep_mask.sum()),
        "damage": choice.damage,
    }


def _largest(rows: Rows) -> Tensor:
    """A mask (R, C) of the single weights of largest F * w^2."""
    saliency = (rows.fisher * rows.values.square()).flatten()
    count = max(1, round(SPARSE_SHARE * len(saliency)))
    kept = torch.zeros(len(saliency), dtype=torch.bool)
    kept[saliency.topk(count, sorted=False).indices] = True
    return kept.view_as(rows.values)


def _option(rows: Rows, formats: list[Format], group: int, kept: Tensor) -> _Option:
    values, fisher, view, curvature, _, rule = rows
    rest, weight = values.masked_fill(kept, 0), fisher.masked_fill(kept, 0)
    fed = [f for f in formats if f.is_integer and curvature is not None]
    scales = [scales_by_group(rule, rest, f.qmax, weight, group) for f in fed]
    damages = _feedback_damages(rows, fed, scales, kept) if fed else {}
    for f in formats:
        if f not in fed:
            stored = fake_quantize(rest, f, rule, weight, group)
            change = torch.where(kept, _fp16(values), stored) - values
            damages[f] = damage(change, fisher)
            if curvature is not None:
                damages[f] = rows.damage(_independent(change, curvature))
    length = view.size[1]
    scale_bits = 16 * (length // (group or length))
    bits = torch.tensor([f.bits * length + scale_bits * f.is_integer for f in formats]).double()
    return _Option(rows, formats, group, kept, torch.stack([damages[f] for f in formats], 1), bits)


def _feedback_damages(
    rows: Rows, formats: list[Format], scales: list[Tensor], kept: Tensor
) -> dict[Format, Tensor]:
    """The damage (R,) of integers rounded with error feedback: all at once, as rows cost little."""
    count, many = len(formats), len(rows.values)
    qmax = torch.tensor([f.qmax for f in formats]).repeat_interleave(many)
    values, kept = rows.values.repeat(count, 1), kept.repeat(count, 1)
    after, quadratic = rounded(values, torch.cat(scales), qmax, rows.factors, kept)
    quadratic += _independent(torch.where(kept, _fp16(after) - after, 0), rows.curvature)
    return dict(zip(formats, map(rows.damage, quadratic.split(many)), strict=True))


def _independent(change: Tensor, curvature: Tensor) -> Tensor:
    """dw^T H dw of each row for FP16 errors, independent of each other: by the diagonal alone."""
    return (change.square() @ diagonal_of(curvature)[: change.shape[1]]).double()


def _fp16(values: Tensor) -> Tensor:
    return values.clamp(-FP16_MAX, FP16_MAX).half().float()
