"""What one weight tensor can be stored as: the choices that no other beats in both bytes and
predicted damage.

Storing w as w + dw does the damage 1/2 * sum(F * dw^2): with the true Fisher information F half the
expected squared change of the output, to second order (LeCun et al. 1990, "Optimal Brain Damage",
with the Gauss-Newton diagonal); with a curvature, `rounding.damage`. It is taken with the actual
rounding error, channel by channel (a row each), with `formats.unshrunk_scale` and, with the
curvature, error feedback.

Granularities: "tensor", one format for all rows; "channel", one format per row; "mixed", also a
share of the single weights in FP16, those of the largest F * w^2. Groups of consecutive weights of
a channel may have scales of their own.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lafq.quantization.channels import ChannelView, WeightSpec, counted_bytes
from lafq.quantization.formats import (
    DEFAULT_FORMATS,
    FP16_MAX,
    Format,
    fake_quantize,
    get_format,
    scales_by_group,
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


class _Rows(NamedTuple):
    """A weight tensor and its Fisher values as rows (R, C), the formats that it may take, and its
    curvature with its factors.
    """

    values: Tensor
    fisher: Tensor
    view: ChannelView
    formats: list[Format]
    curvature: Tensor | None
    factors: list[Factor] | None


class _Option(NamedTuple):
    """One way to share scales and to keep single weights: kept (R, C) or None, and the damage and
    bits of every row in every format, (R, formats).
    """

    group: int
    kept: Tensor | None
    damage: Tensor
    bits: Tensor


def frontier(
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
    known = [f for f in map(get_format, formats) if not f.is_integer or len(view.shape) > 1]
    parts = None if curvature is None else factor(curvature)
    rows = _Rows(view.of(weight), view.of(fisher), view, known, curvature, parts)
    length = view.size[1]
    smaller = [group for group in groups if group < length and not length % group]
    options = [_option(rows, group=group) for group in (0, *smaller)]
    chosen = [
        (option, torch.full((view.size[0],), i)) for option in options for i in range(len(known))
    ]
    if granularity == "mixed" and len(view.shape) > 1:
        options += [_option(rows, kept=kept) for kept in _largest(rows)]
    if granularity != "tensor":
        chosen += [(option, formats) for option in options for formats in _by_price(option)]
    # Entries name a format for each row, so they are written for the undominated choices alone.
    costs = [
        StorageOption(*_cost(rows, option, formats), str(i))
        for i, (option, formats) in enumerate(chosen)
    ]
    return [c._replace(entry=_entry(rows, *chosen[int(c.entry)])) for c in undominated(costs)]


def undominated(choices: Iterable[StorageOption]) -> list[StorageOption]:
    """The options that no other beats in both bytes and damage, smallest first."""
    front: list[StorageOption] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.damage)):
        if not front or choice.damage < front[-1].damage:
            front.append(choice)
    return front


def _largest(rows: _Rows) -> Iterable[Tensor]:
    """Masks (R, C) of the single weights of largest F * w^2, by the shares to keep."""
    saliency = (rows.fisher * rows.values.square()).flatten()
    for count in sorted({max(1, round(share * len(saliency))) for share in SPARSE_SHARES}):
        kept = torch.zeros(len(saliency), dtype=torch.bool)
        kept[saliency.topk(count, sorted=False).indices] = True
        yield kept.view_as(rows.values)


def _option(rows: _Rows, group: int = 0, kept: Tensor | None = None) -> _Option:
    length = rows.view.size[1]
    scales = 16 * (length // (group or length))
    bits = torch.tensor([f.bits * length + scales * f.is_integer for f in rows.formats])
    by_format = _float_damages(rows, group, kept) | _integer_damages(rows, group, kept)
    damages = torch.stack([by_format[f] for f in rows.formats], 1)
    return _Option(group, kept, damages, bits.double().expand(len(damages), -1))


def _float_damages(rows: _Rows, group: int, kept: Tensor | None) -> dict[Format, Tensor]:
    """The damage (R,) of the formats whose weights are rounded one by one: all of them where there
    is no curvature, else those that are not integers.
    """
    values, fisher, _, formats, curvature, _ = rows
    rest, weight = (t if kept is None else t.masked_fill(kept, 0) for t in (values, fisher))
    damages = {}
    for f in formats:
        if curvature is None or not f.is_integer:
            stored = fake_quantize(rest, f, unshrunk_scale, weight, group)
            stored = stored if kept is None else torch.where(kept, _fp16(values), stored)
            change = stored - values
            damages[f] = (
                damage(change, fisher)
                if curvature is None
                else 0.5 * fisher.mean(1).double() * _independent(change, curvature)
            )
    return damages


def _integer_damages(rows: _Rows, group: int, kept: Tensor | None) -> dict[Format, Tensor]:
    """The damage (R,) of integers rounded with error feedback; none without a curvature.

    All formats at once: weights are rounded one after another, and more rows cost little more.
    """
    values, fisher, _, formats, curvature, parts = rows
    integers = [f for f in formats if f.is_integer and curvature is not None]
    if not integers:
        return {}
    rest, weight = (t if kept is None else t.masked_fill(kept, 0) for t in (values, fisher))
    scales = [scales_by_group(unshrunk_scale, rest, f.qmax, weight, group) for f in integers]
    qmax = torch.tensor([f.qmax for f in integers]).repeat_interleave(len(values))
    free = None if kept is None else kept.repeat(len(integers), 1)
    after, quadratic = rounded(
        values.repeat(len(integers), 1), torch.cat(scales), qmax, parts, free
    )
    if free is not None:
        quadratic = quadratic + _independent(torch.where(free, _fp16(after) - after, 0), curvature)
    of_rows = quadratic.split(len(values))
    return {f: 0.5 * fisher.mean(1).double() * q for f, q in zip(integers, of_rows, strict=True)}


def _independent(change: Tensor, curvature: Tensor) -> Tensor:
    """dw^T H dw of each row for errors of FP16, which are independent of each other: by the
    diagonal alone.
    """
    return (change.square() @ diagonal_of(curvature)).double()


def _fp16(values: Tensor) -> Tensor:
    return values.clamp(-FP16_MAX, FP16_MAX).half().float()


def _by_price(option: _Option) -> Iterable[Tensor]:
    """For every price of a bit the number of the format of least damage + price * bits, (R,), from
    where the first row changes its format to where the last does; equal answers once.
    """
    drop = (option.damage.amax(1) - option.damage.amin(1)) / (
        option.bits.amax(1) - option.bits.amin(1)
    ).clamp_min(1)
    drop = drop[drop > 0]
    if not len(drop):
        return []
    low, high = drop.min().log10() - 7, drop.max().log10() + 2
    prices = torch.logspace(low, high, PRICES, dtype=torch.float64).tolist()
    formats = [(option.damage + price * option.bits).argmin(1) for price in prices]
    return torch.stack(formats).unique_consecutive(dim=0)


def _cost(rows: _Rows, option: _Option, formats: Tensor) -> tuple[int, float]:
    """Bytes and damage with the formats of these numbers, int64 (R,)."""
    kept = option.kept
    in_row = torch.zeros_like(formats) if kept is None else kept.sum(1)
    by_format = {rows.formats[i]: (formats == i).nonzero()[:, 0] for i in formats.unique().tolist()}
    damage = option.damage.gather(1, formats[:, None]).sum().item()
    return counted_bytes(rows.view, by_format, in_row, "fp16", option.group), damage


def _entry(rows: _Rows, option: _Option, formats: Tensor) -> str | WeightSpec:
    names = [rows.formats[i].name for i in formats.tolist()]
    format = names[0] if len(set(names)) == 1 else tuple(names)
    if option.kept is not None:
        return WeightSpec(format, rows.view.back(option.kept), "fp16")
    if option.group or isinstance(format, tuple):
        return WeightSpec(format, group=option.group)
    return format
