import copy
import itertools

import numpy as np
import pytest
import torch
import torchvision
from scipy import optimize, sparse
from torch import nn

import lafq
from lafq.allocation import allocate as solver
from lafq.allocation.frontiers import ALLOCATED, StorageOption
from lafq.fisher.sensitivity import Sensitivity
from lafq.quantization.channels import WeightSpec, stored_bytes, weight_spec
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB
from lafq.quantization.model import dequantize_, nbytes, quantize
from lafq.quantization.plan import Plan
from lafq.study.budget_rows import mib_at
from lafq.study.diffusion.unet import UNet, quantizable


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UNet(8).eval()


@pytest.fixture(scope="module")
def known(fisher):
    return Sensitivity(fisher, {})


def allocated(model, known, mib, **options):
    return lafq.allocate(model, known, memory_mib=mib, progress=False, **options)


def damage(model, plan, known):
    after = dequantize_(quantize(model, plan, known.recipe))
    return sum(
        (0.5 * f * (after.get_parameter(n) - model.get_parameter(n)).double().square()).sum().item()
        for n, f in known.fisher.items()
    )


@pytest.mark.parametrize("granularity", ALLOCATED)
def test_frontier_says_what_packing_does(model, known, granularity):
    names = ("Layer1.block1.conv1.weight", "Layer4.resample.weight", "Layer2.attention.qkv.weight")
    some = Sensitivity({name: known.fisher[name] for name in names}, {})
    fronts = solver.frontiers_of(model, some, granularity, progress=False)
    for name, choices in fronts.items():
        for a, b in itertools.pairwise(choices):
            assert a.nbytes < b.nbytes and a.damage > b.damage
        for choice in choices[:: max(1, len(choices) // 8)]:
            assert choice.nbytes == stored_bytes(channel_view(model, name), choice.entry)
            measured = damage(model, {name: choice.entry}, some)
            assert measured == pytest.approx(choice.damage, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("granularity", ALLOCATED)
def test_budget_is_kept_and_more_bytes_do_less_damage(model, known, granularity):
    fronts = solver.frontiers_of(model, known, granularity, progress=False)
    smallest = nbytes(model, {n: c[0].entry for n, c in fronts.items()}) / MIB
    last = float("inf")
    for share in (0, 0.05, 0.2, 0.5, 1):
        mib = smallest + share * (nbytes(model, {}) / MIB - smallest)
        plan = solver.solve_budget(model, fronts, mib, known.recipe)
        assert plan.nbytes == nbytes(model, plan) <= mib * MIB + 0.5
        assert plan.damage < last
        assert plan.damage == pytest.approx(damage(model, plan, known), rel=1e-3, abs=1e-9)
        assert plan.report["damage"].sum() == pytest.approx(plan.damage)
        last = plan.damage
    assert not plan.entries
    assert last == 0


def test_finer_units_do_less_damage(model, known):
    damages = [
        allocated(model, known, mib_at(model, 4), granularity=granularity).damage
        for granularity in ALLOCATED
    ]
    assert damages[0] > damages[1] >= damages[2] * (1 - 1e-3)


def random_fronts(seed, parameters, choices):
    g = np.random.default_rng(seed)
    fronts = []
    for _ in range(parameters):
        sizes = np.unique(g.integers(100, 5000, choices)).tolist()
        damages = np.sort(np.exp(g.normal(0, 3, len(sizes))))[::-1].tolist()
        options = zip(sizes, damages, ["int4"] * len(sizes), strict=True)
        fronts.append([StorageOption(*option) for option in options])
    return fronts


def total(fronts, taken):
    chosen = [front[i] for front, i in zip(fronts, taken, strict=True)]
    return sum(c.damage for c in chosen), sum(c.nbytes for c in chosen)


def solve_milp(fronts, budget):
    """The optimum, by an integer program with a 0/1 variable for every choice (HiGHS through
    scipy).
    """
    owner = np.repeat(np.arange(len(fronts)), [len(front) for front in fronts])
    sizes, damages, _ = map(np.array, zip(*itertools.chain(*fronts), strict=True))
    one_each = sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    # Scaled by what the fast way reaches, so that the solver's absolute tolerances are relative.
    result = optimize.milp(
        np.minimum(damages / total(fronts, solved(fronts, budget))[0], 10),
        integrality=1,
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(sizes[None] / budget, ub=1),
            optimize.LinearConstraint(one_each, 1, 1),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    assert result.success
    return [int(np.round(result.x[owner == i]).argmax()) for i in range(len(fronts))]


def solved(fronts, budget):
    return solver.filled(fronts, budget, *solver.one_price(fronts, budget))


def between(fronts, share):
    least, most = (sum(front[end].nbytes for front in fronts) for end in (0, -1))
    return least + share * (most - least)


def bound(fronts, budget):
    """No plan within the budget does less damage (Lagrange, at any price)."""
    price = solver.one_price(fronts, budget)[1]
    return sum(min(c.damage + price * c.nbytes for c in front) for front in fronts) - price * budget


@pytest.mark.parametrize("seed", range(4))
def test_plans_are_near_the_optimum(seed):
    small, budget = random_fronts(seed, 5, 4), 5 * 2500
    every = [total(small, taken) for taken in itertools.product(*(range(len(c)) for c in small))]
    best = min(d for d, n in every if n <= budget)
    assert total(small, solve_milp(small, budget))[0] == pytest.approx(best)
    for parameters, choices in ((5, 4), (34, 7)):
        fronts = random_fronts(seed, parameters, choices)
        for share in (0.2, 0.5, 0.8):
            budget = between(fronts, share)
            fast, exact = (total(fronts, f(fronts, budget)) for f in (solved, solve_milp))
            assert fast[1] <= budget
            assert exact[1] <= budget * (1 + 1e-6)
            assert exact[0] * (1 - 1e-5) <= fast[0] <= 1.02 * exact[0]


@pytest.mark.parametrize("seed", range(3))
def test_a_large_parameter_of_few_choices_leaves_no_bytes_unused(seed):
    """One price stops far below the budget, and many small choices make up the best plan."""
    g, fronts = np.random.default_rng(seed), []
    for size, weight in np.exp(g.normal((8, 0), (1.5, 1), (50, 2))):
        bits = np.sort(g.uniform(2, 16, 60))
        sizes = (size * bits + np.arange(60)).astype(int)
        choices = zip(sizes, size * weight * 4.0**-bits, strict=True)
        fronts.append([StorageOption(*choice, "int4") for choice in choices])
    most, damage = sum(f[-1].nbytes for f in fronts), sum(f[0].damage for f in fronts)
    large = (0, 0.02), (0.35, 0.01), (0.7, 2e-4)
    fronts.append([StorageOption(n * most, d * damage, "int4") for n, d in large])
    budget = between(fronts, 0.5)
    fast, exact = (total(fronts, f(fronts, budget)) for f in (solved, solve_milp))
    assert 0.999 * budget < fast[1] <= budget
    assert exact[0] * (1 - 1e-5) <= fast[0] <= 1.02 * exact[0]


@pytest.mark.parametrize("distinct", [1, 6000])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_plans_of_many_parameters_are_near_the_bound(distinct, share):
    fronts = random_fronts(1, distinct, 8) * (6000 // distinct)
    budget = between(fronts, share)
    damage, size = total(fronts, solved(fronts, budget))
    assert size <= budget
    assert bound(fronts, budget) <= damage <= 1.01 * bound(fronts, budget)


def test_bytes_go_where_the_output_weighs_more():
    """1,000 Linear(8, 8), ten different ones, whose outputs are weighted 1 to 10: the plan is
    within 1.01 of the bound, at 1.5 times the bytes of INT4.
    """
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(10))
    ones = Sensitivity({name: torch.ones(8, 8) for name, _ in layers.named_parameters()}, {})
    ten = list(solver.frontiers_of(layers, ones, progress=False).values())
    network = nn.ModuleList(copy.deepcopy(layers[i % 10]) for i in range(1000))
    fronts = {
        f"{i}.weight": [choice._replace(damage=weight**2 * choice.damage) for choice in ten[i % 10]]
        for i, weight in enumerate(torch.linspace(1, 10, 1000).tolist())
    }
    mib = 1.5 * nbytes(network, dict.fromkeys(fronts, "int4")) / MIB
    plan = solver.solve_budget(network, fronts, mib, ones.recipe)
    assert plan.nbytes <= mib * MIB + 0.5
    assert plan.damage <= 1.01 * bound(list(fronts.values()), mib * MIB + 0.5)
    low, high = plan.report["bits_per_weight"].to_numpy().reshape(2, -1).mean(1)
    assert low < high


def test_plans_have_a_checksum():
    mask = torch.eye(4).bool()
    plans = [{}, {"a": "int4"}, {"b": "int4"}, {"a": "int3"}, {"a": WeightSpec("int4", mask)}]
    plans += [{"a": WeightSpec("int4", ~mask)}, {"a": WeightSpec("int4", group=2)}]
    plans += [{"a": WeightSpec("int4", steps=torch.full((4,), s).half())} for s in (1, 2)]
    assert len({Plan(entries).sha256 for entries in plans}) == len(plans)
    assert Plan({"a": "int4", "b": "int3"}).sha256 == Plan({"b": "int3", "a": "int4"}).sha256
    assert Plan({"a": "int4"}).sha256 == Plan({"a": WeightSpec("int4")}, source="x").sha256


def test_a_plan_is_for_one_size(model, known):
    for sizes in ({}, {"memory_mib": 1.0, "file_mib": 1.0}):
        with pytest.raises(ValueError, match="give memory_mib or file_mib"):
            lafq.allocate(model, known, **sizes)


def test_other_networks():
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v3_small(num_classes=10).eval()
    known = Sensitivity({n: torch.rand(p.shape) for n, p in network.named_parameters()}, {})
    plan = allocated(network, known, 1.0, granularity="channel")
    assert plan.nbytes <= MIB
    assert quantize(network, plan)(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    for name, p in network.named_parameters():
        if p.ndim == 1:
            formats = weight_spec(plan.entries.get(name, "fp32")).formats
            assert {f.name for f in formats} <= {"fp16", "fp32"}


def test_weights_without_fisher_information_cost_nothing(model):
    zero = {n: torch.zeros(w.shape) for n, w in quantizable(model).items()}
    plan = allocated(model, Sensitivity(zero, {}), 2.0)
    assert plan.damage == 0
    assert set(plan.report["formats"]) == {"int2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"memory_mib": 0.01},
            r"a budget of 0.01 MiB cannot be met: the smallest possible is 0\.\d{1,4} MiB",
        ),
        ({"memory_mib": float("nan")}, "nan"),
        (
            {"granularity": "layer"},
            "unknown granularity 'layer': choose one of tensor, channel, mixed",
        ),
        ({"formats": ("int9", "fp32")}, "unknown format 'int9'"),
        ({"formats": ("int4",)}, "fp32 or fp16 among the formats"),
        ({"groups": (0,)}, r"groups are .*: give numbers of weights of at least 1"),
    ],
)
def test_bad_input(model, known, change, message):
    with pytest.raises(ValueError, match=message):
        lafq.allocate(model, known, **{"memory_mib": 1.0, "progress": False, **change})


@pytest.mark.parametrize(
    ("fisher", "message"),
    [
        ({}, "Fisher values of one parameter"),
        ({"Layer9": torch.ones(1)}, "the plan names 'Layer9'"),
        (
            {"inp.weight": torch.ones(1)},
            r"Fisher values of inp.weight must be finite, of its shape \(8, 1, 3, 3\)",
        ),
        ({"inp.weight": -torch.ones(8, 1, 3, 3)}, "none below 0 or NaN"),
        ({"inp.weight": torch.full((8, 1, 3, 3), float("nan"))}, "none below 0 or NaN"),
    ],
    ids=["none", "unknown", "shape", "negative", "nan"],
)
def test_bad_fisher_values(model, fisher, message):
    with pytest.raises(ValueError, match=message):
        allocated(model, Sensitivity(fisher, {}), 1.0)


def test_smallest_possible_size_is_the_one_named(model, known):
    with pytest.raises(ValueError, match="smallest possible") as error:
        allocated(model, known, 0.01)
    mib = float(str(error.value).split()[-2]) + 1e-4
    assert allocated(model, known, mib).nbytes <= mib * MIB + 0.5


def test_groups_are_chosen_where_they_do_less_damage():
    """Channels whose weights differ in size from group to group; the plan keeps its budget and does
    the damage that it says.
    """
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    layer.weight.data *= torch.logspace(0, -2, 4).repeat_interleave(16)
    known = Sensitivity({"weight": torch.ones(32, 64)}, {"weight": torch.eye(64)})
    mib = nbytes(layer, {"weight": WeightSpec("int4", group=16)}) / MIB
    plan = allocated(layer, known, mib)
    grouped = allocated(layer, known, mib, groups=(16, 48))
    assert (
        grouped.entries["weight"].group == 16
        and "groups of 16" in grouped.report["formats"].iloc[0]
    )
    assert grouped.damage < 0.5 * plan.damage
    assert max(plan.nbytes, grouped.nbytes) <= mib * MIB + 0.5
    assert damage(layer, grouped, known) == pytest.approx(grouped.damage, rel=1e-3)
