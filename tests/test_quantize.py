import copy

import pytest
import torch
from safetensors import safe_open

from lafq import quantize as q
from lafq.thresholds import keep_ratio
from lafq.unet import UNet, quantizable


def random_masks(model, share):
    g = torch.Generator().manual_seed(0)
    return {n: torch.rand(p.shape, generator=g) < share for n, p in quantizable(model).items()}


def plans(model):
    weights = quantizable(model)
    names = list(weights)
    tensors = {n: torch.tensor(i % 2 == 0) for i, n in enumerate(names)}
    return {
        "fp32": {},
        "fp16": dict.fromkeys(names, "fp16"),
        "int8": dict.fromkeys(names, "int8"),
        "tensor fp16": q.make_plan(tensors, "fp16"),
        "weight fp16": q.make_plan(random_masks(model, 0.3), "fp16"),
        "weight int8": q.make_plan(random_masks(model, 0.3), "int8"),
        "ratio int8": q.make_plan(keep_ratio({n: w.square() for n, w in weights.items()}, 0.35), "int8"),
    }


@pytest.mark.parametrize("name", list(plans(UNet(4))))
def test_count_is_what_is_stored_and_written(tiny, tmp_path, name):
    plan = plans(tiny)[name]
    packed = q.pack(tiny, plan)
    counted = q.nbytes(tiny, plan)
    assert counted == sum(t.nbytes for t in packed.values())
    path = tmp_path / "model.safetensors"
    q.save(path, tiny, plan)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == counted
    loaded, copied = q.load(path, UNet(4)), q.unpack(packed, tiny)
    for (_, a), (_, b) in zip(loaded.named_parameters(), copied.named_parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_named_tensors_change_and_the_original_is_untouched(tiny):
    before = copy.deepcopy(tiny.state_dict())
    name = "Layer5.resample.weight"
    copied = q.unpack(q.pack(tiny, {name: "int8"}), tiny)
    for n, p in copied.named_parameters():
        assert torch.equal(p, before[n]) == (n != name)
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())


def test_fp16_rounds_and_int8_errs_by_half_a_step(tiny):
    weights = quantizable(tiny)
    half = dict(q.unpack(q.pack(tiny, dict.fromkeys(weights, "fp16")), tiny).named_parameters())
    whole = dict(q.unpack(q.pack(tiny, dict.fromkeys(weights, "int8")), tiny).named_parameters())
    for name, w in weights.items():
        assert torch.equal(half[name], w.half().float())
        axis = 1 if name in ("Layer4.resample.weight", "Layer5.resample.weight", "Layer6.resample.weight") else 0
        flat, error = w.transpose(0, axis).flatten(1), (whole[name] - w).transpose(0, axis).flatten(1).abs()
        step = flat.abs().amax(1, keepdim=True) / 127
        assert (error <= step * 0.5001).all()
        assert error.max() > 0


def test_kept_weights_are_exact_and_do_not_stretch_the_scale(tiny):
    name = "Layer1.block1.conv1.weight"
    with torch.no_grad():
        tiny.get_parameter(name)[0, 0, 0, 0] = 1000.0
    mask = torch.zeros_like(tiny.get_parameter(name), dtype=torch.bool)
    mask[0, 0, 0, 0] = True
    copied = q.unpack(q.pack(tiny, {name: (mask, "int8")}), tiny).get_parameter(name)
    assert copied[0, 0, 0, 0] == 1000.0
    assert (copied - tiny.get_parameter(name)).abs().max() < 0.01


def test_whole_tensors_need_no_mask():
    keep = {"a": torch.ones(3, dtype=torch.bool), "b": torch.zeros(3, dtype=torch.bool), "c": torch.tensor([True, False])}
    plan = q.make_plan(keep, "fp16")
    assert list(plan) == ["b", "c"]
    assert plan["b"] == "fp16"


def test_all_zero_channel(tiny):
    with torch.no_grad():
        tiny.Layer1.block1.conv1.weight[1] = 0
    packed = q.pack(tiny, {"Layer1.block1.conv1.weight": "int8"})
    assert packed["Layer1.block1.conv1.weight/scale"][1] == 1
    assert torch.isfinite(q.unpack(packed, tiny).Layer1.block1.conv1.weight).all()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"Layer7.weight": "fp16"}, "'Layer7.weight', which the model lacks"),
        ({"Layer1.resample.weight": "int5"}, "unknown format 'int5': choose one of fp32, fp16, int8"),
        ({"Layer1.resample.weight": (torch.ones(3, dtype=torch.bool), "int8")}, r"has shape \(3,\)"),
    ],
)
def test_bad_plan(tiny, plan, message):
    for use in (q.pack, q.nbytes):
        with pytest.raises(ValueError, match=message):
            use(tiny, plan)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tiny, value):
    with torch.no_grad():
        tiny.inp.weight[0] = value
    with pytest.raises(ValueError, match=r"inp.weight holds NaN or infinite"):
        q.pack(tiny, {})


def test_file_of_another_width(tiny, tmp_path):
    q.save(tmp_path / "a.safetensors", tiny, {})
    with pytest.raises(ValueError, match="width=4, not 6"):
        q.load(tmp_path / "a.safetensors", UNet(6))
    with pytest.raises(ValueError, match="another model"):
        q.unpack(q.pack(tiny, {}), UNet(6))


def test_truncated_or_missing_file(tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    q.save(path, tiny, {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged"):
        q.load(path, tiny)
    with pytest.raises(FileNotFoundError, match="is missing"):
        q.load(tmp_path / "b.safetensors", tiny)


def test_file_names_its_formats(tiny, tmp_path):
    q.save(tmp_path / "a.safetensors", tiny, {"Layer1.resample.weight": "int8"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.get_tensor("Layer1.resample.weight/int8").dtype == torch.int8
