import copy

import pytest
import torch
import torchvision
from diffusers import UNet2DModel
from torch import nn

from lafq.allocation.rules import by_granularity, keep_above, ratio_score
from lafq.quantization import formats
from lafq.quantization.channels import ChannelView, WeightSpec
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import FORMATS
from lafq.quantization.model import dequantize_, nbytes, quantize, resident_bytes
from lafq.quantization.plan import Recipe, make_plan
from lafq.study.diffusion.unet import UNet, layer_of, quantizable

TRANSPOSED = ("Layer4.resample.weight", "Layer5.resample.weight", "Layer6.resample.weight")


def random_masks(model, share):
    g = torch.Generator().manual_seed(0)
    return {n: torch.rand(p.shape, generator=g) < share for n, p in quantizable(model).items()}


def channels(model, name):
    return model.get_parameter(name).shape[1 if name in TRANSPOSED else 0]


def plans(model):
    weights = quantizable(model)
    names = list(weights)
    cycle = ["int2", "int3", "int4", "int6", "int8", "fp16", "fp32"]
    mixed = {n: tuple((cycle * channels(model, n))[: channels(model, n)]) for n in names}
    scores = by_granularity(
        {n: w.square() for n, w in weights.items()}, "channel", dict.fromkeys(TRANSPOSED, 1)
    )
    groups = {
        n: next(d for d in range(2, w.numel()) if channel_view(model, n).size[1] % d == 0)
        for n, w in weights.items()
    }
    masks = {share: random_masks(model, share) for share in (0.02, 0.2, 0.3)}
    kept = keep_above(ratio_score(scores, layer_of, layer_of), 1 - 0.35)
    return {
        "nothing": {},
        **{f: dict.fromkeys(names, f) for f in FORMATS if f != "int16"},
        "tensors": {n: cycle[i % len(cycle)] for i, n in enumerate(names)},
        "channels": {n: WeightSpec(f) for n, f in mixed.items()},
        "channels by ratio": make_plan(kept, "int4", "fp16"),
        "weights fp16": make_plan(masks[0.3], "fp16"),
        "weights int8": make_plan(masks[0.3], "int8"),
        "few weights": {n: WeightSpec("int3", m, "fp16") for n, m in masks[0.02].items()},
        "all of it": {n: WeightSpec(mixed[n], m, "fp16") for n, m in masks[0.2].items()},
        "groups": {n: WeightSpec(mixed[n], group=size) for n, size in groups.items()},
        "groups and weights": {
            n: WeightSpec("int4", m, "fp16", group=groups[n]) for n, m in masks[0.02].items()
        },
        "bias and norm": {n: "fp16" for n, p in model.named_parameters() if p.ndim == 1},
    }


@pytest.mark.parametrize("name", list(plans(UNet(4))))
def test_bytes_are_counted_and_unpacking_changes_no_image(tiny, name):
    plan = plans(tiny)[name]
    packed = quantize(tiny, plan)
    assert nbytes(tiny, plan) == resident_bytes(packed)
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = packed(x, torch.tensor([3, 700]))
        unpacked = dequantize_(packed)
        assert torch.equal(before, unpacked(x, torch.tensor([3, 700])))
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (unpacked, tiny)]
    assert shapes[0] == shapes[1]
    assert resident_bytes(unpacked) == resident_bytes(tiny)


def test_only_the_named_tensors_change_and_the_original_is_untouched(tiny):
    before = copy.deepcopy(tiny.state_dict())
    name = "Layer5.resample.weight"
    copied = dequantize_(quantize(tiny, {name: "int8"}))
    for n, p in copied.named_parameters():
        assert torch.equal(p, before[n]) == (n != name)
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())


def test_the_packed_form_is_the_only_copy(tiny):
    packed = quantize(tiny, dict.fromkeys(quantizable(tiny), "int4"))
    stored = [t for n, t in packed.state_dict(keep_vars=True).items() if n != "times"]
    largest = max(t.numel() for t in stored if t.dtype == torch.float32)
    others = [p for n, p in tiny.named_parameters() if n not in quantizable(tiny)]
    assert largest == max(p.numel() for p in others)
    assert packed.Layer3.block1.conv1.weight.shape == tiny.Layer3.block1.conv1.weight.shape


@pytest.mark.parametrize("low", ["int8", "int6", "int4", "int3", "int2"])
def test_values_are_those_of_the_definition(tiny, low):
    weights, qmax = quantizable(tiny), FORMATS[low].qmax
    copied = dict(dequantize_(quantize(tiny, dict.fromkeys(weights, low))).named_parameters())
    for name, w in weights.items():
        axis = int(name in TRANSPOSED)
        rows = w.transpose(0, axis).flatten(1)
        scale = (rows.abs().amax(1, keepdim=True) / qmax).half().float()
        expected = (rows / scale).round().clamp(-qmax, qmax) * scale
        assert torch.equal(copied[name].transpose(0, axis).flatten(1), expected)


def test_fp16_rounds_and_channels_go_their_own_way(tiny):
    w = tiny.Layer4.resample.weight.detach()
    low = tuple("fp16" if i % 2 else "int8" for i in range(w.shape[1]))
    copied, whole = (
        quantize(tiny, {"Layer4.resample.weight": entry}).Layer4.resample.weight
        for entry in (WeightSpec(low), "int8")
    )
    assert torch.equal(copied[:, 1::2], w[:, 1::2].half().float())
    assert torch.equal(copied[:, ::2], whole[:, ::2])


def test_a_group_is_rounded_like_a_channel_of_its_own():
    """36 weights per channel in groups of 12, which are rows of a wider layer; groups that do not
    divide it are refused.
    """
    torch.manual_seed(0)
    layer, wide = torch.nn.Conv2d(4, 6, 3), torch.nn.Linear(12, 18)
    wide.weight.data = layer.weight.data.movedim(1, -1).reshape(18, 12)
    plan, recipe = {"weight": WeightSpec("int4", group=12)}, Recipe(formats.unshrunk_scale)
    found = quantize(layer, plan, recipe).weight
    expected = quantize(wide, {"weight": "int4"}, recipe).weight
    assert torch.equal(found.movedim(1, -1).reshape(18, 12), expected)
    assert nbytes(layer, plan) == nbytes(layer, {"weight": "int4"}) + 2 * (18 - 6)


@pytest.mark.parametrize("share", [1, 40])
@pytest.mark.parametrize(("high", "error"), [("fp32", 0), ("fp16", 5e-4)])
def test_kept_weights_are_exact_and_do_not_stretch_the_scale(tiny, high, error, share):
    name, w = "Layer3.block1.conv1.weight", tiny.Layer3.block1.conv1.weight.detach()
    order = torch.randperm(w.numel(), generator=torch.Generator().manual_seed(0))
    mask = (order < w.numel() * share // 100).view(w.shape)
    w[mask] += 1000.0
    packed = quantize(tiny, {name: WeightSpec("int8", mask, high)})
    parts = dict(packed.Layer3.block1.conv1.parametrizations.weight[0].named_buffers())
    assert ("columns" in parts, "mask" in parts) == (share == 1, share == 40)
    copied = packed.Layer3.block1.conv1.weight
    assert ((copied - w)[mask].abs() <= error * 1001).all()
    assert (copied - w)[~mask].abs().max() < 0.01


def test_the_smaller_of_mask_and_indices_is_taken(tiny):
    name, sizes = "Layer4.block1.conv1.weight", {}
    w = tiny.get_parameter(name)
    for share in (0.01, 0.05, 0.06, 0.1, 0.3):
        mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) < share
        kept, rest = int(mask.sum()), int((~mask).sum())
        with_mask = -(-w.numel() // 8) + -(-rest // 2)
        with_indices = 4 * w.shape[0] + 2 * kept + -(-w.numel() // 2)
        plain = nbytes(tiny, {}) - w.nbytes + 2 * w.shape[0] + 4 * kept
        stored = nbytes(tiny, {name: WeightSpec("int4", mask)})
        assert stored == plain + min(with_mask, with_indices)
        sizes[share] = with_indices < with_mask
    assert set(sizes.values()) == {True, False}


def test_fisher_weighted_scales_err_less_where_it_counts(tiny):
    weights = quantizable(tiny)
    g = torch.Generator().manual_seed(3)
    fisher = {n: torch.rand(w.shape, generator=g) ** 6 for n, w in weights.items()}
    plan = dict.fromkeys(weights, "int3")

    def damage(*choice):
        copied = dict(dequantize_(quantize(tiny, plan, Recipe(*choice))).named_parameters())
        return sum((fisher[n] * (copied[n] - w).square()).sum() for n, w in weights.items())

    squares = damage(formats.weighted_mse_scale)
    assert damage(formats.weighted_mse_scale, fisher) < squares
    assert squares < 0.9 * damage()


def test_whole_tensors_need_no_mask():
    keep = {
        "a": torch.ones(3, dtype=torch.bool),
        "b": torch.zeros(3, dtype=torch.bool),
        "c": torch.tensor([[True, False]]),
    }
    plan = make_plan(keep, "fp16").entries
    assert list(plan) == ["b", "c"]
    assert plan["b"] == "fp16"
    assert make_plan(keep, "int4", "fp16").entries["a"] == "fp16"
    assert make_plan({"d": torch.tensor([True, False])}, "int4").entries == {
        "d": WeightSpec(("fp32", "int4"))
    }


def test_all_zero_channel(tiny):
    with torch.no_grad():
        tiny.Layer1.block1.conv1.weight[1] = 0
    packed = quantize(tiny, {"Layer1.block1.conv1.weight": "int8"})
    assert packed.Layer1.block1.conv1.parametrizations.weight[0].int8_scale[1] == 1
    assert (packed.Layer1.block1.conv1.weight[1] == 0).all()
    assert torch.isfinite(packed.Layer1.block1.conv1.weight).all()


def weights_of(model, *kinds):
    return [
        f"{n}.weight"
        for n, m in model.named_modules()
        if isinstance(m, kinds or (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    ]


def diffusers_unet():
    channels = (8, 16)
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    sizes = {"layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    unet = UNet2DModel(16, 1, 1, block_out_channels=channels, **sizes, **blocks)
    return unet, (torch.randn(2, 1, 16, 16), torch.tensor([1, 9])), lambda y: y.sample


def decoder():
    layers = [
        nn.Linear(6, 32),
        nn.Unflatten(1, (8, 2, 2)),
        nn.ConvTranspose2d(8, 12, 4, 2, 1, groups=2),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.ConvTranspose2d(12, 3, 3)), (torch.randn(2, 6),), lambda y: y


def transformer():
    vit = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
    )
    nn.init.normal_(vit.heads.head.weight)  # zero in a new one: no weight would matter
    return vit, (torch.randn(1, 3, 16, 16),), lambda y: y


def resnet():
    return torchvision.models.resnet18(weights=None), (torch.randn(1, 3, 64, 64),), lambda y: y


@pytest.mark.parametrize("network", [diffusers_unet, resnet, transformer, decoder])
def test_any_network(network):
    torch.manual_seed(0)
    model, x, read = network()
    before = copy.deepcopy(model.state_dict())
    names = weights_of(model)
    assert len(names) >= 3
    plan = dict.fromkeys(names, "int8")
    packed = quantize(model, plan)
    assert resident_bytes(packed) == nbytes(model, plan) < 0.4 * resident_bytes(model)
    models = model.eval(), packed, quantize(model, dict.fromkeys(names, "int2"))
    with torch.no_grad():
        full, small, coarse = (read(m(*x)) for m in models)
        assert torch.equal(read(dequantize_(packed)(*x)), small)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert 0 < (small - full).norm() < 0.05 * full.norm()
    assert (coarse - full).norm() > 5 * (small - full).norm()
    for name, p in packed.named_parameters():
        assert torch.equal(p, before[name]) == (name not in names)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((3, 4, 2, 5), 0), ((6, 4, 3, 3), 1), ((6, 4, 3, 3), 2), ((7, 5), 0), ((9,), 0), ((), 0)],
)
def test_rows_come_back(shape, groups):
    w, rows = torch.randn(shape), ChannelView(shape, groups)
    assert rows.of(w).shape == rows.size
    assert torch.equal(rows.back(rows.of(w)), w)


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("Layer7.weight", "fp16", "'Layer7.weight', which the model lacks"),
        ("weight", "int9", "unknown format 'int9': choose one of fp32, fp16, int8"),
        ("weight", 8, "weight is planned as 8: give a format's name or a WeightSpec"),
        ("weight", None, "weight is planned as None"),
        ("weight", ("int8", 3), "weight is planned as"),
        ("weight", WeightSpec(("int4", "int1")), "has 2 formats: give one for each of 8 rows"),
        ("weight", WeightSpec(("int1",) * 8), "unknown format 'int1'"),
        ("weight", WeightSpec("int8", torch.ones(3) > 0), "the mask of .* must be boolean"),
        ("weight", WeightSpec("int8", torch.ones(8, 4, 3, 3)), "the mask of .* must be boolean"),
        ("weight", WeightSpec("int4", torch.ones(8, 4, 3, 3) > 0, "int8"), "keep weights in int8"),
        ("weight", WeightSpec("int4", group=8), "a group of 8 must divide 36"),
        ("weight", WeightSpec("int4", steps=torch.ones(2).half()), "must be 8 FP16 numbers above"),
        ("weight", WeightSpec("int4", steps=torch.ones(8)), "must be 8 FP16 numbers above 0"),
        ("weight", WeightSpec("int4", steps=torch.zeros(8).half()), "must be 8 FP16 numbers above"),
        ("weight", "int16", "as int16: give WeightSpec's `steps`"),
        ("bias", "int8", "integers need two dimensions"),
    ],
)
def test_bad_plan(tiny, name, entry, message):
    name = name if "." in name else f"Layer1.resample.{name}"
    for use in (quantize, nbytes):
        with pytest.raises(ValueError, match=message):
            use(tiny, {name: entry})


def test_parameters_that_cannot_be_planned():
    model = nn.Sequential(nn.Linear(0, 3), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).half())
    model[2].weight = model[1].weight
    for name, message in (
        ("0", "is empty, of shape"),
        ("1", "is shared with 2.weight"),
        ("3", r"call model.float\(\) first"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(model, {f"{name}.weight": "int8"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tiny, value):
    with torch.no_grad():
        tiny.inp.weight[0] = value
    with pytest.raises(ValueError, match=r"inp.weight holds NaN or infinite"):
        quantize(tiny, {})


def test_weights_beyond_fp16(tiny):
    with torch.no_grad():
        tiny.inp.weight[0] = 70000
    for low in ("fp16", "int8"):
        with pytest.raises(ValueError, match="holds weights up to 70000, and FP16 numbers"):
            quantize(tiny, {"inp.weight": low})
