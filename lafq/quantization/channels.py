"""How one parameter is to be stored: formats, single weights that are kept, and their bytes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lafq.quantization.formats import FORMATS, Format, bit_bytes, get_format

CHANNEL_CODE_BITS = 4
ByFormat = dict[Format, Tensor]  # the channels of each format in use, by number


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
        return set(map(get_format, [self.format] if isinstance(self.format, str) else self.format))

    def codes(self, channels: int) -> Tensor:
        """The code of each channel's format, uint8 (channels,)."""
        names = (self.format,) * channels if isinstance(self.format, str) else self.format
        return torch.tensor([get_format(name).code for name in names], dtype=torch.uint8)


class ChannelView(NamedTuple):
    """A parameter as rows, one per output channel, the weights of a row in channels-last order.

    shape: the parameter's; groups: of a transposed convolution, whose output channels lie in axis
    1; else 0. axis: of the output channels where those before it have length 1, as in a position
    embedding (1, N, D). A vector (bias, norm) is a column.
    """

    shape: tuple[int, ...]
    groups: int = 0
    axis: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """(output channels, weights in each)."""
        channels = self.groups * self.shape[1] if self.groups else (*self.shape, 1)[self.axis]
        return channels, math.prod(self.shape) // channels

    def of(self, weight: Tensor) -> Tensor:
        """The weight, or its mask or Fisher values, as rows (output channels, weights in each)."""
        weight = self._swapped(weight.flatten(0, self.axis))
        return weight.movedim(1, -1).flatten(1) if weight.ndim > 1 else weight.reshape(-1, 1)

    def back(self, rows: Tensor) -> Tensor:
        """The tensor, channels-last in memory, that `of` makes these rows of."""
        if len(self.shape) < 2:
            return rows.reshape(self.shape)
        rows = rows.view(self.size[0], *self.shape[self.axis + 2 :], -1)
        weight = self._swapped(rows.movedim(-1, 1))
        return weight.view(self.shape) if self.axis else weight

    def _swapped(self, weight: Tensor) -> Tensor:
        """Input and output channels of a transposed convolution in each other's place."""
        if not self.groups:
            return weight
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)


def weight_spec(entry: str | WeightSpec) -> WeightSpec:
    """The entry of a plan, written out."""
    return WeightSpec(entry) if isinstance(entry, str) else entry


def channels_by_format(codes: Tensor) -> ByFormat:
    """The channels of every format in use, from their codes."""
    used = codes.unique().tolist()
    return {f: (codes == f.code).nonzero()[:, 0] for f in FORMATS.values() if f.code in used}


def stored_bytes(view: ChannelView, entry: str | WeightSpec) -> int:
    """Bytes of one parameter in its stored form, as `QuantizedWeight` holds it."""
    spec, channels = weight_spec(entry), view.size[0]
    kept = torch.zeros(channels, 1) if spec.keep_mask is None else view.of(spec.keep_mask).cpu()
    by_format = channels_by_format(spec.codes(channels))
    return counted_bytes(view, by_format, kept.sum(1).long(), spec.keep_format, spec.group)


def counted_bytes(
    view: ChannelView,
    by_format: ByFormat,
    in_row: Tensor,
    keep_format: str = "fp32",
    group: int = 0,
) -> int:
    """`stored_bytes` by the number of kept weights in each channel, in_row, int64 (channels,)."""
    channels, length = view.size
    codes = bit_bytes(CHANNEL_CODE_BITS, channels) if len(by_format) > 1 else 0
    scaled = sum(len(rows) for f, rows in by_format.items() if f.is_integer)
    scales = 2 * scaled * (length // (group or length))
    kept = bit_bytes(get_format(keep_format).bits, int(in_row.sum()))
    return codes + scales + kept + mask_encoding(by_format, in_row, length)[1]


def mask_encoding(by_format: ByFormat, in_row: Tensor, length: int) -> tuple[str, int]:
    """How to tell the kept weights, and the bytes of that and of the other weights' values.

    "mask": one bit per weight. "columns": a count per channel (int32) and a column (`index_dtype`)
    per kept weight, in whose place the values hold a 0. The smaller of the two; "" where none is
    kept.
    """
    kept, channels = int(in_row.sum()), len(in_row)
    whole = sum(bit_bytes(f.bits, len(rows) * length) for f, rows in by_format.items())
    if not kept:
        return "", whole
    masked = bit_bytes(1, channels * length)
    for f, rows in by_format.items():
        masked += bit_bytes(f.bits, len(rows) * length - int(in_row[rows].sum()))
    columns = whole + 4 * channels + index_dtype(length).itemsize * kept
    return ("mask", masked) if masked <= columns else ("columns", columns)


def index_dtype(length: int) -> torch.dtype:
    """What a weight's place in a row of this length is stored as."""
    return torch.uint16 if length <= 2**16 else torch.int32
