"""Entropy coding of integer codes, for files: small codes are frequent, so they take fewer bits
than packed ones.

The codes of a channel are much alike, so channels whose codes have about the same root mean square
share a table of frequencies. Tables, and the number of each channel's, are stored. The codes of
all tensors are one stream, table after table, by asymmetric numeral systems (Duda 2013; the library
constriction). Tables are symmetric. Codes of a root mean square of 16 and more are cut: their
low bits, which are nearly even, are stored as they are. Nothing is lost, and as a decoder computes
with whole numbers, every machine decodes alike.

Files before format version 5 have a stream per tensor, coded by LZMA.
"""

import math
import zlib
from collections import Counter
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from constriction import stream as ans
from torch import Tensor

from lafq.quantization.formats import Format, get_format, pack_bits

PER_OCTAVE = 8  # classes of channels, at first; neighbours then share a table if that saves bytes
UNCUT = 4  # octaves
ZEROS = -8  # the octave of channels that are 0 everywhere
HALVES = 2**12  # added to the class of a channel whose codes are halves
SPARE = 1e-5, 32  # of a stream beyond its ideal length, at most: a share, and bytes


class Block(NamedTuple):
    """Codes of one format of a tensor (R, n), n of each channel, from 0 to levels - 1: uint8 or,
    of 16 bits, int32.
    """

    codes: np.ndarray
    format: Format

    @property
    def signed(self) -> np.ndarray:
        """The codes around 0, or around -1/2 where they are halves, int32 (R, n)."""
        return self.codes.astype(np.int32) - self.format.levels // 2

    @property
    def classes(self) -> np.ndarray:
        """The class of each channel, by its root mean square (R,)."""
        half = self.format.levels % 2 == 0
        squares = np.square(self.signed + np.float32(half / 2)).mean(1, dtype=np.float64)
        octaves = np.log2(squares.clip(4.0**ZEROS)) / 2
        return np.rint(PER_OCTAVE * octaves).astype(int) + HALVES * half


class Table(NamedTuple):
    """How often codes occur after their last `shift` bits are cut.

    size: how many codes there are, around 0 if it is odd, around -1/2 if it is even. frequencies:
    of the codes from the middle on, each with its mirror image ((size + 1) // 2,).
    """

    size: int
    shift: int
    frequencies: np.ndarray

    @property
    def bits(self) -> np.ndarray:
        """Of these codes, ideally, with their sign and what is cut."""
        bits = np.log2(self.frequencies.sum()) - np.log2(self.frequencies.clip(1))
        bits[self.size % 2 :] += 1
        return bits + self.shift

    @property
    def model(self) -> ans.model.Categorical:
        """What the library codes by; whole numbers in float64 add up alike everywhere."""
        upper, odd = self.frequencies.astype(float), self.size % 2
        upper[:odd] *= 2  # 0 is its own mirror image
        return ans.model.Categorical(np.concatenate([upper[odd:][::-1], upper]), perfect=False)


class Coding:
    """Tables fitted to blocks, and the stream.

    numbers: by block, the table of each channel, uint8 (R,). bits: by block, of its codes, ideally.
    nbytes: of the stream with its tables, by its ideal length, at most `SPARE` too many.
    """

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks, classes = blocks, [block.classes for block in blocks]
        counts = [_counts(*pair) for pair in zip(blocks, classes, strict=True)]
        groups: list[_Group] = []
        for c, channels in sorted(Counter(np.concatenate([[], *classes]).tolist()).items()):
            total = reduce(_sum, [of_block[c] for of_block in counts if c in of_block])
            groups.append(_Group([int(c)], total, channels))
            while len(groups) > 1 and (joined := groups[-2].joined(groups[-1])):
                groups[-2:] = [joined]
        self.tables = [group.table for group in groups]
        number = {c: i for i, group in enumerate(groups) for c in group.classes}
        self.numbers = [np.array([number[c] for c in of.tolist()], np.uint8) for of in classes]
        bits = {c: group.table.bits for group in groups for c in group.classes}
        self.bits = [sum(n @ bits[c][: len(n)] for c, n in of.items()) for of in counts]
        sizes = np.array([table[:2] for table in self.tables], "<u4")
        parts = [sizes, *(_to_bytes(table.frequencies) for table in self.tables), *self.numbers]
        self.side = zlib.compress(b"".join(part.tobytes() for part in parts), 9)
        share, more = SPARE
        self.nbytes = len(self.side) + math.ceil((1 + share) * sum(self.bits) / 8) + more

    def stream(self) -> tuple[bytes, dict[str, int]]:
        """The bytes, and what reading them needs."""
        coder = ans.stack.AnsCoder()
        for i, table in reversed([*enumerate(self.tables)]):
            pairs = zip(self.blocks, self.numbers, strict=True)
            parts = [Block(codes[of == i], f).signed.ravel() for (codes, f), of in pairs]
            codes = np.concatenate(parts)
            if table.shift:
                coder.encode_reverse(codes & 2**table.shift - 1, ans.model.Uniform(2**table.shift))
            if table.size > 1:
                coder.encode_reverse((codes >> table.shift) + table.size // 2, table.model)
        stream = self.side + coder.get_compressed().astype("<u4").tobytes()
        return stream, self.known(_checksum(self.blocks))

    def known(self, checksum: int) -> dict[str, int]:
        """What reading the stream needs, given a checksum of the codes."""
        return {"tables": len(self.tables), "side": len(self.side), "crc32": checksum}


def decode(
    stream: bytes, known: dict[str, int], sizes: list[tuple[Format, int, int]]
) -> list[Block]:
    """The blocks that were coded, of these formats, channels and codes per channel.

    Raises ValueError for a stream that does not decode to them.
    """
    blocks = [Block(np.zeros(of, np.uint8 if f.bits < 16 else np.int32), f) for f, *of in sizes]
    try:
        side = zlib.decompress(stream[: known["side"]])
        tables, numbers = _read_side(side, known["tables"], [len(codes) for codes, _ in blocks])
        words = np.frombuffer(stream, "<u4", offset=known["side"]).astype(np.uint32)
        coder = ans.stack.AnsCoder(words if len(words) else None)
        for i, table in enumerate(tables):
            places = [(block, number == i) for block, number in zip(blocks, numbers, strict=True)]
            counts = [np.count_nonzero(of) * block.codes.shape[1] for block, of in places]
            codes = np.zeros(sum(counts), np.int32)
            if table.size > 1:
                codes = coder.decode(table.model, len(codes)) - table.size // 2
            if table.shift:
                low = coder.decode(ans.model.Uniform(2**table.shift), len(codes))
                codes = (codes << table.shift) + low
            parts = np.split(codes, np.cumsum(counts)[:-1])
            for (block, of), part in zip(places, parts, strict=True):
                block.codes[of] = part.reshape(-1, block.codes.shape[1]) + block.format.levels // 2
        if not coder.is_empty():
            raise ValueError("it holds more than its codes")
    except (ValueError, IndexError, AssertionError, zlib.error) as error:
        raise ValueError(f"the coded stream is damaged ({error})") from None
    if _checksum(blocks) != known["crc32"]:
        raise ValueError("the coded stream is damaged (its codes have another checksum)")
    return blocks


class _Group(NamedTuple):
    """Classes that share a table, how often their codes occur, and how many channels they have."""

    classes: list[int]
    counts: np.ndarray
    channels: int

    @property
    def table(self) -> Table:
        shift, even = _cut(self.classes[0])
        return Table(2 * len(self.counts) - (not even), shift, _stored(_to_bytes(self.counts)))

    @property
    def cost(self) -> float:
        """Bits of codes, table, and numbers of the channels, but for what all groups have."""
        table = 8 * len(self.counts) - self.channels * math.log2(self.channels)
        return self.counts @ self.table.bits + table

    def joined(self, other: "_Group") -> "_Group | None":
        """With another group, if that takes fewer bits."""
        if _cut(self.classes[0]) != _cut(other.classes[0]):
            return None
        counts, channels = _sum(self.counts, other.counts), self.channels + other.channels
        both = _Group(self.classes + other.classes, counts, channels)
        return both if both.cost <= self.cost + other.cost else None


def _cut(of_class: int) -> tuple[int, bool]:
    """By how many bits the codes of a class are cut, and whether they then lie around -1/2."""
    if of_class > HALVES // 2:
        return 0, True
    shift = max(of_class // PER_OCTAVE - UNCUT + 1, 0)
    return shift, shift > 0


def _counts(block: Block, classes: np.ndarray) -> dict[int, np.ndarray]:
    """By class, how often codes occur, from the middle on, with their mirror images."""
    counts, signed = {}, block.signed
    for of_class in np.unique(classes).tolist():
        shift, even = _cut(of_class)
        codes = signed[classes == of_class].ravel() >> shift
        counts[of_class] = np.bincount(codes ^ (codes >> 31) if even else np.abs(codes))
    return counts


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of counts of different lengths."""
    length = max(len(a), len(b))
    return np.pad(a, (0, length - len(a))) + np.pad(b, (0, length - len(b)))


def _to_bytes(counts: np.ndarray) -> np.ndarray:
    """Counts to four significant bits: eight times an exponent, and a mantissa."""
    shift = np.maximum(np.frexp(counts)[1] - 4, 0)
    return (8 * shift + ((counts + (1 << shift >> 1)) >> shift)).astype(np.uint8)


def _stored(in_bytes: np.ndarray) -> np.ndarray:
    """The counts that bytes stand for."""
    shift = np.maximum(in_bytes.astype(int) // 8 - 1, 0)
    return in_bytes - 8 * shift << shift


def _read_side(
    side: bytes, tables: int, channels: list[int]
) -> tuple[list[Table], list[np.ndarray]]:
    """The tables, and by block the number of each channel's."""
    sizes = np.frombuffer(side, "<u4", 2 * tables).reshape(-1, 2).tolist()
    rest = np.frombuffer(side, np.uint8, offset=8 * tables)
    lengths = [*((size + 1) // 2 for size, _ in sizes), *channels]
    if len(rest) != sum(lengths):
        raise ValueError("its tables have another length")
    parts = np.split(rest, np.cumsum(lengths))
    counts = map(_stored, parts[:tables])
    return [Table(*size, of) for size, of in zip(sizes, counts, strict=True)], parts[tables:-1]


def _checksum(blocks: list[Block]) -> int:
    return reduce(lambda crc, block: zlib.crc32(block.codes, crc), blocks, 0)


def decode_lzma(parts: dict[str, Tensor], known: dict[str, Any]) -> dict[str, Tensor]:
    """The stored parts of a `QuantizedWeight` from a file before version 5, which has one stream in
    the place of the packed codes, those of the narrowest format first, one byte each (0, -1, 1, -2,
    2, ... as 0, 1, 2, 3, 4, ...; of 16 bits the low bytes and then the high ones).

    Raises ValueError for a stream that does not decode to them, and where Python lacks lzma.
    """
    try:
        import lzma
    except ImportError as error:
        raise ValueError(f"a file of this age needs Python's lzma, {error}") from error
    # Every code was a literal: no bits of its place or of the code before.
    how = {"preset": 6, "lc": 0, "lp": 0, "pb": 0, "dict_size": 2**20}
    filters = [{"id": lzma.FILTER_LZMA2, **how}]
    expanded, counts = dict(parts), known["counts"]
    formats = sorted(map(get_format, counts), key=lambda f: (f.bits, f.qmax))
    sizes = [counts[f.name] * (1 + (f.bits == 16)) for f in formats]
    try:
        stream = expanded.pop("coded").numpy().tobytes()
        codes = lzma.decompress(stream, format=lzma.FORMAT_RAW, filters=filters)
    except (KeyError, lzma.LZMAError) as error:
        raise ValueError(f"a coded stream is damaged ({error})") from None
    if len(codes) != sum(sizes) or zlib.crc32(codes) != known["crc32"]:
        raise ValueError("a coded stream is damaged (its codes have another checksum)")
    folded = torch.frombuffer(bytearray(codes), dtype=torch.uint8).split(sizes)
    return expanded | {f.name: _unfolded(c, f) for f, c in zip(formats, folded, strict=True)}


def _unfolded(folded: Tensor, f: Format) -> Tensor:
    planes = folded.int().chunk(1 + (f.bits == 16))
    folded = sum(plane << 8 * i for i, plane in enumerate(planes))
    code = torch.where(folded % 2 == 1, -(folded + 1) // 2, folded // 2) + int(f.qmax)
    return pack_bits(code if f.bits == 16 else code.to(torch.uint8), f.bits)
