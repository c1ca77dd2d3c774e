import math
import re

import nbformat
import pytest
import torch

from lafq.allocation import rules as thresholds
from lafq.fisher.sensitivity import estimate_sensitivity
from lafq.quantization.checks import channel_view
from lafq.quantization.model import quantize, resident_bytes
from lafq.study import workspace
from lafq.study.diffusion import ddpm
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.subject import save_weights
from lafq.study.diffusion.unet import UNet, layer_of, quantizable
from lafq.study.figures import explorer
from lafq.study.figures.explorer import Setting, Subject
from lafq.study.images.sampling import Sampling
from lafq.study.rows import rule_scores
from lafq.study.workspace import Workspace
from tools import pages, publish

SMOKE = Workspace("smoke")


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
        yield Subject(SMOKE, model, calibration, validation, Sampling(3, 2, 0))


@pytest.mark.parametrize("granularity", thresholds.GRANULARITIES)
@pytest.mark.parametrize("rule", explorer.OPTIONS["rule"])
def test_bytes_are_those_of_the_packed_model(subject, rule, granularity):
    outcome, model = subject.outcome(Setting(rule, 0.4, granularity, "int4")), subject.model
    stored = resident_bytes(quantize(model, outcome.plan))
    assert outcome.numbers["mem_mib"].item() * 2**20 == pytest.approx(stored, abs=0.1)
    weights = quantizable(model)
    bits = sum(outcome.by_tensor["bits_per_weight"] * [w.numel() for w in weights.values()])
    rest = sum(p.nbytes for n, p in model.named_parameters() if n not in weights)
    assert bits / 8 + rest == pytest.approx(stored)


def test_everything_kept_is_the_unquantized_model(subject):
    expected = ddpm.sample(subject.model, 3, 2, seed=0)[:, 0].numpy()
    assert (subject.digits == expected).all()
    for rule in explorer.OPTIONS["rule"]:
        outcome = subject.outcome(Setting(rule, 1.0, "weight", "int4"))
        assert not outcome.plan.entries
        assert (outcome.digits == expected).all()
        assert outcome.numbers[["kept_share", "damage", "mem_share"]].iloc[0].tolist() == [1, 0, 1]
    assert (subject.outcome(Setting("ratio", 0, "tensor", "int2")).digits != expected).any()


def test_predicted_damage_is_the_sum_over_all_channels(subject):
    expected = 0.0
    for name, w in quantizable(subject.model).items():
        rows = channel_view(subject.model, name)
        values, fisher = rows.of(w), rows.of(subject.validation.fisher[name]).double()
        scale = (values.abs().amax(1, keepdim=True) / 7).half().float()
        off = (values - (values / scale).round().clamp(-7, 7) * scale).double()
        curvature = subject.validation.curvature[name].double()
        together = torch.einsum("rc,cd,rd->r", off, curvature, off)
        expected += (fisher.mean(1) * together).sum().item() / 1024
    numbers = subject.outcome(Setting("global", 0, "tensor", "int4")).numbers
    assert numbers["damage"].item() == pytest.approx(expected, rel=1e-4)
    assert numbers["over_int8"].item() > 1


@pytest.mark.parametrize("rule", thresholds.RULES)
@pytest.mark.parametrize("granularity", thresholds.GRANULARITIES)
def test_the_share_asked_for_is_kept(subject, rule, granularity):
    axes = {f"Layer{i}.resample.weight": 1 for i in (4, 5, 6)}
    fisher = thresholds.by_granularity(subject.calibration.fisher, granularity, axes)
    scores = rule_scores(rule, fisher)
    keep = thresholds.keep_above(scores, explorer.threshold_of(scores, rule, 0.3))
    layers = {n: layer_of(n) if rule == "ratio" else "all" for n in keep}
    for layer in set(layers.values()):
        units = torch.cat([k.flatten() for n, k in keep.items() if layers[n] == layer])
        assert units.sum() == math.floor(0.3 * len(units) + 1e-9)
    outcome = subject.outcome(Setting(rule, 0.3, granularity, "int4"))
    kept = sum(
        k.sum() * subject.model.get_parameter(n).numel() / k.numel() for n, k in keep.items()
    )
    share = kept / sum(w.numel() for w in quantizable(subject.model).values())
    assert outcome.numbers["kept_share"].item() == pytest.approx(share.item())


OUTSIDE = r"is outside \[0, 1\]: a share kept, or of FP32's bytes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "best"}, "unknown rule 'best': choose one of global, .*, allocator"),
        ({"granularity": "layer"}, "unknown granularity 'layer': choose one of tensor, .*, weight"),
        ({"format": "int1"}, "unknown format 'int1': choose one of fp16, .*, int2"),
        ({"amount": 1.2}, f"amount 1.2 {OUTSIDE}"),
        ({"amount": math.nan}, f"amount nan {OUTSIDE}"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(subject, change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        subject.outcome(Setting()._replace(**change))


def test_the_allocator_keeps_to_the_size_and_names_the_smallest(subject):
    sizes = [
        subject.outcome(Setting("allocator", share, "channel")).numbers["mem_share"].item()
        for share in (0.3, 0.5)
    ]
    assert 0.2 < sizes[0] <= 0.3 < sizes[1] <= 0.5
    with pytest.raises(ValueError, match="cannot be met: the smallest possible is"):
        subject.outcome(Setting("allocator", 0.01, "channel"))


def test_the_picture_follows_the_sliders(subject, capsys):
    first = subject.outcome(Setting("ratio", 0.1, "weight", "int3"))
    capsys.readouterr()
    panel = explorer.panel(subject, first)
    (rule, amount), (granularity, low) = (row.children for row in panel.children[:2])
    words, picture = panel.children[2:]
    before = words.value, picture.value
    stored = re.search(r"MiB stored</th>\s*<td>([\d.]+)</td>", words.value)[1]
    assert stored == f"{first.numbers['mem_mib'].item():.2f}"
    assert picture.value == explorer.png(subject, first)
    amount.value = 0.5
    assert words.value != before[0]
    assert picture.value != before[1]
    amount.value = 0.1
    assert (words.value, picture.value) == before
    granularity.value, low.value, rule.value = "channel", "int4", "allocator"
    assert (amount.description, low.disabled) == ("size", True)
    drawn = picture.value
    amount.value = 0.02
    assert "cannot be met: the smallest possible is" in words.value
    assert picture.value == drawn
    assert capsys.readouterr() == ("", "")


def test_only_the_weights_are_needed(tiny, sandbox):
    with pytest.raises(FileNotFoundError, match="train anew with TRAIN=1"):
        explorer.subject(SMOKE, 4, Sampling(2, 2, 0), samples=8)
    save_weights(SMOKE, tiny.state_dict(), width=4)
    subject = explorer.subject(SMOKE, 4, Sampling(2, 2, 0), samples=8)
    calibration, validation = subject.calibration.fisher, subject.validation.fisher
    assert set(quantizable(tiny)) == set(calibration) < set(validation)
    assert any((f != validation[n]).any() for n, f in calibration.items())
    assert subject.digits.shape == (2, 32, 32)
    for count, sampling, message in (
        (0, (2, 2, 0), "at least one sample"),
        (8, (0, 2, 0), "0 images"),
        (8, (2, 0, 0), "0 sampling steps"),
    ):
        with pytest.raises(ValueError, match=message):
            explorer.subject(SMOKE, 4, Sampling(*sampling), samples=count).outcome(Setting())


def test_no_widget_is_written_to_a_notebook(tmp_path):
    path = tmp_path / "x.ipynb"
    seen = nbformat.v4.new_output("display_data", {"image/png": "", "text/plain": "figure"})
    data = {publish.WIDGET: {"model_id": "1"}, "text/plain": "VBox()"}
    widget = nbformat.v4.new_output("execute_result", data, execution_count=1)
    cell = nbformat.v4.new_code_cell("x", outputs=[seen, widget], execution_count=1)
    publish.clean(path, nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {"state": {}}}))
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].outputs == [seen]
    assert "widgets" not in notebook.metadata


def test_the_explorer_runs_last_and_those_beyond_the_poster_before_it():
    names = [path.stem for path in pages.notebooks()]
    assert (names[0], names[-4:]) == ("01_train", ["budget", "damage", "files", "explore"])
    assert [path.stem for path in pages.notebooks("bud")] == ["budget"]
