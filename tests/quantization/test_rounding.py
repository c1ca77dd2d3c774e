import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from lafq.allocation import allocate as solver
from lafq.fisher.sensitivity import Sensitivity, estimate_sensitivity
from lafq.quantization.channels import WeightSpec
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import absmax_scale
from lafq.quantization.model import dequantize_, nbytes, quantize, resident_bytes
from lafq.quantization.plan import Recipe
from lafq.quantization.rounding import damage, factor, rounded
from lafq.rng import generator
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.unet import UNet, quantizable


def matrix(size, rank, seed=0):
    factor = torch.randn(size, rank, generator=generator(seed), dtype=torch.float64)
    return factor @ factor.T / rank


def in_blocks():
    return torch.stack([matrix(4, 24, seed) for seed in range(3)])


def problem(rows=5, columns=12, rank=24):
    values = torch.randn(rows, columns, generator=generator(1), dtype=torch.float64)
    qmax = torch.full((rows,), 3.0, dtype=torch.float64)
    return values, values.abs().amax(1) / 3, qmax, matrix(columns, rank)


def feedback(values, scales, qmax, factors, kept=None):
    scales = scales if scales.ndim > 1 else scales[:, None]
    return rounded(values, scales, qmax, factors, kept)[0]


def nearest_code(values, scales, qmax):
    return (values / scales[:, None]).round().clamp(-qmax[:, None], qmax[:, None]) * scales[:, None]


@pytest.mark.parametrize("levels", [[3.0] * 5, [1.5, 3, 1.5, 3, 1.5]], ids=["whole", "halves"])
def test_weights_lie_on_the_grid_of_their_row(levels):
    values, scales, _, curvature = problem()
    qmax = torch.tensor(levels, dtype=torch.float64)
    codes = feedback(values, scales, qmax, factor(curvature)) / scales[:, None]
    assert torch.allclose(codes - qmax[:, None], (codes - qmax[:, None]).round(), atol=1e-9)
    assert (codes.abs() <= qmax[:, None] + 1e-9).all()


@pytest.mark.parametrize(
    "diagonal", [torch.rand(12, generator=generator(2)) + 0.1, torch.zeros(12)]
)
def test_uncorrelated_weights_go_to_their_nearest_code(diagonal):
    values, scales, qmax, _ = problem()
    found = feedback(values, scales, qmax, factor(torch.diag(diagonal.double())))
    assert torch.equal(found, nearest_code(values, scales, qmax))


@pytest.mark.parametrize("blocks", [1, 3])
def test_weights_of_a_row_may_have_several_scales(blocks):
    """Each weight on the grid of its own scale; and rows whose scales are equal are rounded as with
    one scale.
    """
    values, scales, qmax, curvature = problem()
    known = factor(curvature if blocks == 1 else in_blocks())
    many = scales[:, None] * torch.tensor([1.0, 1.0, 0.5, 2.0], dtype=torch.float64)
    codes = feedback(values, many, qmax, known) / many.repeat_interleave(3, 1)
    assert torch.allclose(codes, codes.round(), atol=1e-9) and codes.abs().max() <= 3 + 1e-9
    same = feedback(values, scales[:, None].expand_as(many), qmax, known)
    assert torch.equal(same, feedback(values, scales, qmax, known))


@pytest.mark.parametrize("blocks", [1, 3])
def test_damage_comes_with_the_rounding(blocks):
    """Against the product with the curvature, some weights kept, and a row that is not rounded at
    all.
    """
    values, scales, qmax, curvature = problem(columns=12, rank=24)
    curvature = curvature if blocks == 1 else in_blocks()
    qmax[1] = 0
    kept = torch.rand(values.shape, generator=generator(4)) < 0.2
    rows, quadratic = rounded(values, scales[:, None], qmax, factor(curvature), kept)
    expected = damage(rows - values, torch.full_like(values, 2.0), curvature)
    assert expected[1] == 0 and expected[0] > 0
    assert torch.allclose(quadratic, expected, rtol=1e-9, atol=1e-12)


def test_first_error_is_made_good_as_well_as_it_can_be():
    """With one weight rounded and the others free, the change of the others is the least squares
    one.
    """
    values, _, _, curvature = problem(rows=1, rank=60)
    k = curvature.diagonal().argmax().item()
    kept = torch.ones(1, 12, dtype=torch.bool)
    kept[0, k] = False
    one = torch.ones(1).double()
    change = (feedback(values, one, 3 * one, factor(curvature), kept) - values)[0]
    damped = curvature + 0.01 * curvature.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    others = [i for i in range(12) if i != k]
    best = torch.linalg.solve(damped[others][:, others], -damped[others, k] * change[k])
    assert change[k] != 0
    assert torch.allclose(change[others], best)


def test_blocks_stand_for_a_block_diagonal_curvature():
    """Each block rounds its columns by itself; the damage is that of the whole matrix."""
    values, scales, qmax, curvature = problem(columns=12)
    blocks = torch.stack([curvature[:4, :4], curvature[4:8, 4:8], curvature[8:, 8:]])
    kept = torch.rand(values.shape, generator=generator(3)) < 0.2
    found = feedback(values, scales, qmax, factor(blocks), kept)
    alone = [
        feedback(values[:, i : i + 4], scales, qmax, factor(h), kept[:, i : i + 4])
        for i, h in zip((0, 4, 8), blocks, strict=True)
    ]
    assert torch.equal(found, torch.cat(alone, 1))
    fisher = torch.rand(values.shape, generator=generator(4), dtype=torch.float64)
    whole = damage(found - values, fisher, torch.block_diag(*blocks))
    assert torch.allclose(damage(found - values, fisher, blocks), whole)


@pytest.mark.parametrize(("rank", "share"), [(4, 0.3), (24, 0.9)])
def test_correlated_weights_are_rounded_with_less_damage_than_nearest(rank, share):
    values, scales, qmax, curvature = problem(rows=40, rank=rank)
    rounded = (
        feedback(values, scales, qmax, factor(curvature)),
        nearest_code(values, scales, qmax),
    )
    ours, theirs = (damage(q - values, torch.ones_like(values), curvature).sum() for q in rounded)
    assert ours < share * theirs


def test_rows_without_levels_and_kept_weights_are_left_unrounded():
    values, scales, qmax, curvature = problem()
    qmax[1] = 0
    kept = torch.zeros(5, 12, dtype=torch.bool)
    kept[0, 3] = True
    found = feedback(values, scales, qmax, factor(curvature), kept)
    assert torch.equal(found[1], values[1])
    codes = found[0] / scales[0]
    off = (codes - codes.round()).abs() > 1e-6
    assert off.nonzero().flatten().tolist() == [3]


def test_rows_do_not_see_each_other():
    values, scales, qmax, curvature = problem()
    known, each = factor(curvature), [slice(i, i + 1) for i in range(5)]
    alone = torch.cat([feedback(values[i], scales[i], qmax[i], known) for i in each])
    assert torch.allclose(feedback(values, scales, qmax, known), alone, atol=1e-12)


def test_damage_of_a_diagonal_curvature_is_that_of_the_fisher_values():
    change = torch.randn(3, 4, generator=generator(3))
    share = torch.rand(4, generator=generator(4)) + 0.1
    share = share / share.mean()
    fisher = torch.tensor([[1.0], [2.0], [0.5]]) * share
    assert torch.allclose(damage(change, fisher, torch.diag(share)), damage(change, fisher))


def test_curvature_of_a_kronecker_product_is_its_factor():
    """y = A W x: the Gauss-Newton matrix of W is A^T A (x) E[x x^T], so H is E[x x^T] up to a
    factor, in float64.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 5, bias=False)).double()
    inputs = torch.randn(8, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    batches = [(x[None],) for x in inputs] * 4
    found = estimate_sensitivity(network, batches, 0, ["0.weight"], shrink=False).curvature
    direction = inputs / inputs.norm(dim=1, keepdim=True)  # every pass counts alike
    expected = direction.T @ direction
    assert torch.allclose(found["0.weight"], expected / expected.diagonal().mean(), atol=1e-6)


def test_fisher_is_that_of_true_fisher(tiny, digits):
    names = list(quantizable(tiny))
    fisher, curvature, passes, *_ = estimate_sensitivity(
        tiny, noised_batches(digits, 16, 0), 0, names, shrink=False
    )
    assert passes == 2
    batches = noised_batches(digits, 16, 0)
    alone = estimate_sensitivity(tiny, batches, 0, names, curvature=False).fisher
    for n in names:
        assert torch.equal(fisher[n], alone[n])
        assert curvature[n].shape == (channel_view(tiny, n).size[1],) * 2
        assert curvature[n].diagonal().mean().item() == pytest.approx(1, rel=1e-5)
        assert torch.linalg.eigvalsh(curvature[n].double()).min() > -1e-4


def test_predicted_damage_is_the_rise_of_a_linear_networks_error():
    """One sample, one layer: 1/2 |J dw|^2 exactly, with F from the Jacobian and H the input's outer
    product.
    """
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, bias=False).double()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    change = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    moved = functional_call(layer, {"weight": layer.weight.detach() + change}, (x,))
    exact = 0.5 * (moved - layer(x)).square().sum().item()
    jacobian = jacrev(lambda w: functional_call(layer, {"weight": w}, (x,)))(
        layer.weight.detach()
    ).flatten(0, 3)
    rows = channel_view(layer, "weight")
    curvature = estimate_sensitivity(layer, [(x,)], 0, ["weight"], shrink=False).curvature
    found = damage(rows.of(change), rows.of(jacobian.square().sum(0)), curvature["weight"])
    assert found.sum().item() == pytest.approx(exact, rel=1e-9)


@pytest.fixture(scope="module")
def trained_like(digits):
    torch.manual_seed(0)
    model = UNet(4).eval()
    found = estimate_sensitivity(model, noised_batches(digits, 128, 0), 0, list(quantizable(model)))
    return model, found.fisher, found.curvature


def test_pack_with_feedback_takes_the_same_bytes_and_less_damage(trained_like, digits):
    model, fisher, curvature = trained_like
    plan = dict.fromkeys(fisher, "int3")
    near, fed = (quantize(model, plan, Recipe(absmax_scale, fisher, h)) for h in (None, curvature))
    assert resident_bytes(fed) == resident_bytes(near) == nbytes(model, plan)
    ((x, t),) = noised_batches(digits, 64, 1, batch=64)
    with torch.inference_mode():
        y = model(x, t)
        off = [(dequantize_(small)(x, t) - y).square().mean().item() for small in (near, fed)]
    assert off[1] < 0.7 * off[0]


@pytest.mark.parametrize("granularity", solver.ALLOCATED)
def test_allocation_predicts_what_pack_stores(trained_like, granularity):
    """The damage in the report is that of the weights as they are read back."""
    model, fisher, curvature = trained_like
    options = {"memory_mib": 0.3 * nbytes(model, {}) / 2**20, "granularity": granularity}
    found, plain = (
        solver.allocate(model, Sensitivity(fisher, h), progress=False, **options)
        for h in (curvature, {})
    )
    stored = quantizable(dequantize_(quantize(model, found)))
    total = 0.0
    for n, w in quantizable(model).items():
        rows = channel_view(model, n)
        total += damage(rows.of(stored[n] - w), rows.of(fisher[n]), curvature[n]).sum().item()
    assert found.damage == pytest.approx(total, rel=0.02)
    assert found.damage < plain.damage


@pytest.mark.parametrize(
    "bad", [torch.ones(3, 3), torch.full((36, 36), float("nan"))], ids=["shape", "nan"]
)
def test_curvature_that_does_not_fit_is_one_sentence(tiny, bad):
    name = "Layer1.block1.conv1.weight"
    with pytest.raises(
        ValueError, match=rf"curvature of {name} must be finite and of shape \(36, 36"
    ):
        quantize(tiny, {name: "int4"}, Recipe(curvature={name: bad}))


def test_every_layer_kind_keeps_its_shape_and_other_weights(digits):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Flatten(), nn.LazyLinear(3)
    )
    inputs = digits[:4, :, :6, :6].float() / 255
    network(inputs)
    names = ["0.weight", "1.weight", "3.weight"]
    found = estimate_sensitivity(network, itertools.repeat((inputs,), 8), 0, names)
    fed = dequantize_(quantize(network, dict.fromkeys(names, "int4"), found.recipe))
    stored = dict(fed.named_parameters())
    for n, p in network.named_parameters():
        assert stored[n].shape == p.shape
        assert torch.equal(p, stored[n]) == (n not in names)
        assert torch.isfinite(stored[n]).all()


def test_kept_fp16_weights_that_take_up_errors_stay_finite():
    """14,000 is rounded to 0; the kept weight, rounded last, takes up half of that error and would
    exceed FP16's range.
    """
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([[65500.0, 30000, 14000]])
    plan = {"weight": WeightSpec("int2", torch.tensor([[True, False, False]]), "fp16")}
    curvature = torch.full((3, 3), 0.5) + torch.diag(torch.tensor([0.4, 0.5, 0.5]))
    stored = dequantize_(quantize(layer, plan, Recipe(curvature={"weight": curvature}))).weight
    assert stored.tolist() == [[65504.0, 30000.0, 0.0]]
