import warnings

import pytest
import torch
from torch import nn

from lafq import allocate, estimate_sensitivity, quantize
from lafq.fisher.sensitivity import predicted_damage
from lafq.fisher.shrinkage import Moments
from lafq.quantization.formats import MIB, unshrunk_scale
from lafq.quantization.model import dequantize_, nbytes, resident_bytes
from lafq.quantization.plan import Plan, Recipe
from lafq.rng import generator


def gradients(passes, rows=6, columns=10, seed=0):
    """Gradients (passes, rows, columns) whose channels share a curvature, and that curvature, of
    mean diagonal 1.
    """
    g = generator(seed)
    root = torch.randn(columns, columns, generator=g, dtype=torch.float64).tril()
    true = root @ root.T
    size = torch.rand(rows, 1, generator=g, dtype=torch.float64) + 0.5
    drawn = torch.randn(passes, rows, columns, generator=g, dtype=torch.float64) @ root.T
    return size * drawn, true / true.diagonal().mean()


def moments_of(drawn, largest=30, channels=None):
    moments = Moments(drawn[0], largest, channels)
    for gradient in drawn:
        moments.add(gradient)
    return moments


def error(model, plan, fresh):
    with torch.no_grad():
        change = dequantize_(quantize(model, plan))(fresh) - model(fresh)
    return change.square().flatten(1).sum(1).mean().item() / 2


def test_shares_are_those_of_schaefer_and_strimmer():
    """Against the formula written out over the matrices of all passes."""
    drawn, _ = gradients(20)
    found, share = moments_of(drawn).shrunk_curvature()
    unit = drawn / drawn.square().mean(2, keepdim=True).sqrt()
    each = torch.einsum("prc,prd->pcd", unit, unit)
    each /= each.mean(0).diagonal().mean()
    mean, variance, off = each.mean(0), each.var(0) / len(each), ~torch.eye(10, dtype=torch.bool)
    expected = (variance[off].sum() / mean[off].square().sum()).item()
    own = (variance.diagonal().sum() / (mean.diagonal() - 1).square().sum()).item()
    assert 0 < own < expected < 1
    assert share == pytest.approx(expected, rel=1e-9)
    assert found[off].numpy() == pytest.approx(((1 - expected) * mean)[off].numpy(), rel=1e-9)
    assert found.diagonal().numpy() == pytest.approx(
        ((1 - own) * mean.diagonal() + own).numpy(), rel=1e-9
    )


@pytest.mark.parametrize("largest", [30, 5])
def test_channels_take_turns(largest):
    """With at most two of six channels in each pass, three passes of one gradient give what all
    channels give.
    """
    drawn, _ = gradients(1)
    few, all_ = moments_of(drawn.repeat(3, 1, 1), largest, channels=2), moments_of(drawn, largest)
    assert torch.allclose(few.plain_curvature(), all_.plain_curvature(), rtol=1e-12)
    assert not torch.allclose(
        moments_of(drawn, largest, channels=2).plain_curvature(), all_.plain_curvature(), rtol=0.1
    )


def test_fisher_values_shrink_towards_their_channel_and_tensor():
    """Against the same formula, within each channel and for the channels' means."""
    drawn, _ = gradients(20)
    squares = drawn.square()
    found = moments_of(drawn).shrunk_squares(squares.sum(0)) / len(drawn)
    mean = squares.mean(0)
    channel, tensor = mean.mean(1, keepdim=True), mean.mean()
    within = (squares.var(0) / len(drawn)).sum(1, keepdim=True) / (mean - channel).square().sum(
        1, keepdim=True
    )
    across = (squares.mean(2).var(0) / len(drawn)).sum() / (channel - tensor).square().sum()
    within, across = within.clamp(max=1), across.clamp(max=1)
    level = (1 - across) * channel + across * tensor
    assert found.numpy() == pytest.approx(
        (level * ((1 - within) * mean / channel + within)).numpy(), rel=1e-9
    )


@pytest.mark.parametrize("passes", [2, 4, 8, 16])
def test_shrunk_curvature_is_nearer_to_the_true_one(passes):
    """Mean squared distance over ten draws; no shrunk matrix has a negative eigenvalue."""
    errors = []
    for seed in range(10):
        drawn, true = gradients(passes, rows=2, columns=30, seed=seed)
        found = moments_of(drawn)
        mean = found.curvature / found.curvature.diagonal().mean()
        shrunk = found.shrunk_curvature()[0]
        errors.append([(m - true).square().sum().item() for m in (shrunk, mean)])
        assert torch.linalg.eigvalsh(shrunk).min() > -1e-12
    assert torch.tensor(errors).mean(0).diff() > 0


@pytest.mark.parametrize(
    ("largest", "blocks", "size"), [(10, 1, 10), (9, 2, 5), (3, 5, 2), (1, 10, 1)]
)
def test_blocks_are_those_of_the_whole_curvature(largest, blocks, size):
    """As few equal blocks as fit; they are diagonal blocks of the whole, and shrink by what their
    own entries say.
    """
    drawn, _ = gradients(20)
    whole, found = moments_of(drawn), moments_of(drawn, largest)
    shape = (size, size) if blocks == 1 else (blocks, size, size)
    assert found.curvature.shape == shape
    expected = torch.stack(
        [whole.plain_curvature()[i : i + size, i : i + size] for i in range(0, 10, size)]
    )
    assert torch.allclose(found.plain_curvature().view(expected.shape), expected, rtol=1e-12)
    shrunk, share = found.shrunk_curvature()
    assert shrunk.shape == shape
    assert 0 <= share <= 1
    assert shrunk.diagonal(dim1=-2, dim2=-1).mean().item() == pytest.approx(1)
    assert torch.linalg.eigvalsh(shrunk).min() > -1e-12
    squares = drawn.square().sum(0)
    assert torch.equal(found.shrunk_squares(squares), whole.shrunk_squares(squares))


def test_a_plan_from_blocks_is_better_than_nearest_codes():
    """Of a convolution with more columns than `largest`; the whole curvature is better still."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
    model, fresh = nn.Sequential(*layers).eval(), torch.randn(64, 1, 8, 8, generator=generator(9))
    batches = [(torch.randn(4, 1, 8, 8, generator=generator(i)),) for i in range(64)]
    whole, blocks = (estimate_sensitivity(model, batches, largest=n) for n in (8192, 36))
    assert blocks.curvature["2.weight"].shape == (4, 36, 36)
    assert blocks.curvature["0.weight"].shape == (9, 9)
    int4 = dict.fromkeys(whole.fisher, "int4")
    fed, by_block, nearest = (
        error(model, Plan(int4, Recipe(unshrunk_scale, whole.fisher, curvature)), fresh)
        for curvature in (whole.curvature, blocks.curvature, None)
    )
    assert fed < by_block < nearest
    mib = nbytes(model, int4) / MIB
    assert allocate(model, blocks, memory_mib=mib, progress=False).nbytes <= mib * MIB


def test_damage_from_other_passes_is_what_is_measured():
    """A plan of few passes: its own prediction is far too low, that from other passes within a
    third; the copy stays packed.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8)).eval()

    def known(passes, seed):
        batches = [torch.randn(1, 24, generator=generator(seed, i)) for i in range(passes)]
        return estimate_sensitivity(model, batches, seed, shrink=False)

    few = known(4, 0)
    plan = Plan(dict.fromkeys(few.fisher, "int4"), few.recipe)
    small = quantize(model, plan)
    measured = error(model, plan, torch.randn(2000, 24, generator=generator(5)))
    assert predicted_damage(model, small, known(256, 1)) == pytest.approx(measured, rel=0.35)
    assert predicted_damage(model, small, few) < 0.5 * measured
    assert resident_bytes(small) < resident_bytes(model)
    with pytest.raises(ValueError, match="Fisher values"):
        predicted_damage(model, small, few._replace(fisher={"9.weight": few.fisher["0.weight"]}))


def test_many_passes_are_hardly_shrunk():
    shares = [
        moments_of(gradients(passes)[0]).shrunk_curvature()[1] for passes in (4, 32, 256, 2048)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.01


def test_one_pass_lets_the_weights_of_a_tensor_count_alike():
    drawn, _ = gradients(1)
    found = moments_of(drawn)
    squares = drawn[0].square()
    assert torch.equal(found.shrunk_curvature()[0], torch.eye(10, dtype=torch.float64))
    assert found.shrunk_squares(squares).numpy() == pytest.approx(
        squares.mean().expand(6, 10).numpy()
    )


def test_a_channel_without_gradient_keeps_none_when_the_others_are_known_well():
    drawn, _ = gradients(2000)
    drawn[:, 0] = 0
    found = moments_of(drawn).shrunk_squares(drawn.square().sum(0)) / len(drawn)
    assert found[0].max() < 0.02 * found[1:].mean()
    assert found.min() >= 0


def conv():
    torch.manual_seed(0)
    first, second, third = (nn.Conv2d(*pair, 3, padding=1) for pair in ((3, 16), (16, 16), (16, 3)))
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third), (3, 16, 16)


def linear():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), (64,)


def test_one_pass_is_said_in_one_line():
    model, shape = linear()
    batches = list(torch.randn(2, 1, *shape, generator=generator(4)))
    with pytest.warns(
        UserWarning,
        match="one pass says nothing about its noise, so all weights of a tensor count the same",
    ):
        found = estimate_sensitivity(model, batches[:1])
    assert found.passes == 1 and found.noise == {"0.weight": 1.0, "2.weight": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", r"\d+ of 64 output channels of 0.weight got no gradient")
        assert estimate_sensitivity(model, batches).passes == 2
        assert estimate_sensitivity(model, batches[:1], shrink=False).noise is None


@pytest.mark.filterwarnings("ignore:one pass says nothing")
@pytest.mark.parametrize("make", [conv, linear])
@pytest.mark.parametrize("passes", [1, 2, 8])
def test_few_passes_give_a_plan_no_worse_than_uniform(make, passes):
    """Measured on 128 fresh inputs; without shrinkage the same passes give a plan that is worse
    than uniform INT4.
    """
    model, shape = make()
    fresh = torch.randn(128, *shape, generator=generator(9))
    batches = list(torch.randn(passes, 1, *shape, generator=generator(3)))
    uniform = {n: "int4" for n, p in model.named_parameters() if p.ndim > 1}
    mib = nbytes(model, uniform) / MIB
    known = [estimate_sensitivity(model, batches, shrink=shrink) for shrink in (True, False)]
    plans = [allocate(model, each, memory_mib=mib, progress=False) for each in known]
    shrunk, plain = (error(model, plan, fresh) for plan in plans)
    assert shrunk < error(model, uniform, fresh) < plain
    assert 1 / 3 < shrunk / plans[0].damage < 3 < plain / plans[1].damage


def test_draws_of_a_pass_count_as_one_observation():
    """Two draws per pass: the share is that of the spread over passes of the mean over draws."""
    drawn, _ = gradients(40)
    pairs = drawn.unflatten(0, (20, 2))
    found = Moments(drawn[0], 30, None)
    for pair in pairs:
        found.add(*pair)
    curvature, share = found.shrunk_curvature()
    unit = pairs / pairs.square().mean((1, 3), keepdim=True).sqrt()
    each = torch.einsum("pdrc,pdre->pce", unit, unit)
    each /= each.mean(0).diagonal().mean()
    off = ~torch.eye(10, dtype=torch.bool)
    expected = ((each.var(0) / 20)[off].sum() / each.mean(0)[off].square().sum()).item()
    assert share == pytest.approx(expected, rel=1e-9) and 0 < share < 1
    assert curvature[off].numpy() == pytest.approx(
        ((1 - expected) * each.mean(0))[off].numpy(), rel=1e-9
    )
    assert found.passes == 20


def test_draws_tell_more_of_few_batches():
    """Distance to what 2,000 passes tell, over three sets of eight inputs; a model takes no draw
    fewer than one.
    """
    model, shape = conv()

    def known(passes, seed, draws=1):
        batches = torch.randn(passes, 1, *shape, generator=generator(seed))
        return estimate_sensitivity(model, list(batches), seed, draws=draws)

    true = known(2000, 5).curvature
    one, four = ([known(8, seed, draws).curvature for seed in (6, 7, 8)] for draws in (1, 4))
    for name, h in true.items():
        distance = [sum((each[name] - h).square().sum() for each in few) for few in (one, four)]
        assert distance[1] < 0.8 * distance[0]
    with pytest.raises(ValueError, match="draws is 0: a pass needs one draw of noise or more"):
        known(1, 0, draws=0)


def test_effective_passes_see_that_few_inputs_make_up_the_trace():
    model, shape = linear()
    alike = torch.randn(16, 1, *shape, generator=generator(6))
    assert 14 < estimate_sensitivity(model, list(alike)).effective_passes <= 16
    alike[3] *= 100
    found = estimate_sensitivity(model, list(alike))
    assert found.passes == 16 and 1 <= found.effective_passes < 1.5
