"""How one parameter is to be stored: formats of its channels, single weights that are kept, and the
bytes that takes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lafq.quantization.formats import BY_CODE, Format, bit_bytes, get_format, packed_bytes

CHANNEL_CODE_BITS = 4


class WeightSpec(NamedTuple):
    """How one parameter is stored.

    format: for all of it, or a tuple with one for each output channel.
    keep_mask: boolean, of the weight's shape: these single weights are stored as `keep_format`
    ("fp32" or "fp16") instead.
    steps: FP16 scales (output channels,) of integer formats; None: the recipe's rule chooses them.
    group: so many consecutive weights of a channel share a scale (`ChannelView` order); 0: all of
    them.
    """

    format: str | tuple[str, ...]
    keep_mask: Tensor | None = None
    keep_format: str = "fp32"
    steps: Tensor | None = None
    group: int = 0

    @property
    def formats(self) -> set[Format]:
        """The formats of its channels; ValueError for an unknown one."""
        return {
            get_format(f) for f in ([self.format] if isinstance(self.format, str) else self.format)
        }


class ChannelView(NamedTuple):
    """A parameter seen as rows, one per output channel, the weights of a row in channels-last
    order.

    shape: the parameter's; groups: of a transposed convolution, whose output channels lie in axis
    1; else 0. A vector (bias, norm) is a column.
    """

    shape: tuple[int, ...]
    groups: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """(output channels, weights in each)."""
        channels = self.groups * self.shape[1] if self.groups else (*self.shape, 1)[0]
        return channels, math.prod(self.shape) // channels

    def of(self, weight: Tensor) -> Tensor:
        """The weight, or its mask or Fisher values, as rows (output channels, weights in each)."""
        if self.groups:
            weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight.movedim(1, -1).flatten(1) if weight.ndim > 1 else weight.reshape(-1, 1)

    def back(self, rows: Tensor) -> Tensor:
        """The tensor of the parameter's shape (channels-last in memory) that `of` makes these rows
        of.
        """
        if len(self.shape) < 2:
            return rows.reshape(self.shape)
        inputs = self.shape[0] // self.groups if self.groups else self.shape[1]
        weight = rows.view(self.size[0], *self.shape[2:], inputs).movedim(-1, 1)
        if self.groups:
            weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight

    def check(self, name: str, entry: "str | WeightSpec") -> None:
        """Raise ValueError for an unknown format, or formats and masks that do not fit."""
        if not isinstance(entry, str | WeightSpec):
            raise ValueError(
                f"the plan gives {name} the entry {entry!r}: give the name of a format, or a "
                f"WeightSpec"
            )
        spec = weight_spec(entry)
        format, keep_mask, keep_format, steps, group = spec
        if group and (steps is not None or group < 1 or self.size[1] % group):
            raise ValueError(
                f"{name} has {self.size[1]} weights per channel, so a group of {group} does not "
                f"fit: give a divisor, and no steps"
            )
        given = torch.ones(self.size[0]).half() if steps is None else steps
        if given.shape != self.size[:1] or given.dtype != torch.float16 or not (given > 0).all():
            raise ValueError(
                f"the steps of {name} must be {self.size[0]} FP16 numbers above 0, one per output "
                f"channel"
            )
        if isinstance(format, tuple) and len(format) != self.size[0]:
            raise ValueError(
                f"the plan has {len(format)} formats for the {self.size[0]} output channels of "
                f"{name}: give one for each"
            )
        if steps is None and any(f.name == "int16" for f in spec.formats):
            raise ValueError(
                f"the plan stores {name} in int16, which needs steps of its own: give WeightSpec's "
                f"`steps`, or fp16"
            )
        if len(self.shape) < 2 and any(f.is_integer for f in spec.formats):
            raise ValueError(
                f"{name} has shape {self.shape}: integers need two dimensions, choose fp16 or fp32"
            )
        if get_format(keep_format).is_integer:
            raise ValueError(f"kept weights cannot be {keep_format}: choose fp32 or fp16")
        if keep_mask is not None and (
            keep_mask.shape != self.shape or keep_mask.dtype != torch.bool
        ):
            raise ValueError(
                f"the mask of {name} is {keep_mask.dtype} of shape {tuple(keep_mask.shape)}, the "
                f"parameter has {self.shape}: give one boolean per weight"
            )


def weight_spec(entry: str | WeightSpec) -> WeightSpec:
    """The entry of a plan, written out."""
    return WeightSpec(entry) if isinstance(entry, str) else entry


def stored_bytes(view: ChannelView, entry: str | WeightSpec) -> int:
    """Bytes of one parameter in its stored form: values, scales, channel formats, and what tells
    the kept weights.
    """
    spec, channels = weight_spec(entry), view.size[0]
    kept = torch.zeros(channels, 1) if spec.keep_mask is None else view.of(spec.keep_mask).cpu()
    by_format = channels_by_format(spec.format, channels)
    return counted_bytes(view, by_format, kept.sum(1).long(), spec.keep_format, spec.group)


def counted_bytes(
    view: ChannelView,
    by_format: dict[Format, Tensor],
    in_row: Tensor,
    keep_format: str = "fp32",
    group: int = 0,
) -> int:
    """`stored_bytes` where only the number of kept weights in each channel is known: in_row, int64
    (channels,).

    by_format: the channels of each format (`channels_by_format`).
    """
    channels, length = view.size
    codes = bit_bytes(CHANNEL_CODE_BITS, channels) if len(by_format) > 1 else 0
    scaled = sum(len(rows) for f, rows in by_format.items() if f.is_integer)
    kept = packed_bytes(get_format(keep_format), int(in_row.sum()))
    values = mask_encoding(by_format, in_row, length)[1]
    return codes + 2 * scaled * scales_per_channel(length, group) + kept + values


def scales_per_channel(length: int, group: int) -> int:
    """Scales of a channel of so many weights in an integer format."""
    return length // group if group else 1


def in_fp32(view: ChannelView, entry: str | WeightSpec) -> int:
    """How many weights of a parameter its plan entry leaves in FP32."""
    spec, whole = weight_spec(entry), torch.zeros(view.size, dtype=torch.bool)
    for f, rows in channels_by_format(spec.format, view.size[0]).items():
        whole[rows] = f.name == "fp32"
    if spec.keep_mask is not None:
        whole[view.of(spec.keep_mask).cpu()] = spec.keep_format == "fp32"
    return int(whole.sum())


def channels_by_format(
    format: str | tuple[str, ...], channels: int, device: torch.device | None = None
) -> dict[Format, Tensor]:
    """The channels, by number, of every format in use."""
    if isinstance(format, str) or len(set(format)) == 1:
        name = format if isinstance(format, str) else format[0]
        return {get_format(name): torch.arange(channels, device=device)}
    codes = torch.tensor([get_format(name).code for name in format], device=device)
    return {BY_CODE[i]: (codes == i).nonzero()[:, 0] for i in codes.unique().tolist()}


def mask_encoding(by_format: dict[Format, Tensor], in_row: Tensor, length: int) -> tuple[str, int]:
    """How to tell the kept weights, and the bytes of that together with the values of the other
    weights.

    "mask": one bit per weight. "columns": a count per channel (int32) and a column (`index_dtype`)
    per kept weight, in whose place the values hold a 0. The smaller of the two; "" where none is
    kept. in_row: kept weights in each channel, int64 (channels,).
    """
    kept, channels = int(in_row.sum()), len(in_row)
    dense = sum(packed_bytes(f, len(r) * length) for f, r in by_format.items())
    if not kept:
        return "", dense
    masked = bit_bytes(1, channels * length)
    for f, rows in by_format.items():
        masked += packed_bytes(f, len(rows) * length - int(in_row[rows].sum()))
    sparse = dense + 4 * channels + index_dtype(length).itemsize * kept
    return ("mask", masked) if masked <= sparse else ("columns", sparse)


def index_dtype(length: int) -> torch.dtype:
    """What a weight's place in a row of this length is stored as."""
    return torch.uint16 if length <= 2**16 else torch.int32
