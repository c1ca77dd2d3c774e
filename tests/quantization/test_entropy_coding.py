import pytest
import torch
from test_model import plans
from torch import nn

from lafq.quantization.channels import ChannelView, WeightSpec
from lafq.quantization.checkpoint import load_quantized, save_quantized
from lafq.quantization.entropy_coding import STREAM, compress_parts, expand_parts
from lafq.quantization.formats import FORMATS, nearest_code, pack_bits
from lafq.quantization.model import quantize, resident_bytes, weights_sha256
from lafq.quantization.quantized_weight import QuantizedWeight
from lafq.rng import generator
from lafq.study.diffusion.unet import UNet

INTEGERS = [f for f in FORMATS.values() if f.is_integer]


def gaussian_codes(low, count=20000, spread=0.25):
    """Packed codes of normal numbers, a share `spread` of the format's range wide."""
    f = FORMATS[low]
    codes = nearest_code(torch.randn(count, generator=generator(0)) * spread * f.qmax, f.qmax)
    shifted = (codes + f.qmax).to(torch.uint8 if f.bits < 16 else torch.int32)
    return {low: pack_bits(shifted, f.bits)}, codes


@pytest.mark.parametrize("low", [f.name for f in INTEGERS])
def test_codes_come_back_from_a_smaller_stream(low):
    parts, _ = gaussian_codes(low)
    coded, known = compress_parts(parts | {"other": torch.ones(3)}, {low: 20000})
    assert set(coded) == {STREAM, "other"}
    assert coded[STREAM].nbytes < parts[low].nbytes
    back = expand_parts(coded, known)
    assert set(back) == {low, "other"}
    assert torch.equal(back[low], parts[low])


def test_stream_is_near_the_entropy_of_the_codes():
    """Three bits of entropy, of codes that are all alike; there is no table and no other side
    information.
    """
    parts, codes = gaussian_codes("int8", 200_000, spread=2 / 127)
    counts = codes.unique(return_counts=True)[1].double() / len(codes)
    entropy = -(counts * counts.log2()).sum().item() * len(codes) / 8
    coded, _ = compress_parts(parts, {"int8": len(codes)})
    assert 3.0 < 8 * entropy / len(codes) < 3.1
    assert entropy < coded[STREAM].nbytes < 1.06 * entropy


def test_codes_without_order_stay_packed():
    parts = {"int4": torch.randint(0, 256, (5000,), generator=generator(1), dtype=torch.uint8)}
    assert compress_parts(parts, {"int4": 10000}) == (parts, {})


def test_every_damage_to_a_stream_is_refused():
    parts, _ = gaussian_codes("int4")
    coded, known = compress_parts(parts, {"int4": 20000})
    whole = coded[STREAM]
    g = generator(2)
    for i in range(300):
        place = int(torch.randint(len(whole), (), generator=g))
        flipped = whole.clone()
        flipped[place] ^= int(torch.randint(1, 256, (), generator=g))
        damaged = (flipped, whole[:place], torch.cat((whole[:place], whole[place + 1 :])))[i % 3]
        with pytest.raises(ValueError, match="a coded stream is damaged"):
            expand_parts(coded | {STREAM: damaged}, known)
    with pytest.raises(ValueError, match="another checksum"):
        expand_parts(coded, known | {"counts": {"int4": 19999}})
    assert torch.equal(expand_parts(coded, known)["int4"], parts["int4"])


@pytest.mark.parametrize("name", list(plans(UNet(4))))
def test_compressed_files_hold_the_same_model(tiny, tmp_path, name):
    packed, path = quantize(tiny, plans(tiny)[name]), tmp_path / "coded.safetensors"
    save_quantized(path, packed, tiny, compress=True)
    loaded = load_quantized(path, UNet(4))
    assert weights_sha256(loaded) == weights_sha256(packed)
    assert resident_bytes(loaded) == resident_bytes(packed)


def test_a_compressed_file_is_smaller(tmp_path):
    model = nn.Linear(256, 256)
    nn.init.normal_(model.weight, generator=generator(3))
    sizes, path = [], tmp_path / "a.safetensors"
    for compress in (False, True):
        save_quantized(path, quantize(model, {"weight": "int4"}), model, compress=compress)
        sizes.append(path.stat().st_size)
    assert sizes[1] < 0.9 * sizes[0]


@pytest.mark.parametrize("kept", [0.005, 0.5])
def test_codes_are_counted_as_they_are_stored(kept):
    """Kept weights leave their place out (a mask) or hold a 0 there (columns)."""
    view, weight = ChannelView((6, 400)), torch.randn(6, 400, generator=generator(4))
    mask = torch.rand(6, 400, generator=generator(5)) < kept
    formats = ("int4", "int4", "fp16", "int3", "int16", "int5")
    spec = WeightSpec(formats, mask, "fp16", torch.full((6,), 0.1).half())
    stored = QuantizedWeight.of(weight, spec, view)
    free = 400 - mask.sum(1) if kept == 0.5 else torch.full((6,), 400)
    assert ("mask" in dict(stored.named_buffers())) == (kept == 0.5)
    expected = {"int4": free[:2].sum(), "int3": free[3], "int5": free[5], "int16": free[4]}
    assert stored.code_counts() == {name: int(n) for name, n in expected.items()}


def test_given_steps_are_the_scales():
    view, weight = ChannelView((3, 50)), torch.randn(3, 50, generator=generator(6))
    steps = torch.tensor([0.5, 0.01, 0.0003], dtype=torch.float16)
    spec = WeightSpec(("int5", "int16", "int16"), steps=steps)
    stored = QuantizedWeight.of(weight, spec, view)
    off = (stored(torch.empty(0)) - weight).abs()
    assert (off.amax(1) <= 0.5001 * steps.float()).all()
