from itertools import pairwise

import pytest
import torch
from torch import nn

from lafq import allocate, estimate_sensitivity, load_quantized, quantize, save_quantized
from lafq.allocation import coded
from lafq.fisher.sensitivity import Sensitivity, predicted_damage
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import FORMATS, MIB
from lafq.quantization.model import dequantize_, nbytes, resident_bytes
from lafq.rng import generator


@pytest.fixture(scope="module")
def subject():
    """A network whose channels matter differently, its sensitivity, and fresh inputs."""
    torch.manual_seed(0)
    channels = (2, 96, 96, 2)
    first, second, third = (nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(channels))
    with torch.no_grad():
        second.weight.mul_(torch.logspace(-2, 0, 96)[:, None, None, None])
    model = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third).eval()
    batches = torch.randn(64, 2, 2, 12, 12, generator=generator(0))
    fresh = torch.randn(64, 2, 12, 12, generator=generator(1))
    return model, estimate_sensitivity(model, list(batches)), fresh


@pytest.fixture(scope="module")
def plan(subject):
    return planned(*subject[:2], 0.04)


def planned(model, sensitivity, mib):
    return allocate(model, sensitivity, file_mib=mib, progress=False)


def error(model, plan, fresh):
    with torch.no_grad():
        change = dequantize_(quantize(model, plan))(fresh) - model(fresh)
    return change.square().sum((1, 2, 3)).mean().item() / 2


def test_the_file_takes_the_budget_and_a_larger_one_does_less_damage(subject, tmp_path):
    model, sensitivity, fresh = subject
    path, x, last = tmp_path / "small.safetensors", fresh[:2], float("inf")
    for mib in (0.025, 0.04, 0.07):
        plan = planned(model, sensitivity, mib)
        small = quantize(model, plan)
        save_quantized(path, small, model, compress=True)
        assert plan.file_bytes == path.stat().st_size
        assert 0.99 * mib * MIB <= plan.file_bytes <= mib * MIB
        assert plan.nbytes == nbytes(model, plan) == resident_bytes(small)
        with torch.no_grad():
            assert torch.equal(load_quantized(path, model)(x), small(x))
        assert plan.damage < last
        last = plan.damage


def test_predicted_damage_is_that_of_the_stored_weights(subject, plan):
    model, sensitivity, fresh = subject
    total = predicted_damage(model, quantize(model, plan), sensitivity)
    assert plan.damage == pytest.approx(total, rel=1e-6)
    assert plan.report["damage"].sum() == pytest.approx(total, rel=1e-6)
    assert error(model, plan, fresh) == pytest.approx(plan.damage, rel=0.5)


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
    free = planned(model, sensitivity, path.stat().st_size / MIB)
    assert error(model, free, fresh) < 0.8 * error(model, fixed, fresh)


def test_codes_are_as_wide_as_their_channel_needs(subject, plan):
    model, small = subject[0], quantize(subject[0], plan)
    assert all(p.numel() == 0 for name, p in small.named_parameters() if name in plan.entries)
    whole = dequantize_(small)
    for name, entry in plan.entries.items():
        rows = channel_view(model, name).of(whole.get_parameter(name).detach())
        largest = (rows / entry.steps.float()[:, None]).round().abs().amax(1)
        for format, code in zip(entry.format, largest.tolist(), strict=True):
            qmax = FORMATS[format].qmax
            assert code <= qmax
            assert all(f.qmax < code for f in coded.INTEGERS if f.qmax < qmax)


def test_works_without_a_curvature(subject):
    model, sensitivity, fresh = subject
    plan = planned(model, Sensitivity(sensitivity.fisher, {}), 0.04)
    assert plan.file_bytes <= 0.04 * MIB
    assert error(model, plan, fresh) == pytest.approx(plan.damage, rel=0.5)


def test_channels_that_do_not_matter_round_to_nothing(subject):
    model, sensitivity, _ = subject
    fisher = {n: f.clone() for n, f in sensitivity.fisher.items()}
    fisher["2.weight"][:5] = 0
    small = dequantize_(quantize(model, planned(model, Sensitivity(fisher, {}), 0.04)))
    assert not small.get_parameter("2.weight")[:5].any()
    assert small.get_parameter("2.weight")[5:].any()


def test_a_file_that_is_too_small_is_refused(subject):
    message = "a file of 0.0005.* MiB cannot be met: the smallest possible is 0.00"
    with pytest.raises(ValueError, match=message):
        planned(*subject[:2], 0.0005)


@pytest.mark.parametrize(
    ("name", "fisher", "message"),
    [
        ("0.bias", torch.ones(96), "Fisher values of one parameter with two dimensions"),
        ("0.weight", -torch.ones(96, 2, 3, 3), "none below 0 or NaN"),
        ("9.weight", torch.ones(1, 1), "the Fisher values name '9.weight', which the model lacks"),
    ],
    ids=["vector", "negative", "unknown"],
)
def test_bad_fisher_values_are_one_sentence(subject, name, fisher, message):
    with pytest.raises(ValueError, match=message):
        planned(subject[0], Sensitivity({name: fisher}, {}), 0.04)
