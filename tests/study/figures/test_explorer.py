import math
import re

import nbformat
import pytest
import torch

from lafq.allocation import rules as thresholds
from lafq.fisher.sensitivity import estimate_sensitivity
from lafq.quantization.checks import channel_view
from lafq.quantization.model import nbytes, quantize, resident_bytes
from lafq.study import poster, workspace
from lafq.study import rows as study_rows
from lafq.study.diffusion import ddpm
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.unet import UNet, quantizable
from lafq.study.figures import explorer
from lafq.study.figures.explorer import Setting
from lafq.study.images.sampling import Sampling
from lafq.study.workspace import Workspace
from lafq.tensors import save_tensors
from tools import pages, publish

SMOKE = Workspace("smoke")

RULES = [rule for rule in explorer.RULES if rule != "allocator"]


@pytest.fixture(scope="module")
def subject(digits, tmp_path_factory):
    torch.manual_seed(0)
    model = UNet(4).eval()
    calibration, validation = (
        estimate_sensitivity(
            model, noised_batches(digits, 16, seed=i), i, list(quantizable(model)), shrink=False
        )
        for i in (0, 1)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "BUILD", tmp_path_factory.mktemp("build"))
        yield explorer.subject_of(SMOKE, model, calibration, validation, Sampling(3, 2, 0))


@pytest.mark.parametrize("granularity", thresholds.GRANULARITIES)
@pytest.mark.parametrize("rule", explorer.RULES)
def test_bytes_are_those_of_the_packed_model(subject, rule, granularity):
    found = explorer.outcome(subject, Setting(rule, 0.4, granularity, "int4"))
    packed = quantize(subject.model, found.plan)
    assert found.nbytes == nbytes(subject.model, found.plan) == resident_bytes(packed)
    bits = sum(
        found.by_tensor["bits_per_weight"]
        * [w.numel() for w in quantizable(subject.model).values()]
    )
    rest = sum(
        p.nbytes for n, p in subject.model.named_parameters() if n not in subject.calibration.fisher
    )
    assert bits / 8 + rest == pytest.approx(found.nbytes)


def test_everything_kept_is_the_unquantized_model(subject):
    expected = ddpm.sample(subject.model, 3, 2, seed=0)[:, 0].numpy()
    assert (subject.digits == expected).all()
    for rule in (*RULES, "allocator"):
        found = explorer.outcome(subject, Setting(rule, 1.0, "weight", "int4"))
        assert found.plan == {}
        assert (found.digits == expected).all()
        assert (found.kept, found.damage, found.nbytes) == (1, 0, nbytes(subject.model, {}))
    assert (
        explorer.outcome(subject, Setting("ratio", 0, "tensor", "int2")).digits != expected
    ).any()


def test_predicted_damage_is_the_sum_over_all_channels(subject):
    expected = 0.0
    for name, w in quantizable(subject.model).items():
        rows = channel_view(subject.model, name)
        values, fisher = rows.of(w), rows.of(subject.validation.fisher[name]).double()
        scale = (values.abs().amax(1, keepdim=True) / 7).half().float()
        off = (values - (values / scale).round().clamp(-7, 7) * scale).double()
        together = torch.einsum(
            "rc,cd,rd->r", off, subject.validation.curvature[name].double(), off
        )
        expected += (fisher.mean(1) * together).sum().item() / 1024
    assert explorer.outcome(
        subject, Setting("global", 0, "tensor", "int4")
    ).damage == pytest.approx(expected, rel=1e-4)
    assert subject.int8 < expected


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("granularity", thresholds.GRANULARITIES)
def test_the_share_asked_for_is_kept(subject, rule, granularity):
    axes = {f"Layer{i}.resample.weight": 1 for i in (4, 5, 6)}
    scores = thresholds.by_granularity(subject.calibration.fisher, granularity, axes)
    words, keep = explorer.kept(scores, rule, 0.3)
    counts = {n: (int(k.sum()), k.numel()) for n, k in keep.items()}
    layers = {n: thresholds.layer_of(n) if rule == "ratio" else "all" for n in counts}
    for layer in set(layers.values()):
        kept, units = (sum(c[i] for n, c in counts.items() if layers[n] == layer) for i in (0, 1))
        assert kept == math.floor(0.3 * units + 1e-9)
    if rule == "group":
        factor = float(words.split()[-1])
        means = study_rows.group_means(scores)
        own = {n: s >= factor * means[poster.group_of(n)] for n, s in scores.items()}
        # The threshold is written with three digits: a few may lie between.
        assert (
            sum(int((own[n] != keep[n]).sum()) for n in keep)
            <= 0.01 * sum(k.numel() for k in keep.values()) + 1
        )


def test_equal_settings_give_equal_pictures(subject):
    setting = Setting("mean_std", 0.2, "channel", "int3")
    pictures = [
        explorer.png(subject, explorer.outcome(subject, s))
        for s in (setting, setting, setting._replace(amount=0.6))
    ]
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rule": "best"},
            "unknown rule 'best': choose one of global, group, mean_std, ratio, allocator",
        ),
        (
            {"granularity": "layer"},
            "unknown granularity 'layer': choose one of tensor, channel, weight",
        ),
        (
            {"format": "int1"},
            "unknown format 'int1': choose one of fp16, int8, int6, int4, int3, int2",
        ),
        (
            {"amount": 1.2},
            "amount 1.2 is outside [0, 1]: it is the share that is kept, or the share of FP32's "
            "bytes",
        ),
        (
            {"amount": math.nan},
            "amount nan is outside [0, 1]: it is the share that is kept, or the share of FP32's "
            "bytes",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(subject, change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        explorer.outcome(subject, Setting()._replace(**change))


def test_the_allocator_keeps_to_the_size_and_names_the_smallest(subject):
    subject = subject._replace(fronts={})
    full = nbytes(subject.model, {})
    sizes = [
        explorer.outcome(subject, Setting("allocator", share, "channel")).nbytes / full
        for share in (0.3, 0.5)
    ]
    assert 0.2 < sizes[0] <= 0.3 < sizes[1] <= 0.5
    with pytest.raises(ValueError, match="cannot be met: the smallest possible is"):
        explorer.outcome(subject, Setting("allocator", 0.01, "channel"))
    assert list(subject.fronts) == ["channel"]


@pytest.mark.slow
def test_the_picture_follows_the_sliders(subject, capsys):
    first = explorer.outcome(subject, Setting("ratio", 0.1, "weight", "int3"))
    capsys.readouterr()
    format_table = explorer.panel(subject, first)
    (rule, amount), (granularity, low) = (row.children for row in format_table.children[:2])
    text, picture = format_table.children[2:]
    before = text.value, picture.value
    assert f"stored {first.nbytes / 2**20:.2f} of" in text.value
    assert picture.value == explorer.png(subject, first)
    amount.value = 0.5
    assert text.value != before[0]
    assert picture.value != before[1]
    amount.value = 0.1
    assert (text.value, picture.value) == before
    granularity.value, low.value, rule.value = "channel", "int4", "allocator"
    assert (amount.description, low.disabled) == ("size", True)
    drawn = picture.value
    amount.value = 0.02
    assert "cannot be met: the smallest possible is" in text.value
    assert picture.value == drawn
    assert capsys.readouterr() == ("", "")


def test_only_the_weights_are_needed(tiny, sandbox, capsys):
    with pytest.raises(FileNotFoundError, match="run 01_train with TRAIN=1 first"):
        explorer.subject(SMOKE, 4, Sampling(2, 2, 0), samples=8)
    save_tensors(SMOKE.results / "ema.safetensors", tiny.state_dict(), width=4)
    found = explorer.subject(SMOKE, 4, Sampling(2, 2, 0), samples=8)
    assert "from 8 digits; damage" in capsys.readouterr().out
    assert set(quantizable(tiny)) < set(found.calibration.fisher)
    assert any((f != found.validation.fisher[n]).any() for n, f in found.calibration.fisher.items())
    assert found.digits.shape == (2, 32, 32)
    for count, sampling, message in (
        (0, (2, 2, 0), "from 0 digits"),
        (8, (0, 2, 0), "0 images"),
        (8, (2, 0, 0), "0 sampling steps"),
    ):
        with pytest.raises(ValueError, match=message):
            explorer.subject(SMOKE, 4, Sampling(*sampling), samples=count)


def test_no_widget_is_written_to_a_notebook(tmp_path):
    path = tmp_path / "x.ipynb"
    seen = nbformat.v4.new_output("display_data", {"image/png": "", "text/plain": "figure"})
    widget = nbformat.v4.new_output(
        "execute_result",
        {publish.WIDGET: {"model_id": "1"}, "text/plain": "VBox()"},
        execution_count=1,
    )
    cell = nbformat.v4.new_code_cell("x", outputs=[seen, widget], execution_count=1)
    publish.clean(path, nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {"state": {}}}))
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].outputs == [seen]
    assert "widgets" not in notebook.metadata


def test_the_explorer_runs_last():
    names = [path.stem for path in pages.notebooks()]
    assert (names[0], names[-1]) == ("01_train", pages.EXPLORER)
