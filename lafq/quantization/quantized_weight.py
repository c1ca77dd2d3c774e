"""One parameter in its stored form: codes, scales, masks; calling it gives the weight back in FP32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lafq.quantization.channels import (
    CHANNEL_CODE_BITS,
    ChannelView,
    WeightSpec,
    channels_by_format,
    index_dtype,
    mask_encoding,
    weight_spec,
)
from lafq.quantization.formats import (
    BY_CODE,
    FORMATS,
    FP16_MAX,
    Format,
    ScaleRule,
    encode,
    get_format,
    grouped_scale,
    pack_bits,
    spread_scale,
    unpack_bits,
)
from lafq.quantization.rounding import factor, round_with_error_feedback


class QuantizedWeight(nn.Module):
    """The stored tensors of one parameter, as buffers; calling it computes the FP32 weight.

    int8, int6, ..., fp16, fp32: values of the channels in that format, channel after channel,
    integers bit-packed;
    int8_scale, ...: FP16, one for each of these channels, or for each group of consecutive weights
    of them.
    formats: where channels differ, 4 bits for each channel.
    kept: values of the kept weights. Their places, whichever is smaller: mask, one bit per weight
    (the values above then leave them out), or counts, one per channel, and columns (the values
    above then hold a 0 there).
    """

    def __init__(self, parts: dict[str, Tensor], view: ChannelView) -> None:
        super().__init__()
        self.view = view
        for name, tensor in parts.items():
            self.register_buffer(name, tensor)

    @classmethod
    def of(
        cls,
        weight: Tensor,
        entry: str | WeightSpec,
        view: ChannelView,
        scale: ScaleRule,
        fisher: Tensor | None,
        curvature: Tensor | None = None,
    ) -> "QuantizedWeight":
        """Quantize a weight whose plan entry has been checked; fisher as for the scale rule, of the
        weight's shape.

        curvature: as for `rounding.factor`; without it every weight goes to its nearest code.
        """
        format, keep_mask, keep_format, steps, group = weight_spec(entry)
        values = view.of(weight)
        fisher = None if fisher is None else view.of(fisher.to(weight.device))
        by_format = channels_by_format(format, view.size[0], weight.device)
        mask = (
            view.of(keep_mask.to(weight.device))
            if keep_mask is not None and keep_mask.any()
            else None
        )
        parts, scales, qmax = _scales(values, by_format, mask, scale, fisher, steps, group)
        if curvature is not None and qmax.any():
            values = round_with_error_feedback(
                values, scales, qmax, factor(curvature.to(weight.device)), mask
            )
        if mask is not None:
            parts |= _kept_parts(values, mask, by_format, get_format(keep_format))
        free = ~mask if "mask" in parts else None
        rest = values if mask is None else values.masked_fill(mask, 0)
        for f, r in by_format.items():
            chosen = (
                encode(rest[r], scales[r] if group else scales[r][:, None], f.qmax)
                if f.is_integer
                else rest[r]
            )
            chosen = chosen.flatten() if free is None else chosen[free[r]]
            parts[f.name] = pack_bits(chosen, f.bits) if f.is_integer else chosen.to(_dtype(f))
        if len(by_format) > 1:
            codes = torch.zeros(view.size[0], dtype=torch.uint8, device=weight.device)
            for f, r in by_format.items():
                codes[r] = f.code
            parts["formats"] = pack_bits(codes, CHANNEL_CODE_BITS)
        return cls(parts, view)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":
        """Moves follow, casts do not: what is stored keeps its dtype, as its bits mean something
        else in another.
        """
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    @torch.no_grad()
    def forward(self, original: Tensor) -> Tensor:
        """The weight, of the parameter's shape, in FP32 or in the dtype that the model has been
        cast to.

        original: the parametrization's empty original, of which only the dtype counts.
        """
        channels, length = self.view.size
        parts, mask, rows_of = dict(self.named_buffers()), self._mask(), self._rows_of_format()
        if len(rows_of) > 1:
            weight = torch.empty(channels, length, device=parts["formats"].device)
            for name, rows in rows_of.items():
                weight[rows] = _decode(
                    parts, name, None if mask is None else ~mask[rows], len(rows), length
                )
        else:
            weight = _decode(
                parts, next(iter(rows_of)), None if mask is None else ~mask, channels, length
            )
        if mask is not None:
            weight.masked_scatter_(mask, parts["kept"].float())
        elif "columns" in parts:
            row = torch.arange(channels, device=weight.device).repeat_interleave(parts["counts"])
            weight[row, parts["columns"].long()] = parts["kept"].float()
        return self.view.back(weight).to(original.dtype)

    def code_counts(self) -> dict[str, int]:
        """How many codes are stored in each integer format."""
        mask, length = self._mask(), self.view.size[1]
        return {
            name: len(rows) * length - (0 if mask is None else int(mask[rows].sum()))
            for name, rows in self._rows_of_format().items()
            if FORMATS[name].is_integer
        }

    def _mask(self) -> Tensor | None:
        """Where single weights are kept and their places hold no code, boolean (channels, weights
        in each).
        """
        channels, length = self.view.size
        mask = dict(self.named_buffers()).get("mask")
        return (
            None
            if mask is None
            else unpack_bits(mask, 1, channels * length).bool().view(channels, length)
        )

    def _rows_of_format(self) -> dict[str, Tensor]:
        """The channels of each format, by number."""
        parts, channels = dict(self.named_buffers()), self.view.size[0]
        if "formats" not in parts:
            return {
                next(f for f in FORMATS if f in parts): torch.arange(
                    channels, device=next(self.buffers()).device
                )
            }
        codes = unpack_bits(parts["formats"], CHANNEL_CODE_BITS, channels)
        return {BY_CODE[i].name: (codes == i).nonzero()[:, 0] for i in codes.unique().tolist()}

    def _group(self) -> int:
        """Weights that share a scale, where those of a channel have several; else 0."""
        parts, length = dict(self.named_buffers()), self.view.size[1]
        found = {
            length * len(rows) // len(parts[f"{f}_scale"])
            for f, rows in self._rows_of_format().items()
            if FORMATS[f].is_integer
        }
        return next((group for group in found if 0 < group < length), 0)

    def describe(self) -> dict[str, Any]:
        """The entry of the plan in words, for the metadata of a file."""
        parts = dict(self.named_buffers())
        words: dict[str, Any] = {
            "shape": list(self.view.shape),
            "groups": self.view.groups,
            "formats": [f for f in FORMATS if f in parts],
        }
        if group := self._group():
            words["group"] = group
        if "kept" in parts:
            words |= {
                "kept": parts["kept"].numel(),
                "high": "fp16" if parts["kept"].dtype == torch.float16 else "fp32",
            }
        return words


def _scales(
    values: Tensor,
    by_format: dict[Format, Tensor],
    mask: Tensor | None,
    scale: ScaleRule,
    fisher: Tensor | None,
    steps: Tensor | None,
    group: int,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The stored scales by part name; scale, (R,) or of groups (R, C), and qmax (R,): 1 and 0 for a
    row that is not integer.
    """
    rest = values
    if mask is not None:
        rest = values.masked_fill(mask, 0)
        fisher = None if fisher is None else fisher.masked_fill(mask, 0)
    scales, qmax, parts = (
        torch.ones_like(values if group else values[:, 0]),
        torch.zeros_like(values[:, 0]),
        {},
    )
    for f, r in by_format.items():
        if f.is_integer:
            of_rows = None if fisher is None else fisher[r]
            chosen = (
                grouped_scale(scale, rest[r], f.qmax, of_rows, group)
                if steps is None
                else steps.to(r.device)[r]
            )
            parts[f"{f.name}_scale"] = chosen
            scales[r], qmax[r] = spread_scale(chosen, len(r), group), float(f.qmax)
    return parts, scales, qmax


def _kept_parts(
    values: Tensor, mask: Tensor, by_format: dict[Format, Tensor], keep_format: Format
) -> dict[str, Tensor]:
    """The values of the kept weights, and what tells which they are."""
    kept, in_row, length = values[mask], mask.sum(1), values.shape[1]
    # Kept weights take up errors of others, and may then exceed FP16's range.
    parts = {
        "kept": (kept.clamp(-FP16_MAX, FP16_MAX) if keep_format.bits == 16 else kept).to(
            _dtype(keep_format)
        )
    }
    if mask_encoding(by_format, in_row, length)[0] == "mask":
        return parts | {"mask": pack_bits(mask.flatten().to(torch.uint8), 1)}
    return parts | {"counts": in_row.int(), "columns": mask.nonzero()[:, 1].to(index_dtype(length))}


def _decode(
    parts: dict[str, Tensor], name: str, free: Tensor | None, channels: int, length: int
) -> Tensor:
    """The channels stored in one format, (channels, length) in FP32; free: where a value is stored
    (None: everywhere).
    """
    f = FORMATS[name]
    if f.is_integer:
        count = channels * length if free is None else int(free.sum())
        values = unpack_bits(parts[name], f.bits, count).float().sub_(f.qmax)
    else:
        values = parts[name].to(torch.float32, copy=True)
    if free is not None:
        values = torch.zeros(channels, length, device=values.device).masked_scatter_(free, values)
    if f.is_integer:
        scale = parts[f"{name}_scale"].float()
        values = values.view(len(scale), -1).mul_(scale[:, None])
    return values.view(channels, length)


def _dtype(f: Format) -> torch.dtype:
    return torch.float16 if f.bits == 16 else torch.float32
