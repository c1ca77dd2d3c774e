"""Networks of every kind under plans of every kind: the original stays as it is, and a copy
computes what the model with its rounded weights computes, before and after a file.
"""

import copy
import os
from functools import partial
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from test_random_plans import entries
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from lafq import dequantize, load_quantized, quantize, save_quantized
from lafq.networks import held
from lafq.quantization.checks import channel_view, obstacle
from lafq.quantization.model import nbytes, resident_bytes
from lafq.quantization.plan import Plan, Recipe

WIDTH = 8
SEEDS = range(int(os.environ.get("LAFQ_SEEDS", 1)))  # of 50 networks; `make test-kill` has 40


class Both(nn.Module):
    """Two paths whose outputs are added; they may share weights."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return self.a(x) + self.b(x)


class Folded(nn.Module):
    """A layer that sees the sequence (B, T, C) as an image, channels first, and gives it back."""

    def __init__(self, layer, dimensions):
        super().__init__()
        self.layer, self.shape = layer, (-1, WIDTH, *(1,) * (dimensions - 1), 4)

    def forward(self, x):
        return self.layer(x.mT.reshape(self.shape)).reshape(len(x), -1, 4).mT


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 4, WIDTH))

    def forward(self, x):
        return x + self.table


class Looked(nn.Module):
    """An embedding of the signs."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2, WIDTH)

    def forward(self, x):
        return x + self.table((x[..., 0] > 0).long())


def masked(layer):
    with torch.no_grad():
        layer.weight.tril_()
    return layer


def tied(a, b):
    b.weight = a.weight
    return Both(a, b)


class Recurrent(nn.GRU):
    def forward(self, x):
        return super().forward(x)[0]


linear = partial(nn.Linear, WIDTH, WIDTH)
conv = {"kernel_size": 3, "padding": 1}
PARTS = {
    "linear": linear,
    "no bias": partial(linear, bias=False),
    "masked": lambda: masked(linear()),
    "weight norm": lambda: parametrizations.weight_norm(linear()),
    "spectral norm": lambda: parametrizations.spectral_norm(linear()),
    "tied": lambda: tied(linear(), linear()),
    "same twice": lambda: Both(shared := linear(), shared),
    "two": lambda: Both(linear(), nn.Sequential(linear(), nn.ReLU(), linear())),
    "conv1d": lambda: Folded(nn.Conv1d(WIDTH, WIDTH, **conv), 1),
    "grouped": lambda: Folded(nn.Conv2d(WIDTH, WIDTH, groups=4, **conv), 2),
    "depthwise": lambda: Folded(nn.Conv2d(WIDTH, WIDTH, groups=WIDTH, **conv), 2),
    "conv3d": lambda: Folded(nn.Conv3d(WIDTH, WIDTH, **conv), 3),
    "transposed": lambda: Folded(nn.ConvTranspose2d(WIDTH, WIDTH, groups=2, **conv), 2),
    "batch norm": lambda: Folded(nn.BatchNorm1d(WIDTH), 1),
    "group norm": lambda: Folded(nn.GroupNorm(2, WIDTH), 1),
    "layer norm": lambda: nn.LayerNorm((4, WIDTH)),
    "attention": Attention,
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, batch_first=True),
    "positions": Positions,
    "embedding": Looked,
    "recurrent": lambda: Recurrent(WIDTH, WIDTH, batch_first=True),
    "compiled": lambda: torch.compile(linear(), backend="eager"),
    "parallel": lambda: nn.DataParallel(linear()),
    "checkpointed": lambda: checkpoint_wrapper(linear()),
    "dropout": lambda: nn.Dropout(0.5),
}


@st.composite
def networks_with_plans(draw):
    torch.manual_seed(draw(st.integers(0, 999)))
    parts = draw(st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=4))
    model = nn.Sequential(*(PARTS[part]() for part in parts)).train(draw(st.booleans()))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    free = [n for n in parameters if not obstacle(model, n, parameters)]
    names = draw(st.sets(st.sampled_from(free))) if free else ()
    views = {n: channel_view(model, n) for n in sorted(names)}
    plan = {n: draw(entries(view.shape, *view.size)) for n, view in views.items()}
    fed = {n: torch.randn(3 * v.size[1], v.size[1]) for n, v in views.items()}
    curvature = {n: x.T @ x / len(x) for n, x in fed.items()} if draw(st.booleans()) else {}
    return model, Plan(plan, Recipe(curvature=curvature))


def state(model):
    """Values, modes, flags and classes of everything."""
    values = {n: t.clone() for n, t in held(model).items()}
    flags = [p.requires_grad for p in model.parameters()]
    return values, flags, [(m, type(m), m.training) for m in model.modules()]


def of(model, x):
    """The output in evaluation mode; the modes stay."""
    return copy.deepcopy(model).eval()(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", SEEDS)
def test_copies_files_and_bytes_of_any_network(number):
    fixed = settings(max_examples=50, deadline=None, database=None)
    seed(number)(fixed(given(networks_with_plans())(check)))()


def check(found):
    model, plan = found
    x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    before, output = state(model), of(model, x)
    small = quantize(model, plan)
    assert resident_bytes(small) == nbytes(model, plan)
    result = small(x)
    again = quantize(small, {})
    whole = dequantize(small)
    replaced = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name in plan.entries:
            owner, _, attribute = name.rpartition(".")
            stored = getattr(small.get_submodule(owner), attribute)
            replaced.get_parameter(name).copy_(stored)
            assert stored[model.get_parameter(name) == 0].eq(0).all() or "midrise2" in str(
                plan.entries
            )
    with TemporaryDirectory() as folder:
        save_quantized(f"{folder}/a.safetensors", small, model)
        loaded = load_quantized(f"{folder}/a.safetensors", model)
    for each in (replaced, whole, loaded, again, small):
        torch.testing.assert_close(each(x), result, rtol=1e-5, atol=1e-5)
    after = state(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(t, after[0][n]) for n, t in before[0].items())
    assert torch.equal(of(model, x), output)
