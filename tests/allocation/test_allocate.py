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
from lafq.allocation.frontiers import ALLOCATED, StorageOption, frontier
from lafq.fisher.sensitivity import Sensitivity
from lafq.quantization.channels import WeightSpec, stored_bytes, weight_spec
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import unshrunk_scale
from lafq.quantization.model import dequantize_, nbytes, quantize
from lafq.quantization.plan import Plan, Recipe
from lafq.rng import generator
from lafq.study.diffusion.unet import UNet, quantizable
from lafq.study.rows import mib_at

MIB = 2**20


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UNet(8).eval()


@pytest.fixture(scope="module")
def fisher(model):
    """Spread over decades, as Fisher values are, between tensors, channels and weights."""
    g = generator(3)
    return {
        n: torch.exp(2 * torch.randn((), generator=g) + 2 * torch.randn(w.shape, generator=g))
        for n, w in quantizable(model).items()
    }


def damage(model, plan, fisher):
    after = dict(
        dequantize_(quantize(model, plan, Recipe(unshrunk_scale, fisher))).named_parameters()
    )
    return sum(
        (0.5 * fisher[n] * (after[n] - model.get_parameter(n)).double().square()).sum().item()
        for n in fisher
    )


@pytest.mark.parametrize("granularity", ALLOCATED)
def test_frontier_says_what_packing_does(model, fisher, granularity):
    for name in (
        "Layer1.block1.conv1.weight",
        "Layer4.resample.weight",
        "Layer2.attention.qkv.weight",
    ):
        rows = channel_view(model, name)
        choices = frontier(model.get_parameter(name).detach(), fisher[name], rows, granularity)
        assert all(
            a.nbytes < b.nbytes and a.damage > b.damage for a, b in itertools.pairwise(choices)
        )
        for choice in choices[:: max(1, len(choices) // 8)]:
            assert choice.nbytes == stored_bytes(rows, choice.entry)
            found = damage(model, {name: choice.entry}, fisher)
            assert found == pytest.approx(choice.damage, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("granularity", ALLOCATED)
def test_budget_is_kept_and_more_bytes_do_less_damage(model, fisher, granularity):
    frontiers = solver.frontiers_of(model, fisher, granularity, progress=False)
    smallest = nbytes(model, {n: c[0].entry for n, c in frontiers.items()}) / MIB
    last = float("inf")
    for share in (0, 0.05, 0.2, 0.5, 1):
        mib = smallest + share * (nbytes(model, {}) / MIB - smallest)
        found = solver.solve_budget(model, frontiers, mib)
        assert found.nbytes == nbytes(model, found) <= mib * MIB + 0.5
        assert found.damage < last
        assert found.damage == pytest.approx(damage(model, found, fisher), rel=1e-3, abs=1e-9)
        assert found.report["damage"].sum() == pytest.approx(found.damage)
        last = found.damage
    assert found == {}
    assert last == 0


def test_finer_units_do_less_damage(model, fisher):
    damages = [
        lafq.allocate(
            model,
            Sensitivity(fisher, {}),
            memory_mib=mib_at(model, 4),
            granularity=granularity,
            progress=False,
        ).damage
        for granularity in ALLOCATED
    ]
    assert damages[0] > damages[1] >= damages[2] * (1 - 1e-3)


def lists(seed, parameters, choices):
    g = np.random.default_rng(seed)
    found = []
    for _ in range(parameters):
        sizes = np.unique(g.integers(100, 5000, choices))
        damages = np.sort(np.exp(g.normal(0, 3, len(sizes))))[::-1]
        found.append(
            [StorageOption(int(n), float(d), "int4") for n, d in zip(sizes, damages, strict=True)]
        )
    return found


def total(chosen, taken):
    return sum(c[i].damage for c, i in zip(chosen, taken, strict=True)), sum(
        c[i].nbytes for c, i in zip(chosen, taken, strict=True)
    )


def solve_milp(lists, budget):
    """The optimum, by an integer program with a 0/1 variable for every choice (HiGHS through
    scipy).
    """
    owner = np.repeat(np.arange(len(lists)), [len(choices) for choices in lists])
    damage = np.array([c.damage for choices in lists for c in choices])
    size = np.array([[c.nbytes for choices in lists for c in choices]]) / budget
    one_each = sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    constraints = [optimize.LinearConstraint(size, ub=1), optimize.LinearConstraint(one_each, 1, 1)]
    # Scaled by what the fast way reaches, so that the solver's absolute tolerances are relative
    # ones.
    costs = np.minimum(damage / total(lists, plan_of(lists, budget))[0], 10)
    found = optimize.milp(
        costs,
        integrality=1,
        bounds=optimize.Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 1e-6},
    )
    assert found.success
    return [int(np.round(found.x[owner == i]).argmax()) for i in range(len(lists))]


def plan_of(lists, budget):
    return solver.filled(lists, budget, *solver.one_price(lists, budget))


def between(lists, share):
    least, most = (sum(c[end].nbytes for c in lists) for end in (0, -1))
    return least + share * (most - least)


def bound(lists, budget):
    """No plan within the budget does less damage (Lagrange, at any price)."""
    price = solver.one_price(lists, budget)[1]
    return sum(min(c.damage + price * c.nbytes for c in front) for front in lists) - price * budget


@pytest.mark.parametrize("seed", range(4))
def test_plans_are_near_the_optimum(seed):
    small = lists(seed, 5, 4)
    budget = 5 * 2500
    every = [total(small, taken) for taken in itertools.product(*(range(len(c)) for c in small))]
    best = min(d for d, n in every if n <= budget)
    assert total(small, solve_milp(small, budget))[0] == pytest.approx(best)
    for parameters, choices in ((5, 4), (34, 7)):
        fronts = lists(seed, parameters, choices)
        for share in (0.2, 0.5, 0.8):
            budget = between(fronts, share)
            fast, exact = (total(fronts, f(fronts, budget)) for f in (plan_of, solve_milp))
            assert fast[1] <= budget
            assert exact[1] <= budget * (1 + 1e-6)
            assert exact[0] * (1 - 1e-5) <= fast[0] <= 1.02 * exact[0]


@pytest.mark.parametrize("distinct", [1, 6000])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_plans_of_many_parameters_are_near_the_bound(distinct, share):
    fronts = lists(1, distinct, 8) * (6000 // distinct)
    budget = between(fronts, share)
    damage, size = total(fronts, plan_of(fronts, budget))
    assert size <= budget
    assert bound(fronts, budget) <= damage <= 1.01 * bound(fronts, budget)


def test_corners_of_a_frontier():
    sizes, damages = (1, 2, 3, 4, 5, 9), (10, 9, 4, 3, 2.9, 0)
    front = [StorageOption(n, d, "") for n, d in zip(sizes, damages, strict=True)]
    assert solver.lower_hull(front) == [0, 2, 3, 5]  # 2.9 lies above the line from 3 to 0
    assert solver.lower_hull(front[:1]) == [0]


def test_bytes_go_where_the_output_weighs_more():
    """1,000 Linear(8, 8), ten different ones, whose outputs are weighted 1 to 10: the plan is
    within 1.01 of the bound, at 1.5 times the bytes of INT4.
    """
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(10))
    ones = {name: torch.ones(8, 8) for name, _ in layers.named_parameters()}
    fronts = list(solver.frontiers_of(layers, ones, "mixed", progress=False).values())
    weights = torch.linspace(1, 10, 1000).square().tolist()
    lists = [
        [choice._replace(damage=weight * choice.damage) for choice in fronts[i % 10]]
        for i, weight in enumerate(weights)
    ]
    network = nn.ModuleList(copy.deepcopy(layers[i % 10]) for i in range(1000))
    names = [name for name, _ in network.named_parameters()]
    mib = 1.5 * nbytes(network, dict.fromkeys(names, "int4")) / MIB
    plan = solver.solve_budget(network, dict(zip(names, lists, strict=True)), mib)
    assert plan.nbytes <= mib * MIB + 0.5
    assert plan.damage <= 1.01 * bound(lists, mib * MIB + 0.5)
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


def test_a_plan_is_for_one_size(model, fisher):
    for sizes in ({}, {"memory_mib": 1.0, "file_mib": 1.0}):
        with pytest.raises(ValueError, match="give memory_mib or file_mib"):
            lafq.allocate(model, Sensitivity(fisher, {}), **sizes)


def test_other_networks():
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v3_small(num_classes=10).eval()
    named = {n: torch.rand(p.shape) for n, p in network.named_parameters()}
    found = lafq.allocate(
        network, Sensitivity(named, {}), memory_mib=1.0, granularity="channel", progress=False
    )
    small = quantize(network, found)
    assert found.nbytes <= MIB
    assert small(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    vectors = [
        weight_spec(found.get(n, "fp32")).format
        for n, p in network.named_parameters()
        if p.ndim == 1
    ]
    assert {"fp16", "fp32"} >= {
        f for formats in vectors for f in ([formats] if isinstance(formats, str) else formats)
    }


def test_weights_without_fisher_information_cost_nothing(model):
    zero = {n: torch.zeros(w.shape) for n, w in quantizable(model).items()}
    found = lafq.allocate(model, Sensitivity(zero, {}), memory_mib=2.0, progress=False)
    assert found.damage == 0
    assert set(found.report["formats"]) == {"int2"}


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
        ({"sensitivity": Sensitivity({}, {})}, "Fisher values of one parameter"),
        ({"sensitivity": Sensitivity({"Layer9": torch.ones(1)}, {})}, "the plan names 'Layer9'"),
        (
            {"sensitivity": Sensitivity({"inp.weight": torch.ones(1)}, {})},
            r"Fisher values of inp.weight must be finite, of its shape \(8, 1, 3, 3\)",
        ),
        (
            {"sensitivity": Sensitivity({"inp.weight": -torch.ones(8, 1, 3, 3)}, {})},
            "none below 0 or NaN",
        ),
        (
            {
                "sensitivity": Sensitivity(
                    {"inp.weight": torch.full((8, 1, 3, 3), float("nan"))}, {}
                )
            },
            "none below 0 or NaN",
        ),
    ],
)
def test_bad_input(model, fisher, change, message):
    with pytest.raises(ValueError, match=message):
        lafq.allocate(
            **{
                "model": model,
                "sensitivity": Sensitivity(fisher, {}),
                "memory_mib": 1.0,
                "progress": False,
                **change,
            }
        )


def test_smallest_possible_size_is_the_one_named(model, fisher):
    with pytest.raises(ValueError, match="smallest possible") as error:
        lafq.allocate(model, Sensitivity(fisher, {}), memory_mib=0.01, progress=False)
    named = float(str(error.value).split()[-2])
    assert (
        lafq.allocate(
            model, Sensitivity(fisher, {}), memory_mib=named + 1e-4, progress=False
        ).nbytes
        <= (named + 1e-4) * MIB + 0.5
    )


def test_groups_are_chosen_where_they_do_less_damage():
    """Channels whose weights differ in size from group to group; the plan keeps its budget and does
    the damage that it says.
    """
    spread = torch.logspace(0, -2, 4).repeat_interleave(16)
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32)
    layer.weight.data *= spread
    known = Sensitivity({"weight": torch.ones(32, 64)}, {"weight": torch.eye(64)})
    mib = nbytes(layer, {"weight": weight_spec("int4")._replace(group=16)}) / MIB
    plan = solver.allocate(layer, known, memory_mib=mib, progress=False)
    grouped = solver.allocate(layer, known, memory_mib=mib, progress=False, groups=(16, 48))
    assert grouped["weight"].group == 16 and "groups of 16" in grouped.report["formats"].iloc[0]
    assert (
        grouped.damage < 0.5 * plan.damage and max(plan.nbytes, grouped.nbytes) <= mib * MIB + 0.5
    )
    assert damage(layer, grouped, known.fisher) == pytest.approx(grouped.damage, rel=1e-3)
    with pytest.raises(ValueError, match=r"groups are .*: give numbers of weights of at least 1"):
        solver.allocate(layer, known, memory_mib=mib, groups=(0,))
