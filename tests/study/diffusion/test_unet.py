import pytest
import torch

from lafq.study.diffusion.unet import LAYERS, UNet, layer_of, layer_sizes, quantizable, time_table

PAPER = {
    "Layer1": 222_080,
    "Layer2": 952_576,
    "Layer3": 3_542_528,
    "Layer4": 11_540_736,
    "Layer5": 11_540_736,
    "Layer6": 7_084_224,
}


@pytest.fixture(scope="module")
def paper_model():
    return UNet(64)


def test_width_64_is_the_papers_model(paper_model):
    sizes = layer_sizes(paper_model).set_index("layer")
    assert sizes["parameters"][list(LAYERS)].to_dict() == PAPER
    assert sizes["parameters"]["total"] == 35_178_689
    assert round(sizes["mib"]["total"], 2) == 134.20


def test_all_stage_weights_in_fp16_are_the_posters_67_70(paper_model):
    weights = {n: p for n, p in paper_model.named_parameters() if n.endswith("weight")}
    halved = sum(p.numel() for n, p in weights.items() if layer_of(n))
    assert round((35_178_689 * 4 - halved * 2) / 2**20, 2) == 67.70


def test_weight_tensors(paper_model):
    assert sum(p.ndim > 1 for p in paper_model.parameters()) == 37
    assert len(quantizable(paper_model)) == 34
    assert all(layer_of(n) in LAYERS for n in quantizable(paper_model))


@pytest.mark.parametrize("width", [4, 6, 8, 16])
def test_any_even_width(width):
    model = UNet(width).eval()
    out = model(torch.rand(2, 1, 32, 32), torch.tensor([0, 999]))
    assert out.shape == (2, 1, 32, 32) and torch.isfinite(out).all()


@pytest.mark.parametrize("width", [0, 2, 5, -4])
def test_impossible_width(width):
    with pytest.raises(ValueError, match=f"width {width} cannot be built"):
        UNet(width)


def test_time_matters_and_table_is_interleaved(tiny):
    x = torch.rand(1, 1, 32, 32)
    assert not torch.equal(tiny(x, torch.tensor([0])), tiny(x, torch.tensor([500])))
    table = time_table(8)
    assert torch.equal(table[0], torch.tensor([0.0, 1.0] * 4))
    assert table[3, 0] == torch.tensor(3.0).sin()


def test_time_table_is_not_stored():
    assert not any("times" in name for name in UNet(4).state_dict())
