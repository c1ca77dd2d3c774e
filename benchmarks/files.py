"""The codes of entropy-coded files, coded: python benchmarks/files.py

Plans for files at width 16, and the codes of results/paper/packed.safetensors. bits_per_weight:
what a file was planned for. bytes: of the stream, tables included, without header, scales and
biases. ideal_bytes: of the tables, and of the codes by the tables' frequencies. lzma_bytes: of the
same codes in files before format version 5. Seconds are of processor time on one thread; encoding
has the choice of tables in it. Rows that are there already are left alone.
"""

import lzma
import sys
import time

import numpy as np
import torch
from shared import PROFILES, SEED, Table, run
from torch import nn

from lafq import load_quantized, quantize
from lafq.fisher.sensitivity import Sensitivity
from lafq.quantization.entropy_coding import FILTERS, Block, Coding, decode
from lafq.quantization.formats import get_format
from lafq.quantization.quantized_weight import QuantizedWeight
from lafq.study import workspace
from lafq.study.budget_rows import coded_at_bits, kept_sensitivity, mib_at
from lafq.study.diffusion.subject import PACKED, UNet, load_model
from lafq.study.long_runs import SHIPPED_MIB
from lafq.study.workspace import Workspace, profile_parameters

BITS = (2.0, 2.5, 3.0, 4.0)


def codes_of(packed: nn.Module) -> list[list[Block]]:
    """By tensor, narrowest format first."""
    weights = [module for module in packed.modules() if isinstance(module, QuantizedWeight)]
    found = [[Block(c.numpy(), get_format(f)) for f, c in w.codes().items()] for w in weights]
    return [sorted(blocks, key=lambda block: block.format.bits) for blocks in found]


def lzma_bytes(blocks: list[Block]) -> int:
    """Of a tensor's stream before format version 5 (`entropy_coding.decode_lzma`)."""
    content = b""
    for block in blocks:
        code = block.signed
        folded = np.where(code < 0, -2 * code - 1, 2 * code)
        content += (folded & 255).astype(np.uint8).tobytes()
        content += (folded >> 8).astype(np.uint8).tobytes() if block.format.bits == 16 else b""
    return len(lzma.compress(content, format=lzma.FORMAT_RAW, filters=FILTERS))


def coded(tensors: list[list[Block]]) -> dict[str, float]:
    """The row of a file's codes; RuntimeError where they do not come back."""
    blocks, start = [block for blocks in tensors for block in blocks], time.process_time()
    coding = Coding(blocks)
    stream, known = coding.stream()
    encoded = time.process_time()
    back = decode(stream, known, [(block.format, *block.codes.shape) for block in blocks])
    decoded = time.process_time()
    if not all(np.array_equal(a.codes, b.codes) for a, b in zip(blocks, back, strict=True)):
        raise RuntimeError("other codes were read than were written")
    return {
        "bytes": len(stream),
        "ideal_bytes": round(sum(coding.bits) / 8 + len(coding.side)),
        "lzma_bytes": sum(map(lzma_bytes, tensors)),
        "encode_seconds": round(encoded - start, 2),
        "decode_seconds": round(decoded - encoded, 2),
    }


def planned(model: nn.Module, known: Sensitivity, bits: float) -> dict[str, float]:
    """The row of a plan for so many bits per weight."""
    [row] = coded_at_bits(model, known, [bits])
    return coded(codes_of(quantize(model, row.plan)))


def main() -> None:
    """results/benchmarks/files.csv."""
    torch.set_num_threads(1)
    table, work = Table("files", ("model", "bits_per_weight")), Workspace(PROFILES[16])
    model, p = load_model(work, 16), profile_parameters(work.profile)
    known = kept_sensitivity(work, model, p["TRUE_FISHER_SAMPLES"], SEED)
    for bits in BITS:
        table.add(("width 16", bits), planned, model, known, bits)
    with torch.device("meta"):
        model = UNet(64)
    none, one = mib_at(model, 0), mib_at(model, 1)
    bits = round((SHIPPED_MIB - none) / (one - none), 2)
    packed = load_quantized(workspace.RESULTS / PROFILES[64] / PACKED, model)
    table.add(("width 64", bits), coded, codes_of(packed))


if __name__ == "__main__":
    sys.exit(run(main))
