import json

import pytest
import torch
from safetensors import safe_open
from test_model import plans
from torch import nn

from lafq import tensors as io
from lafq.quantization import checkpoint
from lafq.quantization.channels import WeightSpec
from lafq.quantization.checkpoint import load_quantized, save_quantized
from lafq.quantization.model import nbytes, quantize, resident_bytes, weights_sha256
from lafq.quantization.plan import make_plan
from lafq.study.diffusion.unet import UNet, quantizable


def saved(path, model, plan):
    packed = quantize(model, plan)
    save_quantized(path, packed, model)
    return packed


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", list(plans(UNet(4))))
def test_file_holds_the_counted_bytes_and_comes_back(tiny, path, name):
    packed = saved(path, tiny, plans(tiny)[name])
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == nbytes(tiny, plans(tiny)[name])
    with torch.device("meta"):
        skeleton = UNet(4)
    loaded = load_quantized(path, skeleton)
    assert weights_sha256(loaded) == weights_sha256(packed)
    x, t = torch.randn(1, 1, 32, 32), torch.tensor([9])
    with torch.no_grad():
        assert torch.equal(loaded(x, t), packed(x, t))


@pytest.mark.parametrize(
    ("low", "width"), [("fp32", 32), ("fp16", 32), ("int8", 64), ("int3", 32), ("weights", 32)]
)
def test_count_file_and_resident_bytes_agree(path, low, width):
    model = UNet(width)
    masks = {n: w.abs() > w.abs().mean() for n, w in quantizable(model).items()}
    plan = make_plan(masks, "int8") if low == "weights" else dict.fromkeys(masks, low)
    packed = saved(path, model, plan)
    counted = nbytes(model, plan)
    assert resident_bytes(packed) == counted
    assert counted <= path.stat().st_size <= 1.01 * counted
    if low == "int8":
        assert counted <= 0.26 * resident_bytes(model)


def test_metadata(tiny, path):
    mask = torch.rand(8, 4, 3, 3) < 0.5
    saved(path, tiny, {"Layer1.resample.weight": WeightSpec("int4", mask, "fp16")})
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["lafq"])
        assert file.get_tensor("Layer1.resample.weight/int4").dtype == torch.uint8
    words = {
        "shape": [8, 4, 3, 3],
        "groups": 0,
        "formats": ["int4"],
        "kept": int(mask.sum()),
        "high": "fp16",
    }
    assert about == {
        "format_version": 5,
        "source": weights_sha256(tiny),
        "plan": {"Layer1.resample.weight": words},
    }


@pytest.mark.parametrize("compress", [False, True])
def test_groups_come_back_and_older_versions_do_not_misread_them(path, monkeypatch, compress):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    packed = quantize(model, {"0.weight": WeightSpec("int4", group=16), "2.weight": "int4"})
    save_quantized(path, packed, source=model, compress=compress)
    x = torch.randn(2, 64)
    assert torch.equal(load_quantized(path, model)(x), packed(x))
    assert packed.get_submodule("0.parametrizations.weight.0").describe()["group"] == 16
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    with pytest.raises(ValueError, match="format version 5, this lafq reads up to 2: update lafq"):
        load_quantized(path, model)


def test_any_network_comes_back(path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    model(torch.randn(5, 1, 4, 4))
    packed = saved(path, model, {"0.weight": "int4", "3.weight": "int6"})
    fresh = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(load_quantized(path, fresh)(x), packed(x))


def test_fuzz_every_damage_is_named(tiny, path):
    saved(path, tiny, plans(tiny)["all of it"])
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    skeleton = UNet(4)
    g = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=g))

    for i in range(1000):
        place = draw(0, header if i % 2 else len(whole))
        extra = bytes(draw(0, 256) for _ in range(draw(1, 9)))
        damaged = {
            0: lambda p=place: whole[:p] + bytes([whole[p] ^ draw(1, 256)]) + whole[p + 1 :],
            1: lambda p=place: whole[:p] + whole[p + draw(1, 9) :],
            2: lambda p=place, e=extra: whole[:p] + e + whole[p:],
            3: lambda p=place, e=extra: whole + e,
        }[i % 8 // 2]()
        if damaged == whole:
            continue
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.safetensors is damaged or not a lafq file"):
            load_quantized(path, skeleton)
    path.write_bytes(whole)
    load_quantized(path, skeleton)


def test_empty_and_missing_files(tiny, path):
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_quantized(path, tiny)
    for content in (b"", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            load_quantized(path, tiny)


def test_files_of_something_else(tiny, path):
    plan = {"Layer1.resample.weight": "int8"}
    saved(path, tiny, plan)
    with pytest.raises(ValueError, match=r"is of another model: \S+ is \(4, .* there, \(6, "):
        load_quantized(path, UNet(6))
    with pytest.raises(ValueError, match=r"was made of weights \w{12}, not of 000000"):
        load_quantized(path, tiny, source="0" * 64)
    load_quantized(path, tiny, source=weights_sha256(tiny))
    with pytest.raises(
        ValueError, match=r"is of another model: weight is absent there, \(2, 2\) in the model"
    ):
        load_quantized(path, nn.Linear(2, 2))
    io.save_tensors(path, {"a": torch.ones(1)}, sealed=True)
    with pytest.raises(ValueError, match="is no packed model"):
        load_quantized(path, tiny)


def test_a_failed_write_leaves_the_old_file(tiny, path, monkeypatch):
    saved(path, tiny, {})
    before = path.read_bytes()

    def full_disk(*args):
        raise OSError("no space left")

    monkeypatch.setattr(io, "save_file", full_disk)
    with pytest.raises(OSError, match="the files already there are unchanged"):
        saved(path, tiny, dict.fromkeys(quantizable(tiny), "int8"))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
