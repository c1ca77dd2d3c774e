"""Number formats: what a weight can be stored as, how a scale is chosen, and how codes become
bytes.

Integers are symmetric. Each output channel has a scale s, stored in FP16. The weight w is stored as
the code q = round(w / s), limited to -qmax..qmax, and read back as s * q. There are three rules for
s: `absmax_scale` takes the smallest s that clips nothing, `weighted_mse_scale` the one of least
(Fisher-weighted) squared error, `unshrunk_scale` removes the shrinkage of the latter.

Symmetric codes leave one of four 2-bit codes unused. The format "midrise2" uses all: codes -1.5,
-0.5, 0.5, 1.5 (a mid-rise quantizer, which has no level at 0; Gersho and Gray 1992, section 5.4).
It has four levels, so its qmax is 1.5.

Weights come as rows, (output channels, weights per channel).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Format(NamedTuple):
    """A number format.

    bits: per weight. code: the number by which a file names it for a channel, which is never given
    to another. levels: of an integer, how many values a code has; 0 for FP32 and FP16.
    """

    name: str
    bits: int
    code: int
    levels: int = 0

    @property
    def is_integer(self) -> bool:
        """Whether weights are codes times a scale."""
        return self.levels > 0

    @property
    def qmax(self) -> float:
        """The largest code of an integer; a half-integer where there is no code 0."""
        return (self.levels - 1) / 2


FORMATS = {
    f.name: f
    for f in (
        Format("fp32", 32, code=0),
        Format("fp16", 16, code=1),
        Format("int8", 8, code=2, levels=255),
        Format("int6", 6, code=3, levels=63),
        Format("int4", 4, code=4, levels=15),
        Format("int3", 3, code=5, levels=7),
        Format("int2", 2, code=6, levels=3),
        Format("int7", 7, code=7, levels=127),
        Format("int5", 5, code=8, levels=31),
        Format("int16", 16, code=9, levels=65535),
        Format("midrise2", 2, code=10, levels=4),
    )
}
BY_CODE = {f.code: f for f in FORMATS.values()}
# What the tables of the study choose from, and `allocate`; the others serve files of free steps.
STUDY_FORMATS = ("fp32", "fp16", "int8", "int6", "int4", "int3", "int2")
DEFAULT_FORMATS = (*STUDY_FORMATS, "midrise2")
FP16_MAX = torch.finfo(torch.float16).max
COARSE = torch.logspace(0, math.log10(0.15), 14).tolist()
FINE = (1, 0.95, 1.05, 0.98, 1.02, 1)
BLOCK = 2**18
MIB = 2**20

ScaleRule = Callable[[Tensor, float, Tensor | None], Tensor]


def get_format(name: str) -> Format:
    """The format of a name; ValueError when there is none."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def least_absmax(f: Format) -> float:
    """Smallest max |w| that a tensor may have to be stored in a format: below it, FP16 numbers or
    scales err by 3 % and more.
    """
    return 0.0 if f.bits == 32 else (max(1, f.qmax) if f.is_integer else 1) * 2**-20


def nearest_code(values: Tensor, qmax: float) -> Tensor:
    """The code nearest to each value in units of the scale, in place; limited to -qmax..qmax."""
    half = qmax % 1
    return (values.sub_(half).round_().add_(half) if half else values.round_()).clamp_(-qmax, qmax)


def absmax_scale(rows: Tensor, qmax: float, fisher: Tensor | None = None) -> Tensor:
    """FP16 scales (R,) that give the largest absolute weight of each row the largest code; 1 for a
    row of zeros.
    """
    return _usable(rows.abs().amax(1) / qmax, qmax)


def weighted_mse_scale(rows: Tensor, qmax: float, fisher: Tensor | None = None) -> Tensor:
    """FP16 scales (R,) of least sum over the row of F * (w - s * q)^2.

    fisher: F, of the shape of `rows`, at least 0 (the Fisher values: the error is then the
    predicted damage); without it, and for a row where all F are 0, every weight counts alike. For
    given codes q the best scale is sum(F w q) / sum(F q^2), leaving sum(F w^2) - sum(F w q)^2 /
    sum(F q^2): that is evaluated for the codes of 14 shares of the absmax scale, and around the
    best of them once more.
    """
    fisher = torch.ones_like(rows) if fisher is None else fisher
    size = max(1, BLOCK // rows.shape[1])
    blocks = zip(rows.split(size), fisher.split(size), strict=True)
    return torch.cat([_least_squares(w, qmax, f) for w, f in blocks])


def unshrunk_scale(rows: Tensor, qmax: float, fisher: Tensor | None = None) -> Tensor:
    """FP16 scales (R,) without least-squares shrinkage.

    `weighted_mse_scale`, moved twice to sum(F * w * (s * q - w)) = 0 for its codes q.

    The scale of least error shrinks the row, since its error is orthogonal to q and not to w: as a
    whole and so coherently, which at 2 and 3 bits changes the output by more than the diagonal of
    the Fisher information tells.
    """
    scales = weighted_mse_scale(rows, qmax, fisher)[:, None].float()
    weight = 1 if fisher is None else torch.where(fisher.sum(1, keepdim=True) > 0, fisher, 1)
    weight = weight * rows
    square = (weight * rows).sum(1, keepdim=True)
    for _ in range(2):
        along = nearest_code(rows / scales, qmax).mul_(weight).sum(1, keepdim=True)
        scales = torch.where(along > 0, square / along, scales)
    return _usable(scales[:, 0], qmax)


def grouped_scale(
    rule: ScaleRule, rows: Tensor, qmax: float, fisher: Tensor | None, group: int
) -> Tensor:
    """FP16 scales of a rule, one per row (R,), or one per group of so many consecutive weights, (R
    * C / group,).
    """
    if group:
        fisher = None if fisher is None else fisher.reshape(-1, group)
        rows = rows.reshape(-1, group)
    return rule(rows, qmax, fisher)


def spread_scale(scales: Tensor, channels: int, group: int) -> Tensor:
    """Scales in FP32 as rounding takes them: one per row (R,), or of groups, one per weight
    (R, C).
    """
    scales = scales.float()
    return scales.view(channels, -1).repeat_interleave(group, 1) if group else scales


def encode(values: Tensor, scale: Tensor, qmax: float) -> Tensor:
    """Codes nearest to values / scale, plus qmax (0 is -qmax): uint8 or, beyond 255, int32."""
    dtype = torch.uint8 if qmax < 128 else torch.int32
    return nearest_code(values / scale, qmax).add_(qmax).to(dtype)


def fake_quantize(
    rows: Tensor, f: Format, scale: ScaleRule, fisher: Tensor | None = None, group: int = 0
) -> Tensor:
    """The rows (R, C) as they are read after being stored in a format: what rounding leaves of
    them.
    """
    if not f.is_integer:
        return rows.half().float() if f.bits == 16 else rows
    scales = spread_scale(grouped_scale(scale, rows, f.qmax, fisher, group), len(rows), group)
    scales = scales if group else scales[:, None]
    return nearest_code(rows / scales, f.qmax).mul_(scales)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (n,) below 2**bits into bytes, without gaps: uint8 codes of 1 to 8 bits, or int32
    codes of 16 bits.

    The codes are cut into planes of 8, 4, 2 and 1 bits (6 = 4 + 2, 3 = 2 + 1). A plane that holds k
    codes a byte puts codes j, m + j, 2 m + j, ... into byte j of m = ceil(n / k).
    """
    if bits == 16:
        return (codes - 2**15).to(torch.int16).view(torch.uint8)
    planes, shift = [], 0
    for width in _planes(bits):
        plane = (codes >> shift) & (2**width - 1)
        per_byte = 8 // width
        plane = torch.cat((plane, plane.new_zeros(-len(plane) % per_byte))).view(per_byte, -1)
        packed = plane[0].clone()
        for i in range(1, per_byte):
            packed |= plane[i] << (i * width)
        planes.append(packed)
        shift += width
    return torch.cat(planes)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes (count,) that `pack_bits` packed, uint8 or, of 16 bits, int32."""
    if bits == 16:
        return packed.view(torch.int16)[:count].int() + 2**15
    codes, start, shift = None, 0, 0
    for width in _planes(bits):
        per_byte = 8 // width
        part = packed[start : start + -(-count // per_byte)]
        pieces = [(part >> (i * width)) & (2**width - 1) for i in range(per_byte)]
        plane = torch.cat(pieces)[:count] if width < 8 else part
        codes = plane if codes is None else codes | (plane << shift)
        start, shift = start + len(part), shift + width
    return codes


def packed_bytes(format: Format, count: int) -> int:
    """Bytes of `count` weights in a format, without scales."""
    return bit_bytes(format.bits, count) if format.is_integer else count * format.bits // 8


def bit_bytes(bits: int, count: int) -> int:
    """Bytes of `count` codes of so many bits, as `pack_bits` packs them."""
    return sum(-(-count * width // 8) for width in _planes(bits))


def _planes(bits: int) -> list[int]:
    return [width for width in (16, 8, 4, 2, 1) if bits & width]


def _usable(scale: Tensor, qmax: float) -> Tensor:
    # 2**-24 is the smallest FP16 number: below it a scale would become 0. Without a code 0 a row of
    # zeros needs it.
    return torch.where(scale > 0, scale, 2**-24 if qmax % 1 else 1).clamp(2**-24, FP16_MAX).half()


def _least_squares(rows: Tensor, qmax: float, fisher: Tensor) -> Tensor:
    weight = torch.where(fisher.sum(1, keepdim=True) > 0, fisher, 1)
    weighted = weight * rows
    start = rows.abs().amax(1, keepdim=True) / qmax
    start = torch.where(start > 0, start, 1)
    best, gain = start, torch.full_like(start, -math.inf)

    def improve(scale: Tensor) -> None:
        nonlocal best, gain
        codes = nearest_code(rows / scale, qmax)
        cross = (weighted * codes).sum(1, keepdim=True)
        square = codes.square_().mul_(weight).sum(1, keepdim=True)
        gained = torch.where(square > 0, cross.square() / square, 0)
        better = gained > gain
        best = torch.where(better, torch.where(square > 0, cross / square, scale), best)
        gain = torch.where(better, gained, gain)

    for share in COARSE:
        improve(start * share)
    for step in FINE:
        improve(best * step)
    return _usable(best[:, 0], qmax)
