"""What one weight tensor can be stored as: the entries worth choosing, each with its bytes and its
predicted damage.

The damage of storing w as w + dw is 1/2 * sum(F * dw^2): with the true Fisher information F half
the expected squared change of the output, to second order (LeCun et al. 1990, "Optimal Brain
Damage", with the Gauss-Newton diagonal); with the curvature of `sensitivity.estimate_sensitivity`,
`rounding.damage`. It is taken with the actual rounding error, row by row (one row an output
channel), with `formats.unshrunk_scale` scales and, with the curvature, error feedback.

Granularities: "tensor", one format for all rows; "channel", one format per row; "mixed", also a
share of the single weights in FP16, those of the largest F * w^2. Groups of consecutive weights of
a channel may have scales of their own.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lafq.quantization.channels import ChannelView, WeightSpec, counted_bytes, scales_per_channel
from lafq.quantization.formats import (
    DEFAULT_FORMATS,
    FORMATS,
    FP16_MAX,
    Format,
    fake_quantize,
    grouped_scale,
    spread_scale,
    unshrunk_scale,
)
from lafq.quantization.rounding import Factor, damage, diagonal_of, factor, rounded

ALLOCATED = ("tensor", "channel", "mixed")
SPARSE_SHARES = (0.01,)
PRICES = 96


class StorageOption(NamedTuple):
    """An entry of a plan for one parameter, the bytes it takes and the damage it is predicted to
    do.
    """

    nbytes: int
    damage: float
    entry: str | WeightSpec


class Curvature(NamedTuple):
    """H (C, C) or (B, S, S) and its factor, which all choices of a parameter share."""

    matrix: Tensor
    factor: Factor


class _Option(NamedTuple):
    """With these weights kept: damage and bits, both (rows, formats), and the number of kept
    weights in every row.

    kept: of the parameter's shape; all entries share it.
    """

    kept: Tensor | None
    damage: Tensor
    bits: Tensor
    in_row: Tensor
    group: int = 0


def pareto_front(
    weight: Tensor,
    fisher: Tensor,
    view: ChannelView,
    granularity: str,
    formats: tuple[str, ...] = DEFAULT_FORMATS,
    curvature: Tensor | None = None,
    groups: tuple[int, ...] = (),
) -> list[StorageOption]:
    """The choices of one parameter that no other choice beats in both bytes and damage, smallest
    first.

    weight and fisher have the parameter's shape; view as `channel_view` gives it; curvature (C, C)
    or (B, S, S) for its columns.
    groups: so many weights may share a scale, where they divide a channel; groups have no single
    weights in FP16.
    """
    known = [f for f in (FORMATS[name] for name in formats) if not f.qmax or len(view.shape) > 1]
    values, fisher = view.of(weight), view.of(fisher)
    shared = None if curvature is None else Curvature(curvature, factor(curvature))
    length = values.shape[1]
    smaller = [group for group in groups if group < length and not length % group]
    options = [_option(values, fisher, known, shared, group=group) for group in (0, *smaller)]
    chosen = [
        (option, torch.full((len(values),), i)) for option in options for i in range(len(known))
    ]
    if granularity == "mixed" and len(view.shape) > 1:
        saliency = (fisher * values.square()).flatten()
        for count in sorted({max(1, round(share * len(saliency))) for share in SPARSE_SHARES}):
            kept = torch.zeros(len(saliency), dtype=torch.bool)
            kept[saliency.topk(count, sorted=False).indices] = True
            options.append(_option(values, fisher, known, shared, kept.view_as(values), view))
    if granularity != "tensor":
        for option in options:
            # One price of a bit after another, from where the first row changes its format to where
            # the last does.
            chosen += [(option, formats) for formats in _by_price(option)]
    # Entries name a format for each row, so they are written for the few choices that no other
    # beats.
    costs = [
        StorageOption(*_cost(view, option, known, formats), str(i))
        for i, (option, formats) in enumerate(chosen)
    ]
    return [c._replace(entry=_entry(*chosen[int(c.entry)], known)) for c in undominated(costs)]


def _option(
    values: Tensor,
    fisher: Tensor,
    known: list[Format],
    shared: Curvature | None,
    kept: Tensor | None = None,
    view: ChannelView | None = None,
    group: int = 0,
) -> _Option:
    of_format = torch.stack(_damages(values, fisher, known, shared, kept, group), 1)
    length = values.shape[1]
    of_scales = 16 * scales_per_channel(length, group)
    bits = torch.tensor([f.bits for f in known]) * length + torch.tensor(
        [of_scales if f.qmax else 0 for f in known]
    )
    in_row = torch.zeros(len(values), dtype=torch.int64) if kept is None else kept.sum(1)
    mask = None if kept is None else view.back(kept)
    return _Option(mask, of_format, bits.double().expand(len(values), -1), in_row, group)


def _damages(
    values: Tensor,
    fisher: Tensor,
    known: list[Format],
    shared: Curvature | None,
    kept: Tensor | None,
    group: int,
) -> list[Tensor]:
    """The damage of each row in each format; kept weights are FP16."""
    rest, of_rest = (
        (values, fisher)
        if kept is None
        else (values.masked_fill(kept, 0), fisher.masked_fill(kept, 0))
    )
    integers = [f for f in known if f.qmax and shared]
    found, size = {}, 0.5 * fisher.mean(1).double()
    for f in known:
        if f not in integers:
            stored = fake_quantize(rest, f, unshrunk_scale, of_rest, group)
            stored = stored if kept is None else torch.where(kept, _fp16(values), stored)
            found[f] = (
                damage(stored - values, fisher)
                if shared is None
                else size * _independent(stored - values, shared)
            )
    if integers:
        # All formats at once: the weights of a row are rounded one after another, and rows cost
        # little more than one.
        own = (grouped_scale(unshrunk_scale, rest, f.qmax, of_rest, group) for f in integers)
        scales = torch.cat([spread_scale(scale, len(values), group) for scale in own])
        qmax = torch.tensor([f.qmax for f in integers]).repeat_interleave(len(values))
        many = None if kept is None else kept.repeat(len(integers), 1)
        rows, quadratic = rounded(
            values.repeat(len(integers), 1), scales, qmax, shared.factor, many
        )
        if kept is not None:
            quadratic = quadratic + _independent(torch.where(many, _fp16(rows) - rows, 0), shared)
        found |= {
            f: size * own for f, own in zip(integers, quadratic.split(len(values)), strict=True)
        }
    return [found[f] for f in known]


def _independent(off: Tensor, shared: Curvature) -> Tensor:
    """dw^T H dw of each row for errors of FP16, which are independent of each other: by the
    diagonal alone.
    """
    return (off.square() @ diagonal_of(shared.matrix)).double()


def _fp16(values: Tensor) -> Tensor:
    return values.clamp(-FP16_MAX, FP16_MAX).half().float()


def _by_price(option: _Option) -> Iterable[Tensor]:
    """For every price of a bit the format of least damage + price * bits, row by row; equal answers
    once.
    """
    drop = (option.damage.amax(1) - option.damage.amin(1)) / (
        option.bits.amax(1) - option.bits.amin(1)
    ).clamp_min(1)
    drop = drop[drop > 0]
    if not len(drop):
        return []
    prices = torch.logspace(
        drop.min().log10() - 7, drop.max().log10() + 2, PRICES, dtype=torch.float64
    )
    # From one price to the next few rows change their format, often none.
    return torch.stack(
        [(option.damage + price * option.bits).argmin(1) for price in prices.tolist()]
    ).unique_consecutive(dim=0)


def _cost(
    view: ChannelView, option: _Option, known: list[Format], chosen: Tensor
) -> tuple[int, float]:
    """Bytes and damage with the formats of these numbers, int64 (rows,)."""
    by_format = {known[i]: (chosen == i).nonzero()[:, 0] for i in chosen.unique().tolist()}
    damage = option.damage.gather(1, chosen[:, None]).sum().item()
    return counted_bytes(view, by_format, option.in_row, "fp16", option.group), damage


def _entry(option: _Option, chosen: Tensor, known: list[Format]) -> str | WeightSpec:
    names = [known[i].name for i in chosen.tolist()]
    format = names[0] if len(set(names)) == 1 else tuple(names)
    if option.kept is None:
        return (
            format
            if isinstance(format, str) and not option.group
            else WeightSpec(format, group=option.group)
        )
    return WeightSpec(format, option.kept, "fp16")


def undominated(choices: list[StorageOption]) -> list[StorageOption]:
    """The options that no other beats in both bytes and damage, smallest first."""
    best, found = float("inf"), []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.damage)):
        if choice.damage < best:
            best = choice.damage
            found.append(choice)
    return found
