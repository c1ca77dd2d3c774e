"""What ordinary networks of other people do: modes, flags, tied and renamed weights, outputs of
other types.
"""

import copy
import sys
import weakref
from contextlib import contextmanager
from functools import partial
from io import BytesIO

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from lafq import (
    allocate,
    dequantize,
    estimate_sensitivity,
    load_quantized,
    quantize,
    save_quantized,
)
from lafq.fisher.empirical import empirical_fisher
from lafq.quantization import entropy_coding
from lafq.quantization.channels import WeightSpec
from lafq.quantization.model import dequantize_, nbytes, resident_bytes, weights_sha256
from lafq.quantization.plan import Plan, Recipe
from lafq.quantization.tuning import tune


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )
    return nn.Sequential(*layers).train()


@pytest.fixture
def inputs():
    return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trace(model):
    """All that a function may leave behind: state, modes and flags."""
    return (
        weights_sha256(model),
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel], ids=["compiled", "data parallel"]
)
def test_a_wrapped_model_is_named_and_stored_as_the_one_inside(network, inputs, wrap, tmp_path):
    network.eval()
    wrapped, path = wrap(network), tmp_path / "small.safetensors"
    sensitivity = estimate_sensitivity(wrapped, [(inputs,)] * 4)
    plan = allocate(wrapped, sensitivity, memory_mib=0.002, progress=False)
    assert set(plan.entries) == {"0.weight", "5.weight"}
    assert plan.nbytes == nbytes(network, plan) == nbytes(wrapped, plan)
    assert weights_sha256(wrapped) == weights_sha256(network)
    small = quantize(wrapped, plan)
    save_quantized(path, wrap(small), wrapped)
    for model in (network, wrapped):
        assert torch.equal(load_quantized(path, model)(inputs), small(inputs))
    assert tune(wrapped, small, [(inputs,)] * 2, 2) is small


def test_buffers_that_repeat_quantized_weights_are_named(network):
    network.register_buffer("again", network[0].weight.detach().clone())
    with pytest.warns(
        UserWarning,
        match=r"1 buffers repeat quantized weights and stay in FP32 \(again, ...; 0.00 MiB\): del",
    ):
        small = quantize(network, {"0.weight": "int4"})
    assert torch.equal(small.again, network[0].weight)
    quantize(network, {"5.weight": "int4"})


def test_a_file_holds_weight_norm_beside_planned_weights(tmp_path):
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    model = nn.Sequential(normed, nn.Conv2d(4, 4, 3))
    small, path = quantize(model, {"1.weight": "int4"}), tmp_path / "small.safetensors"
    save_quantized(path, small, model)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert (
        path.stat().st_size - header == resident_bytes(small) == nbytes(model, {"1.weight": "int4"})
    )
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(load_quantized(path, copy.deepcopy(model))(x), small(x))


def test_names_with_a_slash_are_stored_under_their_own_name(tmp_path):
    model = nn.ModuleDict({"a/b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    path = tmp_path / "small.safetensors"
    save_quantized(str(path), quantize(model, {"c.weight": "int4"}), model)
    loaded = load_quantized(str(path), copy.deepcopy(model))
    assert torch.equal(loaded["a/b"].weight, model["a/b"].weight)


def test_a_state_that_is_no_tensor_is_refused_when_saving(tmp_path):
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    model = Stateful(4, 4)
    with pytest.raises(ValueError, match="_extra_state is no tensor"):
        save_quantized(tmp_path / "x.safetensors", quantize(model, {"weight": "int4"}), model)


@pytest.mark.parametrize("run", ["sensitivity", "empirical", "tune"])
def test_the_model_is_run_in_evaluation_mode_and_left_as_it_was(network, inputs, run):
    network[5].weight.requires_grad_(False)
    before, evaluated = trace(network), copy.deepcopy(network).eval()

    def result(model):
        if run == "sensitivity":
            return estimate_sensitivity(model, inputs.split(8), seed=0).fisher["0.weight"]
        if run == "empirical":
            return empirical_fisher(model, ["0.weight"], [(inputs, torch.zeros(32, 4))]).by_weight[
                "0.weight"
            ]
        return tune(model, quantize(model, {"5.weight": "int4"}), inputs.split(8), steps=4)[5].bias

    with torch.no_grad():  # as a user's own evaluation script may have it around everything
        found = result(network)
    assert torch.equal(found, result(evaluated))
    assert trace(network) == before


def test_dequantized_weights_can_be_trained_as_those_of_the_source(network):
    network[0].weight.requires_grad_(False)
    whole = dequantize_(quantize(network, {"0.weight": "int8", "5.weight": "int8"}))
    assert {n: p.requires_grad for n, p in whole.named_parameters()} == {
        n: p.requires_grad for n, p in network.named_parameters()
    }
    whole(torch.randn(2, 3, 8, 8)).sum().backward()
    assert whole[5].weight.grad is not None


def test_dequantize_leaves_its_argument(network, inputs):
    small = quantize(network, {"0.weight": "int8", "5.weight": "int4"})
    bytes_before, expected = resident_bytes(small), small(inputs)
    whole = dequantize(small)
    assert torch.equal(whole(inputs), expected) and resident_bytes(small) == bytes_before
    assert resident_bytes(whole) == resident_bytes(network)
    with torch.no_grad():
        whole[0].weight.zero_()
    assert torch.equal(small(inputs), expected)
    assert dequantize_(small) is small and resident_bytes(small) == resident_bytes(network)


def test_a_deepcopy_is_dequantized_alone(network, inputs):
    small = quantize(network, {"0.weight": "int8", "5.weight": "int4"})
    expected, other = small(inputs), copy.deepcopy(small)
    assert torch.equal(dequantize_(other)(inputs), expected)
    assert torch.equal(small(inputs), expected)
    assert torch.equal(dequantize_(small)(inputs), expected)


def test_a_batch_that_is_one_tensor_is_one_argument():
    torch.manual_seed(0)
    model, x = nn.Conv2d(1, 4, 3), torch.randn(8, 1, 6, 6)
    target = torch.zeros(8, 4, 4, 4)
    bare, tuples = (
        empirical_fisher(model, ["weight"], [(a, target)]).by_weight["weight"] for a in (x, (x,))
    )
    assert torch.equal(bare, tuples)
    found = [
        estimate_sensitivity(model, batches, seed=0).fisher["weight"]
        for batches in (x.split(4), [(p,) for p in x.split(4)])
    ]
    assert torch.equal(*found)


class Output(nn.Module):
    """A model whose output is made of its input by `make`."""

    def __init__(self, make):
        super().__init__()
        self.linear, self.unused, self.make = nn.Linear(4, 4), nn.Linear(4, 4), make

    def forward(self, x):
        return self.make(self.linear(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda y: {"sample": y}, "output is a dict: wrap the model"),
        (lambda y: (y,), "output is a tuple: wrap the model"),
        (lambda y: y.sum(), r"output has shape \(\) for 8 samples"),
        (
            lambda y: y.T,
            r"output has shape \(4, 8\) for 8 samples: its first axis must be the batch",
        ),
    ],
)
def test_an_output_that_is_not_one_tensor_by_sample_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        estimate_sensitivity(Output(make), [torch.randn(8, 4)])


def test_a_target_of_another_shape_is_refused():
    with pytest.raises(
        ValueError, match=r"output for one sample has shape \(4,\), the target \(1,\)"
    ):
        empirical_fisher(nn.Linear(4, 4), ["weight"], [(torch.randn(8, 4), torch.zeros(8, 1))])


@pytest.mark.filterwarnings("ignore:4 of 4 output channels of unused.weight got no gradient")
def test_an_unused_parameter_can_be_allocated():
    torch.manual_seed(0)
    model = Output(lambda y: y)
    sensitivity = estimate_sensitivity(model, torch.randn(64, 4).split(4))
    plan = allocate(
        model,
        sensitivity,
        memory_mib=nbytes(model, dict.fromkeys(sensitivity.fisher, "int8")) / 2**20,
        progress=False,
    )
    assert quantize(model, plan)(torch.randn(2, 4)).isfinite().all()


@pytest.mark.parametrize(
    "entry", ["fp32", WeightSpec(("fp16",) * 2 + ("fp32",) * 2)], ids=["fp32", "several formats"]
)
def test_a_vector_planned_otherwise_is_no_obstacle_to_tuning(network, inputs, entry):
    small = quantize(network, {"5.weight": "int2", "5.bias": entry})
    before = dequantize_(copy.deepcopy(small))[5].bias.clone()
    tune(network, small, inputs.split(8), steps=4)
    assert torch.equal(dequantize_(small)[5].bias, before) == (entry != "fp32")


def test_planned_vectors_are_fitted_as_they_are_stored(network, inputs):
    plan = {"5.weight": "int2", "5.bias": "fp16", "0.bias": "fp16"}
    small = quantize(network, plan)
    before, stored = copy.deepcopy(dequantize_(copy.deepcopy(small))), resident_bytes(small)
    tune(network, small, inputs.split(2) * 4, steps=60)
    assert resident_bytes(small) == stored
    after, whole = dequantize_(small), copy.deepcopy(network).eval()
    assert torch.equal(after[5].bias, after[5].bias.half().float())
    assert not torch.equal(after[5].bias, before[5].bias)
    off = [(m.eval()(inputs) - whole(inputs)).square().mean() for m in (before, after)]
    assert off[1] < off[0]


def test_what_cannot_be_tuned_is_one_sentence_and_leaves_the_copy_as_it_was(network, inputs):
    small = quantize(network, {"5.weight": "int4"})
    before = weights_sha256(small)
    with pytest.raises(ValueError, match="batch 1 gives outputs that are not finite"):
        tune(network, small, [inputs[:8], inputs[:8] * torch.nan, inputs[:8]], steps=3)
    with pytest.raises(ValueError, match="needs one step at least"):
        tune(network, small, inputs.split(8), steps=0)
    bare = nn.Linear(4, 4, bias=False)
    with pytest.raises(ValueError, match="a model that has biases or norms"):
        tune(bare, quantize(bare, {"weight": "int4"}), [torch.randn(2, 4)], steps=1)
    assert weights_sha256(small) == before


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.middle, self.outside = (
            nn.Linear(8, 16, bias=False),
            nn.Linear(16, 16),
            nn.Linear(8, 16, bias=False),
        )
        self.outside.weight = self.inside.weight

    def forward(self, x):
        return self.middle(self.inside(x) + self.outside(x))


def test_tied_weights_are_counted_and_stored_once_and_tied_again(tmp_path):
    model, path = Tied(), tmp_path / "small.safetensors"
    plan = {"middle.weight": "int8"}
    small = quantize(model, plan)
    assert nbytes(model, {}) == 4 * (8 * 16 + 16 * 16 + 16) == resident_bytes(model)
    save_quantized(path, small, model)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == resident_bytes(small) == nbytes(model, plan)
    loaded, x = load_quantized(path, Tied()), torch.randn(2, 8)
    assert torch.equal(loaded(x), small(x))
    assert loaded.outside.weight is loaded.inside.weight


def test_recurrent_weights_are_refused():
    with pytest.raises(ValueError, match="weight_ih_l0 is of a recurrent layer"):
        quantize(nn.LSTM(4, 4), {"weight_ih_l0": "int8"})


@pytest.mark.parametrize(("low", "size"), [("int8", 1e-5), ("int2", 5e-7), ("fp16", 1e-7)])
def test_weights_too_small_for_fp16_are_named(low, size):
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.mul_(size / layer.weight.abs().max())
    with pytest.raises(ValueError, match=r"weight holds weights up to .*, and FP16 numbers"):
        quantize(layer, {"weight": low})
    with torch.no_grad():
        layer.weight.mul_(100)
    change = dequantize_(quantize(layer, {"weight": "fp16"})).weight / layer.weight - 1
    assert change.abs().median() < 0.03


def test_a_row_of_zeros_is_no_small_weight():
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight[0] = 0
    assert dequantize_(quantize(layer, {"weight": "int8"})).weight[0].eq(0).all()


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
def test_a_quantized_copy_keeps_what_it_stores_under_a_cast(network, cast):
    small = quantize(network, {"0.weight": "int8", "5.weight": "fp16"})
    stored = {n: b.clone() for n, b in small.named_buffers() if "parametrizations" in n}
    small.to(cast)
    for name, b in small.named_buffers():
        if name in stored:
            assert b.dtype == stored[name].dtype
            assert torch.equal(b, stored[name])
    assert small[5].weight.dtype == cast
    assert small(torch.randn(2, 3, 8, 8, dtype=cast)).isfinite().all()


def test_save_pretrained_of_a_quantized_copy_is_refused():
    class Pretrained(nn.Linear):
        def save_pretrained(self, folder):
            return folder

    small = quantize(Pretrained(4, 4), {"weight": "int8"})
    with pytest.raises(ValueError, match="save_pretrained loses quantized weights"):
        small.save_pretrained("x")
    assert dequantize_(small).save_pretrained("x") == "x"


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("run", ["sensitivity", "empirical", "tune"])
def test_gradients_switched_off_by_the_caller_change_nothing(network, off, run):
    def found():
        x = torch.ones(8, 3, 8, 8)
        if run == "sensitivity":
            return estimate_sensitivity(network, [(x,)], seed=0).fisher["0.weight"]
        if run == "empirical":
            return empirical_fisher(network, ["0.weight"], [((x,), torch.zeros(8, 4))]).by_weight[
                "0.weight"
            ]
        return dict(
            tune(network, quantize(network, {"0.weight": "int4"}), [x], steps=1).named_parameters()
        )["0.bias"].detach()

    expected = found()
    with off():
        assert torch.equal(found(), expected)


@pytest.mark.parametrize(
    "batch",
    [{"x": torch.ones(2, 3)}, (), ("text",), torch.tensor(1.0)],
    ids=["dict", "empty", "text", "scalar"],
)
def test_a_batch_of_another_kind_is_refused(batch):
    model = nn.Linear(3, 2)
    small = quantize(model, {"weight": "int4"})
    for run in (
        lambda: estimate_sensitivity(model, [batch]),
        lambda: tune(model, small, [batch], steps=1),
    ):
        with pytest.raises(ValueError, match="give one tensor"):
            run()


def test_an_argument_that_is_no_tensor_is_passed_on():
    class Scaled(nn.Linear):
        def forward(self, x, factor):
            return factor * super().forward(x)

    model, x = Scaled(3, 2), torch.ones(4, 3)
    plain, scaled = (estimate_sensitivity(model, [(x, f)], seed=0).fisher["weight"] for f in (1, 3))
    torch.testing.assert_close(scaled, 9 * plain)


def test_tuning_a_model_of_several_outputs_is_refused():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    model = Pair(3, 2)
    with pytest.raises(ValueError, match="output is a tuple: wrap the model"):
        tune(model, quantize(model, {"weight": "int4"}), [torch.ones(4, 3)], steps=1)


def test_a_model_that_cannot_be_copied_is_refused():
    model = prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)
    with pytest.raises(ValueError, match=r"the model cannot be copied .*: remove pruning"):
        quantize(model, {"bias": "fp16"})


def test_a_buffer_that_no_file_holds_is_named(tmp_path):
    def build():
        model = nn.Linear(4, 4)
        model.register_buffer("table", torch.ones(4), persistent=False)
        return model

    model, path = build(), tmp_path / "a.safetensors"
    save_quantized(path, quantize(model, {"weight": "int8"}), source=model)
    assert load_quantized(path, build()).table.sum() == 4
    with torch.device("meta"):
        skeleton = build()
    with pytest.raises(ValueError, match="no file holds table, a non-persistent buffer"):
        load_quantized(path, skeleton)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"fisher": {"wieght": torch.ones(4, 4)}},
            "the Fisher values name 'wieght', which the model lacks",
        ),
        (
            {"curvature": {"wieght": torch.eye(4)}},
            "the curvature names 'wieght', which the model lacks",
        ),
        (
            {"fisher": {"weight": torch.full((4, 4), torch.inf)}},
            "the Fisher values of weight must be finite",
        ),
        ({"curvature": {"weight": -torch.eye(4)}}, "not positive semidefinite"),
    ],
    ids=["name of Fisher values", "name of a curvature", "infinite", "indefinite"],
)
def test_a_recipe_that_does_not_fit_is_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        quantize(nn.Linear(4, 4), {"weight": "int4"}, Recipe(**recipe))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch was given"),
        (iter(()), "no batch was given"),
        (
            [(torch.zeros(2, 4),)],
            "the Fisher information is zero everywhere: these batches give the output no gradient",
        ),
        ([(torch.full((2, 4), float("nan")),)], "the Fisher information of .* is not finite"),
    ],
    ids=["none", "used up", "no gradient", "nan"],
)
def test_batches_that_tell_nothing_are_refused(batches, message):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with pytest.raises(ValueError, match=message):
        estimate_sensitivity(model, batches)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, batches: estimate_sensitivity(batches, model),
        lambda model, batches: allocate(
            estimate_sensitivity(model, batches), model, memory_mib=1.0
        ),
        lambda model, batches: quantize({"weight": "int4"}, model),
        lambda model, batches: tune(quantize(model, {"weight": "int8"}), batches, model, 1),
    ],
    ids=["estimate_sensitivity", "allocate", "quantize", "tune"],
)
def test_arguments_in_another_order_are_refused(call):
    with pytest.raises(ValueError, match=r"the model is a \w+: check the order of the arguments"):
        call(nn.Linear(4, 4), [(torch.randn(8, 4),)])


def test_a_dead_input_channel_gives_a_plan_no_worse_than_uniform():
    torch.manual_seed(0)
    model, x = nn.Linear(32, 32), torch.randn(256, 32)
    x[:, 5] = 0
    sensitivity = estimate_sensitivity(model, [(part,) for part in x.split(4)])
    plain = {"weight": "int4"}
    plan = allocate(model, sensitivity, memory_mib=nbytes(model, plain) / 2**20, progress=False)
    errors = [(quantize(model, p)(x) - model(x)).square().mean() for p in (plan, plain)]
    assert errors[0] <= errors[1]


class Uses(nn.Module):
    """A linear layer `l` that is called as `use` says: use(self, x)."""

    def __init__(self, use=lambda self, x: self.l(x)):
        super().__init__()
        self.l, self.use = nn.Linear(4, 4), use

    def forward(self, x):
        return self.use(self, x)


def linear(change=lambda model: None):
    """The model, changed by a function that may keep parts of it."""
    torch.manual_seed(0)
    model = Uses()
    change(model)
    return model.eval()


def keeps_a_function(model):
    model.use = lambda _, x: model.l(x)


def keeps_a_forward(model):
    forward = model.l.forward
    model.l.forward = lambda x: forward(x) + 1


def keeps_a_hook(model):
    model.extra = nn.Identity()
    model.l.register_forward_hook(lambda *_: model.extra(1) and None)


def keeps_a_reference(model):
    reference = weakref.ref(model.l)
    model.use = partial(lambda held, _, x: held[0]()(x), [reference])


def keeps_a_list(model):
    model.weights = [model.l.weight]


GLOBAL = [None]


def reads_a_global(model):
    GLOBAL[0] = model.l
    model.use = lambda _, x: GLOBAL[0](x)


INT8, BATCHES = (
    {"l.weight": "int8"},
    torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(0)),
)


def estimate(model, batches=tuple(BATCHES), **how):
    return estimate_sensitivity(model, batches, **how)


class Masked(nn.Linear):
    def forward(self, x, mask=None):
        return super().forward(x)


def reentrant(self, x):
    return checkpoint(self.l, x, use_reentrant=True)


def in_inference(build=linear):
    with torch.inference_mode():
        return build()


UNMERGED = "a quantized weight cannot be written: dequantize"
NO_COPY = "holds l, which a copy would not quantize: take it from `self`"


def sharded():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    shards = fully_shard(linear(), mesh=init_device_mesh("cpu", (1,)))
    distributed.destroy_process_group()
    return shards


REFUSED = {
    "a function keeps a layer": (
        lambda: quantize(linear(keeps_a_function), INT8),
        "the model hold",
    ),
    "a forward is replaced": (lambda: quantize(linear(keeps_a_forward), INT8), NO_COPY),
    "a hook keeps the model": (lambda: quantize(linear(keeps_a_hook), INT8), "holds the model"),
    "a weak reference": (lambda: quantize(linear(keeps_a_reference), INT8), NO_COPY),
    "a global": (lambda: quantize(linear(reads_a_global), INT8), NO_COPY),
    "a weight in a list": (
        lambda: quantize(linear(keeps_a_list), INT8),
        "list of the model holds l.w",
    ),
    "one tensor for batches": (lambda: estimate(linear(), BATCHES), "the batches are one tensor"),
    "one tensor to tune": (
        lambda: tune(linear(), quantize(linear(), INT8), BATCHES, 1),
        "the batches are one tensor",
    ),
    "labels": (
        lambda: estimate(Masked(4, 4), [(x, torch.ones(2)) for x in BATCHES]),
        r"a batch has 2 items, and the model takes 1 without a default \(x\): leave labels out",
    ),
    "too few arguments": (
        lambda: estimate(nn.Bilinear(4, 4, 2)),
        r"a batch has 1 items, and the model takes 2 without a default \(input1, input2\)",
    ),
    "entries for a plan": (lambda: quantize(linear(), [("l.weight", "int8")]), "plan is a list"),
    "reentrant checkpoints": (lambda: estimate(Uses(reentrant)), "checkpoint with use_reentrant=F"),
    "detached output": (
        lambda: estimate(Uses(lambda self, x: self.l(x).detach())),
        "or inference_mode, or detached",
    ),
    "a complex weight": (
        lambda: estimate(nn.Linear(4, 4, dtype=torch.complex64)),
        "left out, as no plan|no parameter is named",
    ),
    "a complex weight by name": (
        lambda: estimate(nn.Linear(4, 4, dtype=torch.complex64), names=["weight"]),
        "weight is torch.complex64: name parameters of real numbers",
    ),
    "weights of inference mode": (lambda: estimate(in_inference()), "was made in inference mode"),
    "offloaded": (lambda: quantize(linear().to("meta"), INT8), "has no values"),
    "sharded": (
        lambda: quantize(sharded(), INT8),
        "a DTensor: give the model with its whole weights",
    ),
    "sparse": (
        lambda: estimate(linear(lambda m: setattr(m, "s", nn.Parameter(torch.eye(4).to_sparse())))),
        "s is torch.sparse_coo: make it dense first",
    ),
    "lazy": (
        lambda: quantize(nn.LazyConv2d(4, 3), {"weight": "int8"}),
        "weight has no shape yet: run the model on a batch first",
    ),
    "scripted": (
        lambda: quantize(torch.jit.script(nn.Linear(4, 4)), {"weight": "int8"}),
        "the model is scripted or exported: give the module that it was made of",
    ),
    "exported": (
        lambda: quantize(torch.export.export(nn.Linear(4, 4), (BATCHES[0],)).module(), INT8),
        "the model is scripted or exported",
    ),
    "a seed below 0": (lambda: estimate(linear(), seed=-1), "a seed is -1: give a whole number"),
    "no seed": (lambda: estimate(linear(), seed=None), "a seed is None"),
    "a seed with a fraction": (lambda: estimate(linear(), seed=1.5), "a seed is 1.5"),
    "a file": (
        lambda: save_quantized(BytesIO(), quantize(linear(), INT8), linear()),
        "the path is a BytesIO",
    ),
    "a merged LoRA": (lambda: quantize(linear(), INT8).l.weight.data.add_(1), UNMERGED),
    "a weight drawn anew": (lambda: nn.init.zeros_(quantize(linear(), INT8).l.weight), UNMERGED),
    "an input changed in a loop": (
        lambda: estimate(
            Uses(lambda self, x: self.l(x.mul_(2).clone())),
            through=lambda model, x: model(x.clone()),
        ),
        "the model changes its input in place",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def weight_normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))


def attention():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()


@pytest.mark.parametrize(
    ("build", "plans"),
    [
        (weight_normed, [{"0.bias": "fp16"}, {"1.weight": "int8"}]),
        (weight_normed, [{"0.parametrizations.weight.original1": "int8"}, {"0.bias": "fp16"}]),
        (attention, [{"self_attn.in_proj_weight": "int8"}, {"self_attn.in_proj_bias": "fp16"}]),
        (linear, [{"l.weight": "int8"}, {"l.bias": "fp16"}]),
    ],
    ids=["weight norm", "under weight norm", "attention", "twice"],
)
def test_what_is_quantized_works_as_before(build, plans, tmp_path):
    model, x, path = build(), BATCHES[:2], tmp_path / "a.safetensors"
    chain, outputs = [model], [model(x)]
    for plan in plans:
        chain.append(quantize(chain[-1], plan))
        outputs.append(chain[-1](x))
    whole = dequantize(chain[-1])
    for each, expected in zip([*chain, whole], [*outputs, outputs[-1]], strict=True):
        torch.testing.assert_close(each(x), expected)
    save_quantized(path, chain[-1], model)
    torch.testing.assert_close(load_quantized(path, model)(x), outputs[-1])


class Filtered(Uses):
    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {n: t.T if t.ndim > 1 else t for n, t in state.items() if "bias" not in n}


class Versioned(nn.Linear):
    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"].T
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Plainly(nn.Linear):
    def load_state_dict(self, state, strict=True):
        return super().load_state_dict(state, strict)


class Listed(nn.Module):
    """Weights that a list and a partial hold too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.held = [partial(F.linear, weight=self.b.weight)]

    def forward(self, x):
        return self.held[0](self.a(x))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (Filtered, "l.weight"),
        (lambda: nn.Sequential(Versioned(4, 4), nn.Linear(4, 4)), "1.weight"),
        (lambda: Plainly(4, 4), "weight"),
        (Listed, "a.weight"),
    ],
    ids=["filtered", "versioned", "without assign", "in a list"],
)
def test_a_file_holds_what_the_modules_hold(build, name, tmp_path):
    model, path = build(), tmp_path / "a.safetensors"
    small = quantize(model, {name: "int8"})
    save_quantized(path, small, model)
    assert torch.equal(load_quantized(path, build())(BATCHES[0]), small(BATCHES[0]))


def test_a_tensor_that_only_the_state_has_is_refused(tmp_path):
    model = linear()
    model.register_state_dict_post_hook(lambda m, state, *_: state.update(more=torch.ones(1)))
    with pytest.raises(ValueError, match="more of the state_dict is no parameter: register it as"):
        save_quantized(tmp_path / "a.safetensors", quantize(model, INT8), model)


@pytest.mark.parametrize(
    "wrap",
    [
        partial(torch.compile, backend="eager"),
        nn.DataParallel,
        checkpoint_wrapper,
        lambda layer: layer,
    ],
    ids=["compiled", "data parallel", "checkpointed", "plain"],
)
def test_files_of_wrapped_layers_load_into_plain_ones_and_back(wrap, tmp_path):
    plain, path = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tmp_path / "a.safetensors"
    wrapped = nn.Sequential(wrap(copy.deepcopy(plain[0])), copy.deepcopy(plain[1]))
    name = next(n for n, p in wrapped.named_parameters() if p.ndim > 1)
    for source, entry, target in ((wrapped, name, plain), (plain, "0.weight", wrapped)):
        small = quantize(source, {entry: "int4"})
        save_quantized(path, small, source)
        loaded = load_quantized(path, target, source=weights_sha256(target))
        assert torch.equal(loaded(BATCHES[0]), small(BATCHES[0]))


def test_an_averaged_model_is_the_one_inside(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(linear())
    assert torch.equal(quantize(averaged, INT8).l.weight, quantize(linear(), INT8).l.weight)


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_copy_is_loaded_as_it_was_saved(cast, tmp_path):
    small, path = quantize(linear(), INT8).to(cast), tmp_path / "a.safetensors"
    save_quantized(path, small, linear())
    loaded = load_quantized(path, linear())
    assert loaded.l.weight.dtype == cast
    assert torch.equal(loaded(BATCHES[0].to(cast)), small(BATCHES[0].to(cast)))


@contextmanager
def default(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "around",
    [
        lambda: default(torch.bfloat16),
        lambda: default(torch.float64),
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
    ],
    ids=["bf16", "fp64", "device", "autocast", "inference"],
)
def test_what_is_set_around_the_calls_changes_nothing(around, tmp_path):
    model, path = linear(), tmp_path / "a.safetensors"
    sensitivity = estimate(model)

    def made():
        plan = allocate(model, sensitivity, memory_mib=60 / 2**20, progress=False)
        small = quantize(model, plan)
        save_quantized(path, small, model, compress=True)
        return small, load_quantized(path, model), dequantize(small), plan

    expected = made()
    with around():
        found = made()
        weights = [part.l.weight for part in (*found[:3], expected[0])]
    assert found[3].sha256 == expected[3].sha256
    for weight in weights:
        assert torch.equal(weight, expected[0].l.weight)


@pytest.mark.parametrize("around", [lambda: torch.device("meta"), lambda: default(torch.float64)])
def test_what_is_set_around_an_estimate_changes_nothing(around):
    model = linear()
    expected = estimate(model)
    with around():
        found = estimate(model)
    for of in ("fisher", "curvature"):
        assert torch.equal(getattr(found, of)["l.weight"], getattr(expected, of)["l.weight"])


def test_real_and_imaginary_parts_count_alike():
    def pairs(self, x):
        return torch.view_as_complex(self.l(x).unflatten(-1, (2, 2)))

    expected = estimate(linear())
    model = linear()
    model.use = pairs
    torch.testing.assert_close(estimate(model).fisher, expected.fisher)
    target = torch.zeros(2, 2, dtype=torch.complex64)
    found = empirical_fisher(model, ["l.weight"], [(BATCHES[0], target)]).by_weight
    plain = empirical_fisher(linear(), ["l.weight"], [(BATCHES[0], torch.zeros(2, 4))]).by_weight
    torch.testing.assert_close(found, plain)


def test_a_token_that_no_batch_visits_counts_as_the_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 8), nn.Flatten(), nn.Linear(8, 4))
    batches = torch.randint(8, (32, 4, 1)).unbind()
    with pytest.warns(
        UserWarning, match="8 of 16 output channels of 0.weight got no gradient from any"
    ):
        sensitivity = estimate(model, batches)
    fisher = sensitivity.fisher["0.weight"]
    torch.testing.assert_close(fisher[8:], fisher[:8].mean().expand(8, 8))
    alike = dict.fromkeys(sensitivity.fisher, "int4")
    mib = nbytes(model, alike) / 2**20
    plan = allocate(model, sensitivity, memory_mib=mib, progress=False)
    every = torch.arange(16)[:, None]
    off = [(quantize(model, p)(every) - model(every))[8:].square().mean() for p in (plan, alike)]
    assert off[0] < 2 * off[1]


def test_a_layer_that_no_batch_visits_counts_as_the_median_tensor():
    model = nn.Sequential(Output(lambda y: y), nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.warns(
        UserWarning, match="4 of 4 output channels of 0.unused.weight got no gradient"
    ):
        sensitivity = estimate(model)
    median = sorted(
        sensitivity.fisher[n].mean() for n in ("0.linear.weight", "1.weight", "2.weight")
    )
    torch.testing.assert_close(sensitivity.fisher["0.unused.weight"], median[1].expand(4, 4))
    assert torch.equal(sensitivity.curvature["0.unused.weight"], torch.eye(4))


def test_entries_are_changed_and_the_rounding_stays():
    model = linear()
    sensitivity = estimate(model)
    plan = allocate(model, sensitivity, memory_mib=60 / 2**20, progress=False)
    changed = plan.with_entries({"l.weight": "int8"})
    assert (changed.recipe, changed.source) == (plan.recipe, plan.source)
    assert dict(changed.entries) == {"l.weight": "int8"} != dict(plan.entries)
    for lose in (
        lambda: plan | {"l.weight": "int8"},
        lambda: {"l.weight": "int8"} | plan,
        lambda: {**plan},
        lambda: dict(plan),
        lambda: plan.entries.update({"l.weight": "int8"}),
    ):
        with pytest.raises((TypeError, AttributeError)):
            lose()


@pytest.mark.parametrize("format", ["int8", "int4", "int2", "fp16"])
def test_zeros_stay_zero(format):
    torch.manual_seed(0)
    model = nn.Linear(32, 32)
    pruned = torch.rand(32, 32) < 0.25
    with torch.no_grad():
        model.weight[pruned] = 0
    sensitivity = estimate(model, torch.randn(64, 8, 32).unbind())
    plain = {"weight": format}
    allocation = allocate(
        model, sensitivity, memory_mib=nbytes(model, plain) / 2**20, progress=False
    )
    kept = {"weight": WeightSpec(format, torch.rand(32, 32) < 0.1, "fp16")}
    for plan in (allocation, *(Plan(p, sensitivity.recipe) for p in (plain, kept)), plain):
        assert quantize(model, plan).weight[pruned].eq(0).all()


def test_a_file_keeps_zeros():
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight.tril_()
    plan = allocate(
        model, estimate(model, torch.randn(64, 8, 64).unbind()), file_mib=0.003, progress=False
    )
    assert quantize(model, plan).weight.triu(1).eq(0).all()


def test_a_prime_number_of_columns_falls_into_few_blocks():
    torch.manual_seed(0)
    model = nn.Linear(31, 8)
    x = torch.randn(256, 31) @ torch.randn(31, 31)
    known = [estimate(model, x.split(4), largest=largest) for largest in (16, 1)]
    assert known[0].curvature["weight"].shape == (2, 16, 16)
    off = [
        (quantize(model, Plan({"weight": "int3"}, each.recipe))(x) - model(x)).square().mean()
        for each in known
    ]
    assert off[0] < 0.9 * off[1]
    plan = allocate(model, known[0], memory_mib=300 / 2**20, progress=False)
    assert quantize(model, plan)(x).isfinite().all()


def test_a_position_embedding_has_a_channel_per_position(tmp_path):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 16, 6))

        def forward(self, x):
            return x + self.table

    model, path = Positions(), tmp_path / "a.safetensors"
    sensitivity = estimate(model, torch.randn(8, 2, 16, 6).unbind())
    assert sensitivity.curvature["table"].shape == (6, 6)
    plan = Plan({"table": WeightSpec("int4", torch.rand(1, 16, 6) < 0.1)}, sensitivity.recipe)
    small = quantize(model, plan)
    assert (small.table - model.table).abs().max() < 0.5
    save_quantized(path, small, model)
    assert torch.equal(load_quantized(path, Positions()).table, small.table)


def test_an_input_changed_in_place_is_not_the_callers():
    model, batches = Uses(lambda self, x: self.l(x.mul_(2))), BATCHES.clone()
    estimate(model, list(batches))
    empirical_fisher(model, ["l.weight"], [(batches[0], torch.zeros(2, 4))])
    tune(model, quantize(model, INT8), list(batches), 2)
    assert torch.equal(batches, BATCHES)


def test_a_forward_that_counts_leaves_the_model_as_it_was():
    model = linear()
    model.register_buffer("calls", torch.zeros(()))
    model.use = lambda self, x: (self.calls.add_(1), self.l(x))[1]
    sensitivity = estimate(model)
    assert model.calls == 0
    plan = allocate(model, sensitivity, memory_mib=60 / 2**20, progress=False)
    model(BATCHES[0])
    assert quantize(model, plan).calls == 1


def test_names_come_from_a_generator():
    assert set(estimate(linear(), names=(n for n in ("l.weight", "l.bias"))).fisher) == {
        "l.weight",
        "l.bias",
    }


def test_parameters_that_no_plan_can_name_are_left_out():
    model = linear()
    model.again, model.gru = model.l, nn.GRU(4, 4)
    model.empty = nn.Parameter(torch.empty(0, 4))
    model.whole = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
    model.free = nn.Linear(4, 4)
    model.use = lambda self, x: self.free(self.l(x))
    with pytest.warns(UserWarning) as told:
        sensitivity = estimate(model)
    assert set(sensitivity.fisher) == {"free.weight"}
    (words,) = (str(w.message) for w in told if "left out" in str(w.message))
    for why in ("l.weight is shared with again", "empty is empty", "whole is torch.int64"):
        assert why in words
    assert "gru.weight_ih_l0 is of a recurrent layer" in words
    plan = allocate(model, sensitivity, memory_mib=1.0, progress=False)
    assert quantize(model, plan)(BATCHES[0]).isfinite().all()


def test_sparse_gradients_count_as_dense_ones():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Embedding(4, 3), nn.Flatten()), [torch.arange(4)[:, None]] * 4
    expected = estimate(model, batches).fisher["0.weight"]
    model[0].sparse = True
    torch.testing.assert_close(estimate(model, batches).fisher["0.weight"], expected)


def test_a_sensitivity_of_a_half_model_is_good_for_its_float():
    model = linear()
    model.use = lambda self, x: self.l(x * 1e-4)
    sensitivity = estimate(copy.deepcopy(model).half(), [x.half() for x in BATCHES])
    expected = estimate(model)
    assert sensitivity.fisher["l.weight"].dtype == torch.float32
    torch.testing.assert_close(
        sensitivity.fisher["l.weight"], expected.fisher["l.weight"], rtol=0.02, atol=0
    )
    allocate(model, sensitivity, memory_mib=60 / 2**20, progress=False)


def test_a_path_may_begin_with_a_tilde_be_a_link_and_have_a_mode(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, target = linear(), tmp_path / "target.safetensors"
    save_quantized("~/target.safetensors", quantize(model, INT8), model)
    target.chmod(0o640)
    (tmp_path / "link").symlink_to(target)
    save_quantized("~/link", quantize(model, {"l.weight": "int4"}), model)
    assert (tmp_path / "link").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    small = load_quantized("~/link", model)
    assert torch.equal(small.l.weight, quantize(model, {"l.weight": "int4"}).l.weight)


def test_a_python_without_lzma_lacks_old_coded_files_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lzma", None)
    model, path = linear(), tmp_path / "a.safetensors"
    for compress in (False, True):
        save_quantized(path, quantize(model, INT8), model, compress=compress)
        load_quantized(path, model)
    with pytest.raises(ValueError, match="a file of this age needs Python's lzma"):
        entropy_coding.decode_lzma({}, {})
