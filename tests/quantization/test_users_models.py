"""What ordinary networks of other people do: modes, flags, tied and renamed weights, outputs of
other types.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lafq import (
    allocate,
    dequantize,
    estimate_sensitivity,
    load_quantized,
    quantize,
    save_quantized,
)
from lafq.fisher.empirical import empirical_fisher
from lafq.quantization.channels import WeightSpec
from lafq.quantization.model import dequantize_, nbytes, resident_bytes, weights_sha256
from lafq.quantization.plan import Recipe
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


def test_an_unused_parameter_has_no_fisher_information_and_can_be_allocated():
    torch.manual_seed(0)
    model = Output(lambda y: y)
    sensitivity = estimate_sensitivity(model, torch.randn(64, 4).split(4))
    assert sensitivity.fisher["linear.weight"].min() > 0
    assert sensitivity.fisher["unused.weight"].eq(0).all()
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
    with pytest.raises(
        ValueError, match="stands in the place of the model: check the order of the arguments"
    ):
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
