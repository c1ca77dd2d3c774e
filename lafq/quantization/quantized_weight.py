"""One parameter in its stored form: codes, scales, masks; calling it gives the weight back in
FP32.
"""

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

ByFormat = dict[Format, Tensor]


class QuantizedWeight(nn.Module):
    """The stored tensors of one parameter, as buffers; calling it computes the FP32 weight.

    int8, fp16, ...: values of the channels in that format, channel after channel, integers
    bit-packed. int8_scale, ...: FP16, one for each of these channels, or for each group of
    consecutive weights of them. formats: where channels differ, 4 bits for each channel.
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
        weight's shape; curvature as for `rounding.factor`, without it every weight goes to its
        nearest code.
        """
        device, spec = weight.device, weight_spec(entry)
        values = view.of(weight)
        by_format = channels_by_format(spec.format, view.size[0], device)
        mask = None if spec.keep_mask is None else view.of(spec.keep_mask.to(device))
        mask = mask if mask is not None and mask.any() else None
        fisher = None if fisher is None else view.of(fisher.to(device))
        parts, scales, qmax = _scales(values, by_format, mask, scale, fisher, spec)
        if curvature is not None and qmax.any():
            parts_of_h = factor(curvature.to(device))
            values = round_with_error_feedback(values, scales, qmax, parts_of_h, mask)
        if mask is not None:
            parts |= _kept_parts(values, mask, by_format, get_format(spec.keep_format))
            values = values.masked_fill(mask, 0)
        free = ~mask if "mask" in parts else None
        for f, rows in by_format.items():
            stored = values[rows]
            if f.is_integer:
                stored = encode(stored, scales[rows].view(len(rows), -1), f.qmax)
            stored = stored.flatten() if free is None else stored[free[rows]]
            parts[f.name] = pack_bits(stored, f.bits) if f.is_integer else stored.to(_dtype(f))
        if len(by_format) > 1:
            codes = torch.zeros(view.size[0], dtype=torch.uint8, device=device)
            for f, rows in by_format.items():
                codes[rows] = f.code
            parts["formats"] = pack_bits(codes, CHANNEL_CODE_BITS)
        return cls(parts, view)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":
        """Moves follow, casts do not: stored bits mean something else in another dtype."""
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    @torch.no_grad()
    def forward(self, original: Tensor) -> Tensor:
        """The weight, of the parameter's shape, in FP32 or in the dtype that the model has been
        cast to.

        original: the parametrization's empty original, of which only the dtype counts.
        """
        parts, by_format = dict(self.named_buffers()), self._channels_by_format()
        device = next(self.buffers()).device
        weight, mask = torch.empty(self.view.size, device=device), self._mask()
        for f, rows in by_format.items():
            free = None if mask is None else ~mask[rows]
            values = _decode(parts, f, free, len(rows), self.view.size[1])
            if len(by_format) == 1:
                weight = values
            else:
                weight[rows] = values
        if mask is not None:
            weight.masked_scatter_(mask, parts["kept"].float())
        elif "columns" in parts:
            row = torch.arange(len(weight), device=device).repeat_interleave(parts["counts"])
            weight[row, parts["columns"].long()] = parts["kept"].float()
        return self.view.back(weight).to(original.dtype)

    def code_counts(self) -> dict[str, int]:
        """How many codes are stored in each integer format."""
        mask, length = self._mask(), self.view.size[1]
        return {
            f.name: len(rows) * length - (0 if mask is None else int(mask[rows].sum()))
            for f, rows in self._channels_by_format().items()
            if f.is_integer
        }

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
            high = "fp16" if parts["kept"].dtype == torch.float16 else "fp32"
            words |= {"kept": parts["kept"].numel(), "high": high}
        return words

    def _mask(self) -> Tensor | None:
        """Where single weights are kept and their places hold no code, boolean (R, C)."""
        packed, size = self._buffers.get("mask"), self.view.size
        return (
            None if packed is None else unpack_bits(packed, 1, size[0] * size[1]).bool().view(size)
        )

    def _channels_by_format(self) -> ByFormat:
        """The channels of each format, by number."""
        channels, packed = self.view.size[0], self._buffers.get("formats")
        if packed is None:
            f = next(f for f in FORMATS.values() if f.name in self._buffers)
            return {f: torch.arange(channels, device=next(self.buffers()).device)}
        codes = unpack_bits(packed, CHANNEL_CODE_BITS, channels)
        return {BY_CODE[i]: (codes == i).nonzero()[:, 0] for i in codes.unique().tolist()}

    def _group(self) -> int:
        """Weights that share a scale, where those of a channel have several; else 0."""
        length = self.view.size[1]
        for f, rows in self._channels_by_format().items():
            if f.is_integer and len(self._buffers[f"{f.name}_scale"]) > len(rows):
                return length * len(rows) // len(self._buffers[f"{f.name}_scale"])
        return 0


def _scales(
    values: Tensor,
    by_format: ByFormat,
    mask: Tensor | None,
    rule: ScaleRule,
    fisher: Tensor | None,
    spec: WeightSpec,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The stored scales by part name; scale, (R,) or of groups (R, C), and qmax (R,): 1 and 0 for a
    row that is not integer.
    """
    if mask is not None:
        values = values.masked_fill(mask, 0)
        fisher = None if fisher is None else fisher.masked_fill(mask, 0)
    scales = torch.ones_like(values if spec.group else values[:, 0])
    qmax, parts = torch.zeros_like(values[:, 0]), {}
    for f, rows in by_format.items():
        if f.is_integer:
            of_rows = None if fisher is None else fisher[rows]
            stored = (
                grouped_scale(rule, values[rows], f.qmax, of_rows, spec.group)
                if spec.steps is None
                else spec.steps.to(rows.device)[rows]
            )
            parts[f"{f.name}_scale"] = stored
            scales[rows], qmax[rows] = spread_scale(stored, len(rows), spec.group), f.qmax
    return parts, scales, qmax


def _kept_parts(
    values: Tensor, mask: Tensor, by_format: ByFormat, keep_format: Format
) -> dict[str, Tensor]:
    """The values of the kept weights, and what tells which they are."""
    kept, in_row, length = values[mask], mask.sum(1), values.shape[1]
    # Kept weights take up errors of others, and may then exceed FP16's range.
    kept = kept.clamp(-FP16_MAX, FP16_MAX) if keep_format.bits == 16 else kept
    parts = {"kept": kept.to(_dtype(keep_format))}
    if mask_encoding(by_format, in_row, length)[0] == "mask":
        return parts | {"mask": pack_bits(mask.flatten().to(torch.uint8), 1)}
    return parts | {"counts": in_row.int(), "columns": mask.nonzero()[:, 1].to(index_dtype(length))}


def _decode(
    parts: dict[str, Tensor], f: Format, free: Tensor | None, channels: int, length: int
) -> Tensor:
    """The channels stored in one format, (channels, length) in FP32; free: where a value is stored
    (None: everywhere).
    """
    values = parts[f.name]
    if f.is_integer:
        count = channels * length if free is None else int(free.sum())
        values = unpack_bits(values, f.bits, count).float().sub_(f.qmax)
    else:
        values = values.to(torch.float32, copy=True)
    if free is not None:
        values = torch.zeros(channels, length, device=values.device).masked_scatter_(free, values)
    if f.is_integer:
        scale = parts[f"{f.name}_scale"].float()
        values = values.view(len(scale), -1).mul_(scale[:, None])
    return values.view(channels, length)


def _dtype(f: Format) -> torch.dtype:
    return torch.float16 if f.bits == 16 else torch.float32
