import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from lafq.quantization.checkpoint import save_quantized
from lafq.quantization.model import quantize
from lafq.study import results, workspace
from lafq.study.diffusion import subject
from lafq.study.diffusion.unet import UNet, quantizable
from lafq.study.images.evaluate import evaluate
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.rows import BASELINE, Row, uniform_rows
from lafq.study.workspace import Workspace, profile_parameters
from lafq.tensors import save_tensors
from tools import verify

SMOKE = Workspace("smoke", keep=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder with tables, their images, packed weights and the FP32 weights."""
    folder, model = tmp_path_factory.mktemp("verify"), UNet(4).eval()
    training = profile_parameters("smoke")["TRAINING"]
    weights = dict(model.named_parameters())
    save_tensors(folder / "weights.safetensors", weights, width=4, seed=0, **training)
    plan = dict.fromkeys(quantizable(model), "int4")
    packed = Row("allocate", "1 MiB", "coded", "channel", "feedback", plan, made={"rounding": "x"})
    tables = {
        "01_baseline": ([BASELINE], 8),
        "03_global": (uniform_rows(model), 8),
        "packed": ([packed], 8),
        "evidence_int4": ([BASELINE], 12),  # the same row with more images
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "RESULTS", folder / "results")
        for name, (rows, images) in tables.items():
            made = evaluate(SMOKE, model, rows, Sampling(images, 2, 0, 4))
            results.save_rows(SMOKE, name, *made)
        save_quantized(SMOKE.results / subject.PACKED, quantize(model, plan), model)
    return folder


@pytest.fixture
def made(tree, sandbox):
    """The path of the FP32 weights, beside a copy of all the rest."""
    shutil.copytree(tree, sandbox, dirs_exist_ok=True)
    return sandbox / "weights.safetensors"


def failing(weights=None):
    return [line for holds, line in verify.checks(SMOKE, weights) if holds is False]


@pytest.mark.slow
def test_all_that_is_right_holds(made, monkeypatch, capsys):
    lines = dict(reversed(check) for check in verify.checks(SMOKE, made))
    assert list(lines.values()) == [True] * 9 + [None]
    [packed] = [line for line in lines if line.startswith("packed weights")]
    assert "4 images drawn again, 0 of 255 grey levels" in packed
    monkeypatch.setattr("sys.argv", ["tools.verify", "--profile", "smoke"])
    assert verify.main() == 0
    printed = capsys.readouterr().out
    assert "not checked: rows drawn from the FP32 weights: give them with WEIGHTS=path" in printed
    assert printed.endswith("checks that failed: 0\n")


@pytest.mark.slow
def test_a_changed_number_a_damaged_file_and_other_weights_are_found(
    made, tiny, monkeypatch, capsys
):
    table = workspace.load_table(SMOKE, "03_global")
    workspace.save_table(SMOKE, "03_global", table.assign(fid_mnist=table["fid_mnist"] + 0.1))
    with torch.no_grad():
        tiny.out2.weight.mul_(0.5)
    save_quantized(SMOKE.results / subject.PACKED, quantize(tiny, {}), tiny)
    assert [line.partition(":")[0] for line in failing()] == ["03_global.csv", "packed weights"]
    next(ImageStore(SMOKE).folder.iterdir()).write_bytes(b"")
    monkeypatch.setattr("sys.argv", ["tools.verify", "--profile", "smoke"])
    assert verify.main() == 1
    assert "stopped: " in capsys.readouterr().err


def test_a_profile_that_keeps_no_images_is_compared_with_the_tables_before(sandbox):
    with pytest.raises(ValueError, match="nothing to compare with: `make reproduce PROFILE=smoke`"):
        failing()
    workspace.save_table(SMOKE, "03_global", pd.DataFrame({"fid_mnist": [90.0]}))
    verify.keep_aside(SMOKE)
    assert not failing()
    workspace.save_table(SMOKE, "03_global", pd.DataFrame({"fid_mnist": [91.0]}))
    assert len(failing()) == 1


def test_missing_images_of_a_profile_that_keeps_them(sandbox):
    with pytest.raises(ValueError, match="results/paper/samples is missing: `git checkout"):
        list(verify.checks(Workspace("paper"), None))


@pytest.mark.slow
def test_the_tolerance_is_below_one_flipped_image(made):
    row = next(workspace.load_table(SMOKE, "01_baseline").itertuples())
    kept = ImageStore(SMOKE).images(row.sample, 4).astype(int)
    assert np.abs(kept - kept[::-1]).mean() > verify.GREY_LEVELS
