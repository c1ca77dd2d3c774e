"""One parameter in its stored form: codes, scales, masks; calling it gives the FP32 weight."""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lafq.quantization.channels import (
    CHANNEL_CODE_BITS,
    ByFormat,
    ChannelView,
    WeightSpec,
    channels_by_format,
    index_dtype,
    mask_encoding,
    weight_spec,
)
from lafq.quantization.formats import (
    FORMATS,
    Format,
    ScaleRule,
    absmax_scale,
    encode,
    get_format,
    pack_bits,
    scales_by_group,
    unpack_bits,
)
from lafq.quantization.rounding import factor, rounded


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("a quantized weight cannot be written: dequantize the model, then change it")


class Unpacked(Tensor):
    """A weight unpacked for one use: what was written into it (a merged LoRA) would be lost."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    data = property(_refuse, _refuse)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().clone()


for _name in dir(Tensor):
    if _name.endswith("_") and not _name.startswith("_") and _name != "requires_grad_":
        setattr(Unpacked, _name, _refuse)


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
        rule: ScaleRule = absmax_scale,
        fisher: Tensor | None = None,
        curvature: Tensor | None = None,
    ) -> "QuantizedWeight":
        """Quantize a weight whose plan entry has been checked; fisher, of its shape, as for the
        rule; curvature as for `rounding.factor`, or None to round to the nearest code.
        """
        device, spec, values = weight.device, weight_spec(entry), view.of(weight)
        codes = spec.codes(view.size[0]).to(device)
        by_format = channels_by_format(codes)
        mask = None if spec.keep_mask is None else view.of(spec.keep_mask.to(device))
        fisher = None if fisher is None else _without(view.of(fisher.to(device)), mask)
        scales, qmax = _scales(_without(values, mask), by_format, rule, fisher, spec)
        if curvature is not None and qmax.any():
            values, _ = rounded(
                values, scales, qmax, factor(curvature.to(device), values.shape[1]), mask
            )
        parts = _parts(values, scales, by_format, mask, get_format(spec.keep_format))
        if len(by_format) > 1:
            parts["formats"] = pack_bits(codes, CHANNEL_CODE_BITS)
        return cls(parts, view)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":
        """Moves follow, casts do not: stored bits mean something else in another dtype."""
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    @torch.no_grad()
    def forward(self, original: Tensor) -> Tensor:
        """The weight; `original` is empty and has the dtype that the model has been cast to."""
        parts, mask, by_format = self._buffers, self._mask(), self._channels_by_format()
        how = {"dtype": torch.float32, "device": next(self.buffers()).device}
        weight = torch.empty(self.view.size, **how)
        for f, rows in by_format.items():
            free = None if mask is None else ~mask[rows]
            values = _decode(parts, f, torch.Size((len(rows), weight.shape[1])), free)
            if len(by_format) == 1:
                weight = values
            else:
                weight[rows] = values
        if mask is not None:
            weight.masked_scatter_(mask, parts["kept"].float())
        elif "columns" in parts:
            row = torch.arange(len(weight), device=weight.device).repeat_interleave(parts["counts"])
            weight[row, parts["columns"].long()] = parts["kept"].float()
        weight = self.view.back(weight).to(original.dtype)
        return weight.as_subclass(Unpacked) if type(weight) is Tensor else weight

    def codes(self) -> dict[str, Tensor]:
        """Of each integer format its codes by channel, (R, n), uint8 or, of 16 bits, int32; (1, n)
        where a mask leaves some out.
        """
        mask, length, found = self._mask(), self.view.size[1], {}
        for f, rows in self._channels_by_format().items():
            if f.is_integer:
                left_out = 0 if mask is None else int(mask[rows].sum())
                count, packed = len(rows) * length - left_out, self._buffers[f.name]
                codes = unpack_bits(packed, f.bits, count)
                found[f.name] = codes.view(1 if left_out else len(rows), -1)
        return found

    def describe(self) -> dict[str, Any]:
        """The entry of the plan in words, for the metadata of a file."""
        parts = dict(self.named_buffers())
        words: dict[str, Any] = {
            "shape": list(self.view.shape),
            "groups": self.view.groups,
            "formats": [f for f in FORMATS if f in parts],
        }
        words |= {"axis": self.view.axis} if self.view.axis else {}
        for f, rows in self._channels_by_format().items():
            if f.is_integer and len(parts[f"{f.name}_scale"]) > len(rows):
                words["group"] = self.view.size[1] * len(rows) // len(parts[f"{f.name}_scale"])
        if "kept" in parts:
            high = "fp16" if parts["kept"].dtype == torch.float16 else "fp32"
            words |= {"kept": parts["kept"].numel(), "high": high}
        return words

    def _mask(self) -> Tensor | None:
        """Which weights are kept and have no place among the values, boolean (R, C)."""
        packed, size = self._buffers.get("mask"), self.view.size
        return None if packed is None else unpack_bits(packed, 1, math.prod(size)).bool().view(size)

    def _channels_by_format(self) -> ByFormat:
        channels, packed = self.view.size[0], self._buffers.get("formats")
        if packed is not None:
            return channels_by_format(unpack_bits(packed, CHANNEL_CODE_BITS, channels))
        f = next(f for f in FORMATS.values() if f.name in self._buffers)
        return {f: torch.arange(channels, device=next(self.buffers()).device)}


def _scales(
    values: Tensor, by_format: ByFormat, rule: ScaleRule, fisher: Tensor | None, spec: WeightSpec
) -> tuple[Tensor, Tensor]:
    """FP16 scales (R, n) and qmax (R,); 1 and 0 for a row that is not integer."""
    channels, length = values.shape
    scales = values.new_ones(channels, length // (spec.group or length), dtype=torch.float16)
    qmax = torch.zeros_like(values[:, 0])
    for f, rows in by_format.items():
        if f.is_integer:
            qmax[rows] = f.qmax
            if spec.steps is None:
                of_rows = None if fisher is None else fisher[rows]
                scales[rows] = scales_by_group(rule, values[rows], f.qmax, of_rows, spec.group)
            else:
                scales[rows, 0] = spec.steps.to(rows.device)[rows]
    return scales, qmax


def _parts(
    values: Tensor, scales: Tensor, by_format: ByFormat, mask: Tensor | None, keep_format: Format
) -> dict[str, Tensor]:
    """The stored tensors but `formats`."""
    parts = {} if mask is None else _kept_parts(values, by_format, mask, keep_format)
    values = _without(values, mask)
    for f, rows in by_format.items():
        stored = values if len(by_format) == 1 else values[rows]
        if f.is_integer:
            parts[f"{f.name}_scale"] = scales[rows].flatten()
            stored = encode(stored, scales[rows], f.qmax)
        stored = stored[~mask[rows]] if "mask" in parts else stored.flatten()
        parts[f.name] = pack_bits(stored, f.bits) if f.is_integer else stored.to(f.dtype, copy=True)
    return parts


def _kept_parts(
    values: Tensor, by_format: ByFormat, mask: Tensor, keep_format: Format
) -> dict[str, Tensor]:
    """The values of the kept weights, and what tells which they are; none where none is kept."""
    in_row, length = mask.sum(1), values.shape[1]
    encoding, _ = mask_encoding(by_format, in_row, length)
    if not encoding:
        return {}
    # Kept weights take up errors of others, and may then exceed FP16's range.
    limit = torch.finfo(keep_format.dtype).max
    parts = {"kept": values[mask].clamp(-limit, limit).to(keep_format.dtype)}
    if encoding == "mask":
        return parts | {"mask": pack_bits(mask.flatten().to(torch.uint8), 1)}
    return parts | {"counts": in_row.int(), "columns": mask.nonzero()[:, 1].to(index_dtype(length))}


def _without(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values, and 0 for kept weights."""
    return values if mask is None else values.masked_fill(mask, 0)


def _decode(parts: dict[str, Tensor], f: Format, size: torch.Size, free: Tensor | None) -> Tensor:
    """The channels of a format in FP32; free: where a value is stored (None: everywhere)."""
    values = parts[f.name]
    if f.is_integer:
        count = size.numel() if free is None else int(free.sum())
        values = unpack_bits(values, f.bits, count).float().sub_(f.qmax)
    else:
        values = values.to(torch.float32, copy=True)
    if free is not None:
        values = values.new_zeros(size).masked_scatter_(free, values)
    if f.is_integer:
        scale = parts[f"{f.name}_scale"].float()
        values = values.view(len(scale), -1).mul_(scale[:, None])
    return values.view(size)
