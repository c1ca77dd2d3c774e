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

from lafq.quantization.formats import Format, get_format, pack_bits, unpack_bits

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
    folded = [_folded(parts[f.name], f, counts[f.name]) for f in _narrowest_first(counts)]
    codes = torch.cat(folded).cpu().numpy().tobytes()
    stream = lzma.compress(codes, format=lzma.FORMAT_RAW, filters=FILTERS)
    if len(stream) >= sum(parts[name].nbytes for name in counts):
        return parts, {}
    kept = {name: tensor for name, tensor in parts.items() if name not in counts}
    coded = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    return kept | {STREAM: coded}, {"counts": counts, "crc32": zlib.crc32(codes)}


def expand_parts(parts: dict[str, Tensor], known: dict[str, Any]) -> dict[str, Tensor]:
    """What `compress_parts` was given; ValueError for a stream that does not decode to it."""
    expanded, counts = dict(parts), known["counts"]
    formats = _narrowest_first(counts)
    sizes = [counts[f.name] * _bytes_per_code(f) for f in formats]
    try:
        stream = expanded.pop(STREAM).numpy().tobytes()
        codes = lzma.decompress(stream, format=lzma.FORMAT_RAW, filters=FILTERS)
    except (KeyError, lzma.LZMAError) as error:
        raise ValueError(f"a coded stream is damaged ({error})") from None
    if len(codes) != sum(sizes) or zlib.crc32(codes) != known["crc32"]:
        raise ValueError("a coded stream is damaged (its codes have another checksum)")
    folded = torch.frombuffer(bytearray(codes), dtype=torch.uint8).split(sizes)
    return expanded | {f.name: _packed(c, f) for f, c in zip(formats, folded, strict=True)}


def _narrowest_first(names: dict[str, int]) -> list[Format]:
    return sorted(map(get_format, names), key=lambda f: (f.bits, f.qmax))


def _bytes_per_code(f: Format) -> int:
    return 2 if f.bits == 16 else 1


def _folded(packed: Tensor, f: Format, count: int) -> Tensor:
    code = unpack_bits(packed, f.bits, count).int() - int(f.qmax)
    folded = torch.where(code < 0, -2 * code - 1, 2 * code)
    return torch.cat([folded >> 8 * i & 255 for i in range(_bytes_per_code(f))]).to(torch.uint8)


def _packed(folded: Tensor, f: Format) -> Tensor:
    planes = folded.int().chunk(_bytes_per_code(f))
    folded = sum(plane << 8 * i for i, plane in enumerate(planes))
    code = torch.where(folded % 2 == 1, -(folded + 1) // 2, folded // 2) + int(f.qmax)
    return pack_bits(code if f.bits == 16 else code.to(torch.uint8), f.bits)
