"""Number formats: what a weight can be stored as, how a scale is chosen, and how codes become
bytes.

Integers are symmetric. The weight w is stored as the code q = round(w / s), limited to -qmax..qmax,
and read back as s * q; the scale s, an FP16 number, is that of its output channel or of a group of
consecutive weights of it. Its rules: `absmax_scale`, `weighted_mse_scale` and `unshrunk_scale`.

Symmetric codes leave one of four 2-bit codes unused. The format "midrise2" uses all: codes -1.5,
-0.5, 0.5, 1.5 (a mid-rise quantizer, which has no level at 0; Gersho and Gray 1992, section 5.4).

Weights come as rows, (output channels R, weights per channel C).
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


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
        """The largest code of an integer, a half-integer where there is no code 0; else 0."""
        return max(self.levels - 1, 0) / 2

    @property
    def dtype(self) -> torch.dtype:
        """In which the numbers of FP32 and FP16 are stored."""
        return torch.float16 if self.bits == 16 else torch.float32

    @property
    def least_absmax(self) -> float:
        """Smallest max |w| of a tensor: below it, FP16 numbers or scales err by 3 % and more."""
        return 0.0 if self.bits == 32 else max(1, self.qmax) * 2**-20


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


def nearest_code(values: Tensor, qmax: float) -> Tensor:
    """The code nearest to each value in units of the scale, in place; limited to -qmax..qmax."""
    half = qmax % 1
    return (values.sub_(half).round_().add_(half) if half else values.round_()).clamp_(-qmax, qmax)


def absmax_scale(rows: Tensor, qmax: float, fisher: Tensor | None = None) -> Tensor:
    """FP16 scales (R,) by which the weight farthest from 0 has the largest code; 1 for zeros."""
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
    weighted = rows if fisher is None else _counted(fisher) * rows
    square = (weighted * rows).sum(1, keepdim=True)
    for _ in range(2):
        along = nearest_code(rows / scales, qmax).mul_(weighted).sum(1, keepdim=True)
        scales = torch.where(along > 0, square / along, scales)
    return _usable(scales[:, 0], qmax)


def scales_by_group(
    rule: ScaleRule, rows: Tensor, qmax: float, fisher: Tensor | None = None, group: int = 0
) -> Tensor:
    """FP16 scales (R, n), one for each `group` of consecutive weights of a row; 0: for all C."""
    parts = rows.reshape(-1, group or rows.shape[1])
    fisher = None if fisher is None else fisher.reshape(parts.shape)
    return rule(parts, qmax, fisher).view(len(rows), -1)


def _in_steps(rows: Tensor, scales: Tensor) -> Tensor:
    """The rows (R, C) in units of their scales (R, n), (R, n, C / n)."""
    return rows.reshape(*scales.shape, -1) / scales[..., None].float()


def encode(rows: Tensor, scales: Tensor, qmax: float) -> Tensor:
    """Codes (R, C) of the rows, plus qmax (0 is -qmax): uint8 or, beyond 255, int32."""
    codes = nearest_code(_in_steps(rows, scales), qmax).add_(qmax)
    return codes.to(torch.uint8 if qmax < 128 else torch.int32).view_as(rows)


def fake_quantize(
    rows: Tensor, f: Format, rule: ScaleRule, fisher: Tensor | None = None, group: int = 0
) -> Tensor:
    """The rows (R, C) as they are read after being stored in a format."""
    if not f.is_integer:
        return rows.to(f.dtype).float()
    scales = scales_by_group(rule, rows, f.qmax, fisher, group)
    return nearest_code(_in_steps(rows, scales), f.qmax).mul_(scales[..., None]).view_as(rows)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (n,) below 2**bits into bytes, without gaps: uint8 codes of 1 to 8 bits, or int32
    codes of 16 bits.

    The codes are cut into planes of 8, 4, 2 and 1 bits (6 = 4 + 2, 3 = 2 + 1). A plane that holds k
    codes a byte puts codes j, m + j, 2 m + j, ... into byte j of m = ceil(n / k).
    """
    if bits == 16:
        return (codes - 2**15).to(torch.int16).view(torch.uint8)
    planes = []
    for width in _planes(bits):
        plane = pad(codes & (2**width - 1), (0, -len(codes) % (8 // width)))
        places = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        planes.append((plane.view(len(places), -1) << places[:, None]).sum(0, dtype=torch.uint8))
        codes = codes >> width
    return torch.cat(planes)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes (count,) that `pack_bits` packed, uint8 or, of 16 bits, int32."""
    if bits == 16:
        return packed.view(torch.int16)[:count].int() + 2**15
    planes, shift = [], 0
    for width in _planes(bits):
        plane, packed = packed.tensor_split([bit_bytes(width, count)])
        if width < 8:
            places = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
            plane = ((plane >> places[:, None]) & (2**width - 1)).flatten()[:count]
        planes.append(plane << shift if shift else plane)
        shift += width
    return reduce(torch.bitwise_or, planes)


def bit_bytes(bits: int, count: int) -> int:
    """Bytes of `count` numbers of so many bits."""
    return sum(-(-count * width // 8) for width in _planes(bits))


def _planes(bits: int) -> list[int]:
    return [width for width in (32, 16, 8, 4, 2, 1) if bits & width]


def _usable(scale: Tensor, qmax: float) -> Tensor:
    # 2**-24 is the smallest FP16 number: below it a scale would become 0. Without a code 0 a row of
    # zeros needs it.
    return torch.where(scale > 0, scale, 2**-24 if qmax % 1 else 1).clamp(2**-24, FP16_MAX).half()


def _counted(fisher: Tensor) -> Tensor:
    """What the weights of a row count: alike where all their Fisher values are 0."""
    return torch.where(fisher.sum(1, keepdim=True) > 0, fisher, 1)


def _least_squares(rows: Tensor, qmax: float, fisher: Tensor) -> Tensor:
    weight = _counted(fisher)
    weighted = weight * rows
    start = rows.abs().amax(1, keepdim=True) / qmax
    best = start = torch.where(start > 0, start, 1)
    gain = torch.full_like(start, -math.inf)
    for i, share in enumerate((*COARSE, *FINE)):
        scale = (start if i < len(COARSE) else best) * share
        codes = nearest_code(rows / scale, qmax)
        cross = (weighted * codes).sum(1, keepdim=True)
        square = codes.square_().mul_(weight).sum(1, keepdim=True)
        gained = torch.where(square > 0, cross.square() / square, 0)
        better = gained > gain
        best = torch.where(better, torch.where(square > 0, cross / square, scale), best)
        gain = torch.where(better, gained, gain)
    return _usable(best[:, 0], qmax)
