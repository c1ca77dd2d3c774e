"""Entropy coding of integer codes, for files: small codes are frequent, so they take fewer bits
than packed ones.

The codes of a tensor become one stream: those of its narrowest format first, channel after channel,
one byte each (0, -1, 1, -2, 2, ... as 0, 1, 2, 3, 4, ...; of 16 bits the low bytes and then the
high ones), coded by LZMA (Python's standard library). Its range coder adapts to the codes, so no
table of frequencies is stored, and it computes in integers, so every machine decodes alike.
Nothing is lost: a file that is read holds the packed codes again.
"""

import lzma
import zlib
from typing import Any

import torch
from torch import Tensor

from lafq.quantization.formats import FORMATS, Format, pack_bits, unpack_bits

STREAM = "coded"
# Every code is a literal to the coder: no bits of its place or of the code before, since neither
# tells of it.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0, "dict_size": 2**20}]


def compress_parts(
    parts: dict[str, Tensor], counts: dict[str, int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The stored parts of a `QuantizedWeight` with one coded stream in the place of its packed
    codes, and what reading it needs.

    counts: how many codes each integer format holds. Where coding saves nothing the parts stay, and
    there is nothing to know.
    """
    formats = _narrowest_first(counts)
    codes = b"".join(_to_bytes(parts[f.name], f, counts[f.name]) for f in formats)
    stream = lzma.compress(codes, format=lzma.FORMAT_RAW, filters=FILTERS)
    if len(stream) >= sum(parts[f.name].nbytes for f in formats):
        return parts, {}
    kept = {name: tensor for name, tensor in parts.items() if name not in counts}
    coded = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    return kept | {STREAM: coded}, {"counts": counts, "crc32": zlib.crc32(codes)}


def expand_parts(parts: dict[str, Tensor], known: dict[str, Any]) -> dict[str, Tensor]:
    """What `compress_parts` was given; ValueError for a stream that does not decode to the codes it
    was made of.
    """
    counts = known["counts"]
    try:
        codes = lzma.decompress(
            parts[STREAM].numpy().tobytes(), format=lzma.FORMAT_RAW, filters=FILTERS
        )
    except (KeyError, lzma.LZMAError) as error:
        raise ValueError(f"a coded stream is damaged ({error})") from None
    if (
        len(codes) != sum(counts[f.name] * _bytes_per_code(f) for f in _narrowest_first(counts))
        or zlib.crc32(codes) != known["crc32"]
    ):
        raise ValueError("a coded stream is damaged (its codes have another checksum)")
    expanded, start = {name: tensor for name, tensor in parts.items() if name != STREAM}, 0
    for f in _narrowest_first(counts):
        stop = start + counts[f.name] * _bytes_per_code(f)
        expanded[f.name] = _to_packed(codes[start:stop], f)
        start = stop
    return expanded


def _narrowest_first(counts: dict[str, int]) -> list[Format]:
    return sorted((FORMATS[name] for name in counts), key=lambda f: (f.bits, f.qmax))


def _bytes_per_code(f: Format) -> int:
    return 2 if f.bits == 16 else 1


def _to_bytes(packed: Tensor, f: Format, count: int) -> bytes:
    code = unpack_bits(packed, f.bits, count).int() - int(f.qmax)
    folded = torch.where(code < 0, -2 * code - 1, 2 * code)
    planes = (folded & 255, folded >> 8) if f.bits == 16 else (folded,)
    return torch.cat(planes).to(torch.uint8).cpu().numpy().tobytes()


def _to_packed(codes: bytes, f: Format) -> Tensor:
    folded = torch.frombuffer(bytearray(codes), dtype=torch.uint8).int()
    if f.bits == 16:
        low, high = folded.chunk(2)
        folded = low + (high << 8)
    code = torch.where(folded % 2 == 1, -(folded + 1) // 2, folded // 2) + int(f.qmax)
    return pack_bits(code if f.bits == 16 else code.to(torch.uint8), f.bits)
