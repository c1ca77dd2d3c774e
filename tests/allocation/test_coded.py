import pytest
import torch
from torch import nn

from lafq import allocate, estimate_sensitivity, load_quantized, quantize, save_quantized
from lafq.allocation import coded
from lafq.fisher.sensitivity import Sensitivity
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import FORMATS, MIB
from lafq.quantization.model import dequantize_, nbytes, resident_bytes
from lafq.quantization.rounding import damage
from lafq.rng import generator


@pytest.fixture(scope="module")
def subject():
    """A network whose channels matter differently, its sensitivity, and fresh inputs."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 96, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(96, 96, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(96, 2, 3, padding=1),
    ]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[2].weight.mul_(torch.logspace(-2, 0, 96)[:, None, None, None])
    batches = torch.randn(64, 2, 2, 12, 12, generator=generator(0))
    return (
        model,
        estimate_sensitivity(model, list(batches)),
        torch.randn(64, 2, 12, 12, generator=generator(1)),
    )


def error(model, plan, fresh):
    with torch.no_grad():
        return (dequantize_(quantize(model, plan))(fresh) - model(fresh)).square().flatten(1).sum(
            1
        ).mean().item() / 2


@pytest.mark.parametrize("mib", [0.025, 0.04, 0.07])
def test_the_file_takes_the_budget(subject, tmp_path, mib):
    model, sensitivity, fresh = subject
    plan = allocate(model, sensitivity, file_mib=mib, progress=False)
    small, path = quantize(model, plan), tmp_path / "small.safetensors"
    save_quantized(path, small, model, compress=True)
    assert plan.file_bytes == path.stat().st_size
    assert 0.99 * mib * MIB <= plan.file_bytes <= mib * MIB
    assert plan.nbytes == nbytes(model, plan) == resident_bytes(small)
    x = fresh[:2]
    with torch.no_grad():
        assert torch.equal(load_quantized(path, model)(x), small(x))


def test_predicted_damage_is_that_of_the_stored_weights(subject):
    model, sensitivity, fresh = subject
    plan = allocate(model, sensitivity, file_mib=0.04, progress=False)
    small = dequantize_(quantize(model, plan))
    total = 0.0
    for name, fisher in sensitivity.fisher.items():
        view = channel_view(model, name)
        change = view.of(small.get_parameter(name).detach() - model.get_parameter(name).detach())
        total += damage(change, view.of(fisher), sensitivity.curvature[name]).sum().item()
    assert plan.damage == pytest.approx(total, rel=1e-6)
    assert plan.report["damage"].sum() == pytest.approx(total, rel=1e-6)
    assert error(model, plan, fresh) == pytest.approx(plan.damage, rel=0.5)


def test_a_larger_file_does_less_damage(subject):
    model, sensitivity, _ = subject
    damages = [
        allocate(model, sensitivity, file_mib=mib, progress=False).damage
        for mib in (0.02, 0.03, 0.05, 0.08)
    ]
    assert damages == sorted(damages, reverse=True)


def test_less_damage_than_fixed_formats_in_a_file_of_equal_bytes(subject, tmp_path):
    """Both files are entropy-coded; at three bits per weight channels of fixed formats cannot take
    less than two.
    """
    model, sensitivity, fresh = subject
    path = tmp_path / "fixed.safetensors"
    fixed = allocate(
        model,
        sensitivity,
        memory_mib=nbytes(model, dict.fromkeys(sensitivity.fisher, "int3")) / MIB,
        progress=False,
    )
    save_quantized(path, quantize(model, fixed), model, compress=True)
    free = allocate(model, sensitivity, file_mib=path.stat().st_size / MIB, progress=False)
    assert error(model, free, fresh) < 0.8 * error(model, fixed, fresh)


def test_codes_are_as_wide_as_their_channel_needs(subject):
    model, sensitivity, _ = subject
    plan = allocate(model, sensitivity, file_mib=0.06, progress=False)
    for name, stored in quantize(model, plan).named_parameters():
        assert name not in plan or stored.numel() == 0
    for name, entry in plan.items():
        rows = channel_view(model, name).of(
            dequantize_(quantize(model, plan)).get_parameter(name).detach()
        )
        largest = (rows / entry.steps.float()[:, None]).round().abs().amax(1)
        for low, code in zip(entry.format, largest.tolist(), strict=True):
            narrower = max(
                (f.qmax for f in coded.INTEGERS if f.qmax < FORMATS[low].qmax), default=-1
            )
            assert narrower < code <= FORMATS[low].qmax


def test_works_without_a_curvature(subject):
    model, sensitivity, fresh = subject
    plan = allocate(model, Sensitivity(sensitivity.fisher, {}), file_mib=0.04, progress=False)
    assert plan.file_bytes <= 0.04 * MIB
    assert error(model, plan, fresh) == pytest.approx(plan.damage, rel=0.5)


def test_channels_that_do_not_matter_round_to_nothing(subject):
    model, sensitivity, _ = subject
    fisher = {n: f.clone() for n, f in sensitivity.fisher.items()}
    fisher["2.weight"][:5] = 0
    small = dequantize_(
        quantize(model, allocate(model, Sensitivity(fisher, {}), file_mib=0.04, progress=False))
    )
    assert not small.get_parameter("2.weight")[:5].any()
    assert small.get_parameter("2.weight")[5:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"file_mib": 0.0005},
            "a file of 0.0005.* MiB cannot be met: the smallest possible is 0.00",
        ),
        (
            {"sensitivity": Sensitivity({"0.bias": torch.ones(96)}, {})},
            "Fisher values of one parameter with two dimensions",
        ),
        (
            {"sensitivity": Sensitivity({"0.weight": -torch.ones(96, 2, 3, 3)}, {})},
            "none below 0 or NaN",
        ),
        (
            {"sensitivity": Sensitivity({"9.weight": torch.ones(1, 1)}, {})},
            "the Fisher values name '9.weight', which the model lacks",
        ),
    ],
    ids=["budget", "vector", "negative", "unknown"],
)
def test_bad_input_is_one_sentence(subject, change, message):
    model, sensitivity, _ = subject
    with pytest.raises(ValueError, match=message):
        allocate(
            **{
                "model": model,
                "sensitivity": sensitivity,
                "file_mib": 0.04,
                "progress": False,
                **change,
            }
        )
