"""The public face: what `import lafq` gives a researcher with a model of their own."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import lafq
from lafq import allocate, estimate_sensitivity, load_quantized, quantize
from lafq.quantization.model import dequantize_, nbytes, resident_bytes, weights_sha256
from lafq.study import workspace

HEAVY = ("torchvision", "pandas", "scipy", "matplotlib", "seaborn", "torch_fidelity")


def small_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 10)
    ).eval()


@pytest.fixture
def network():
    return small_network()


@pytest.fixture
def sensitivity(network):
    g = torch.Generator().manual_seed(1)
    return estimate_sensitivity(
        network, [(torch.randn(8, 1, 8, 8, generator=g),) for _ in range(8)], seed=0
    )


def test_import_is_light():
    code = (
        "import lafq, sys; from lafq import quantize, estimate_sensitivity; "
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_six_names_and_no_others():
    assert lafq.__all__ == [
        *(
            "estimate_sensitivity",
            "allocate",
            "quantize",
            "dequantize",
            "save_quantized",
            "load_quantized",
        )
    ]
    assert all(getattr(lafq, name).__doc__ for name in lafq.__all__)
    with pytest.raises(AttributeError, match="no attribute 'pack'"):
        _ = lafq.pack


def test_a_plan_carries_its_rounding(network, sensitivity):
    plan = allocate(network, sensitivity, memory_mib=0.004, progress=False)
    small = quantize(network, plan)
    assert resident_bytes(small) == nbytes(network, plan) == plan.nbytes <= 0.004 * 2**20
    assert plan.recipe.curvature is sensitivity.curvature
    plain = quantize(network, dict(plan.entries))
    assert weights_sha256(dequantize_(small)) != weights_sha256(dequantize_(plain))


def test_a_plan_of_another_model_is_refused(network, sensitivity):
    plan = allocate(network, sensitivity, memory_mib=0.004, progress=False)
    with pytest.raises(ValueError, match="made for other weights: allocate a plan"):
        quantize(small_network(1), plan)


def test_files_of_the_first_version_load():
    """tests/data/packed_by_0.1.safetensors: every kind of stored weight, written before the
    packages were there.
    """
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2), nn.Conv2d(4, 6, 3), nn.Flatten()),
        *(nn.Linear(6, 5), nn.Linear(5, 40), nn.Linear(40, 40)),
    )
    loaded = load_quantized(
        workspace.ROOT / "tests" / "data" / "packed_by_0.1.safetensors", network
    )
    assert (
        weights_sha256(dequantize_(loaded))
        == "d0247b4e93ea8042f943a051925485518e5e3fd0d4e6a5f3ee1714b435186404"
    )
