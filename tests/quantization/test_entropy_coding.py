import math

import numpy as np
import pytest
import torch
from test_model import plans
from torch import nn

from lafq.quantization.channels import ChannelView, WeightSpec
from lafq.quantization.checkpoint import coded_bytes, load_quantized, save_quantized
from lafq.quantization.entropy_coding import SPARE, Block, Coding, decode
from lafq.quantization.formats import FORMATS, get_format
from lafq.quantization.model import quantize, resident_bytes, weights_sha256
from lafq.quantization.quantized_weight import QuantizedWeight
from lafq.rng import generator
from lafq.study import workspace
from lafq.study.diffusion.unet import UNet

INTEGERS = [f for f in FORMATS.values() if f.is_integer]
GOLDEN = workspace.ROOT / "tests" / "data" / "coded_format_5.safetensors"


def gaussian(name, channels=20, n=1000, spread=0.25, seed=0):
    """Codes of normal numbers, of channels whose deviations are up to the share `spread` of the
    format's range.
    """
    f = get_format(name)
    deviations = torch.linspace(0.1, 1, channels)[:, None] * spread * f.qmax
    wanted = torch.randn(channels, n, generator=generator(seed)) * deviations + f.qmax
    codes = wanted.round().clamp(0, f.levels - 1)
    return Block(codes.numpy().astype(np.uint8 if f.bits < 16 else np.int32), f)


def sizes(blocks):
    return [(block.format, *block.codes.shape) for block in blocks]


def assert_equal(blocks, others):
    for block, other in zip(blocks, others, strict=True):
        assert block.format == other.format and block.codes.dtype == other.codes.dtype
        assert np.array_equal(block.codes, other.codes)


@pytest.mark.parametrize("name", [f.name for f in INTEGERS])
def test_codes_come_back_from_a_smaller_stream(name):
    blocks = [gaussian(name), gaussian(name, 1, 7, seed=1)]
    stream, known = Coding(blocks).stream()
    assert len(stream) < sum(b.codes.size for b in blocks) * get_format(name).bits / 8
    assert_equal(decode(stream, known, sizes(blocks)), blocks)


@pytest.mark.parametrize(
    "codes",
    [
        np.zeros((0, 5), np.uint8),
        np.full((3, 50), 7, np.uint8),
        np.eye(7, 2000, dtype=np.uint8) * 14,
        np.repeat([[0, 14]], 30, 1).astype(np.uint8),
    ],
    ids=["none", "all zero", "rare", "only the largest"],
)
def test_codes_of_every_kind_come_back(codes):
    blocks = [Block(codes, get_format("int4"))]
    for given in ([], blocks, [*blocks, gaussian("int16"), gaussian("midrise2"), *blocks]):
        stream, known = Coding(given).stream()
        assert_equal(decode(stream, known, sizes(given)), given)


def entropy(codes):
    counts = np.unique_counts(codes).counts
    return -(counts @ np.log2(counts / codes.size)) / 8


def test_stream_has_the_ideal_length():
    """Of the channels' entropies, their tables and numbers included; one table for all channels
    would take more.
    """
    blocks = [gaussian("int8", 40, 20_000, spread) for spread in (0.01, 0.02, 0.04)]
    coding = Coding(blocks)
    stream, _ = coding.stream()
    assert coding.nbytes - SPARE[1] - 1 - SPARE[0] * len(stream) <= len(stream) <= coding.nbytes
    by_channel = sum(entropy(row) for block in blocks for row in block.codes)
    assert by_channel < len(stream) < 1.005 * by_channel
    assert len(stream) < 0.95 * sum(entropy(block.codes) for block in blocks)
    assert 8 * len(coding.side) + sum(coding.bits) == pytest.approx(8 * len(stream), rel=1e-4)


def test_large_codes_are_cut_without_loss_of_bytes():
    """A table of each code of 16 bits would take more bytes than the codes do."""
    block = gaussian("int16", 1, 50_000, 0.1)
    deviation = 0.01 * block.format.qmax
    ideal = 50_000 * math.log2(deviation * math.sqrt(2 * math.pi * math.e)) / 8
    assert len(Coding([block]).stream()[0]) == pytest.approx(ideal, rel=0.003)


def test_few_codes_share_tables():
    """Channels of many deviations: a table for each would take more than it saves."""
    few, many = (Coding([gaussian("int4", 30, n)]) for n in (100, 100_000))
    assert len(few.tables) < 5 < len(many.tables)


def test_every_damage_to_a_stream_is_refused():
    """Of 1,000; what the file's own checksum would catch is left to the stream's here."""
    blocks = [gaussian("int4"), gaussian("int16", 2, 100)]
    stream, known = Coding(blocks).stream()
    g = generator(2)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=g))

    for i in range(1000):
        place = draw(0, len(stream))
        flipped = bytes([stream[place] ^ draw(1, 256)])
        damaged = (
            stream[:place] + flipped + stream[place + 1 :],
            stream[:place],
            stream[:place] + stream[place + 1 :],
            stream + flipped,
        )[i % 4]
        with pytest.raises(ValueError, match="the coded stream is damaged"):
            decode(damaged, known, sizes(blocks))
    for other in ((blocks[0].format, 20, 999), (blocks[0].format, 19, 1000)):
        with pytest.raises(ValueError, match="the coded stream is damaged"):
            decode(stream, known, [other, *sizes(blocks)[1:]])
    assert_equal(decode(stream, known, sizes(blocks)), blocks)


def golden_network():
    """A network with all its weights given by a formula, which every machine computes alike."""
    network = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.Linear(24, 16))
    start = 0
    for p in network.parameters():
        whole = (torch.arange(start, start + p.numel()) * 7919 % 2003 - 1001).double()
        p.data = (whole**3 / 2**34).reshape(p.shape).float()
        start += p.numel()
    return network


def golden_plan():
    """Steps of many sizes, codes of 2 to 16 bits, halves, and single weights kept."""
    steps = torch.logspace(-14, -2, 24, base=2).half()
    wide = WeightSpec(("int16",) * 24, steps=steps)
    mask = torch.arange(24 * 24 * 9).view(24, 24, 3, 3) % 11 == 0
    halves = WeightSpec(("midrise2", "int4") * 8)
    return {"0.weight": wide, "2.weight": WeightSpec("int4", mask, "fp16"), "3.weight": halves}


def test_a_kept_file_decodes_on_every_machine():
    """tests/data/coded_format_5.safetensors holds what is quantized here again."""
    network = golden_network()
    loaded = load_quantized(GOLDEN, network)
    assert weights_sha256(loaded) == weights_sha256(quantize(network, golden_plan()))


@pytest.mark.parametrize("name", list(plans(UNet(4))))
def test_compressed_files_hold_the_same_model(tiny, tmp_path, name):
    packed, path = quantize(tiny, plans(tiny)[name]), tmp_path / "coded.safetensors"
    save_quantized(path, packed, tiny, compress=True)
    loaded = load_quantized(path, UNet(4))
    assert weights_sha256(loaded) == weights_sha256(packed)
    assert resident_bytes(loaded) == resident_bytes(packed)
    predicted, _ = coded_bytes(packed)
    assert 0 <= predicted - path.stat().st_size <= SPARE[0] * predicted + SPARE[1] + 16


def test_a_compressed_file_is_smaller(tmp_path):
    model = nn.Linear(256, 256)
    nn.init.normal_(model.weight, generator=generator(3))
    sizes, path = [], tmp_path / "a.safetensors"
    for compress in (False, True):
        save_quantized(path, quantize(model, {"weight": "int4"}), model, compress=compress)
        sizes.append(path.stat().st_size)
    assert sizes[1] < 0.9 * sizes[0]


def test_a_damaged_stream_in_a_whole_file_is_refused(tmp_path, monkeypatch):
    """Its seal is right: what wrote it was wrong, or the library that reads it codes otherwise."""
    model, path = nn.Linear(64, 64), tmp_path / "a.safetensors"
    monkeypatch.setattr(Coding, "known", lambda coding, _: {"tables": 1, "side": 9, "crc32": 0})
    save_quantized(path, quantize(model, {"weight": "int4"}), model, compress=True)
    with pytest.raises(ValueError, match=r"a.safetensors is damaged .*: save it again"):
        load_quantized(path, model)


@pytest.mark.parametrize("kept", [0.005, 0.5])
def test_codes_are_counted_as_they_are_stored(kept):
    """Kept weights leave their place out (a mask) or hold a 0 there (columns)."""
    view, weight = ChannelView((6, 400)), torch.randn(6, 400, generator=generator(4))
    mask = torch.rand(6, 400, generator=generator(5)) < kept
    formats = ("int4", "int4", "fp16", "int3", "int16", "int5")
    spec = WeightSpec(formats, mask, "fp16", torch.full((6,), 0.1).half())
    stored = QuantizedWeight.of(weight, spec, view)
    assert ("mask" in dict(stored.named_buffers())) == (kept == 0.5)
    shapes = {name: tuple(codes.shape) for name, codes in stored.codes().items()}
    rows = {"int4": slice(0, 2), "int3": slice(3, 4), "int5": slice(5, 6), "int16": slice(4, 5)}
    if kept == 0.5:
        assert shapes == {name: (1, int((~mask[of]).sum())) for name, of in rows.items()}
    else:
        assert shapes == {name: (of.stop - of.start, 400) for name, of in rows.items()}


def test_given_steps_are_the_scales():
    view, weight = ChannelView((3, 50)), torch.randn(3, 50, generator=generator(6))
    steps = torch.tensor([0.5, 0.01, 0.0003], dtype=torch.float16)
    spec = WeightSpec(("int5", "int16", "int16"), steps=steps)
    stored = QuantizedWeight.of(weight, spec, view)
    off = (stored(torch.empty(0)) - weight).abs()
    assert (off.amax(1) <= 0.5001 * steps.float()).all()
