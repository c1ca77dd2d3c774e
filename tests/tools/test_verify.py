import numpy as np
import pandas as pd
import pytest
import torch

from lafq.quantization.checkpoint import save_quantized
from lafq.quantization.model import quantize
from lafq.study import results, workspace
from lafq.study import rows as study_rows
from lafq.study.diffusion import subject
from lafq.study.diffusion.unet import quantizable
from lafq.study.images import evaluate as evaluation
from lafq.study.images import sampling
from lafq.study.images.sampling import ImageStore
from lafq.study.rows import BASELINE, Row
from lafq.study.workspace import Workspace, profile_parameters
from lafq.tensors import save_tensors
from tools import verify

SMOKE = Workspace("smoke", keep=True)
SAMPLING = sampling.Sampling(8, 2, 0, 4)


@pytest.fixture
def made(tiny, sandbox, monkeypatch):
    p = profile_parameters("smoke")
    path = SMOKE.results / subject.WEIGHTS
    save_tensors(path, dict(tiny.named_parameters()), width=4, seed=0, **p["TRAINING"])
    path.rename(sandbox / "weights.safetensors")
    baseline = BASELINE
    plan = dict.fromkeys(quantizable(tiny), "int4")
    tables = {
        "01_baseline": [baseline],
        "03_global": study_rows.uniform_rows(tiny),
        "packed": [
            Row("allocate", "1 MiB", "coded", "channel", "feedback", plan, made={"rounding": "x"})
        ],
    }
    for name, rows in tables.items():
        results.save_rows(SMOKE, name, *evaluation.evaluate(SMOKE, tiny, rows, SAMPLING))
    # The same row with more images.
    results.save_rows(
        SMOKE,
        "evidence_int4",
        *evaluation.evaluate(SMOKE, tiny, [baseline], SAMPLING._replace(images=12)),
    )
    save_quantized(SMOKE.results / subject.PACKED, quantize(tiny, plan), tiny)
    return sandbox / "weights.safetensors"


def lines(*found):
    return [line for holds, line in found if holds is False]


@pytest.mark.slow
def test_all_that_is_right_holds(made, monkeypatch, capsys):
    found = list(verify.checks(SMOKE, made))
    assert [holds for holds, _ in found] == [True] * 9 + [None]
    assert "8 images drawn again at 2 steps differ by 0 of 255" in found[5][1]
    without = list(verify.checks(SMOKE, None))
    assert (
        next(line for holds, line in without if holds is None)
        == "rows drawn from the FP32 weights: give them with WEIGHTS=path"
    )
    monkeypatch.setattr("sys.argv", ["tools.verify", "--profile", "smoke"])
    assert verify.main() == 0
    assert capsys.readouterr().out.endswith("verify, profile smoke: all that was checked holds\n")


@pytest.mark.slow
def test_a_changed_number_a_damaged_file_and_other_weights_are_found(
    made, tiny, monkeypatch, capsys
):
    table = workspace.load_table(SMOKE, "03_global")
    workspace.save_table(SMOKE, "03_global", table.assign(fid_mnist=table["fid_mnist"] + 0.1))
    assert ["03_global.csv" in line for line in lines(*verify.checks(SMOKE, None))] == [True]
    workspace.save_table(SMOKE, "03_global", table)
    with torch.no_grad():
        tiny.out2.weight.mul_(0.5)
    save_quantized(SMOKE.results / subject.PACKED, quantize(tiny, {}), tiny)
    assert [
        "packed weights: 8 images drawn again" in line
        for line in lines(*verify.checks(SMOKE, None))
    ] == [True]
    next(ImageStore(SMOKE).folder.iterdir()).write_bytes(b"")
    monkeypatch.setattr("sys.argv", ["tools.verify", "--profile", "smoke"])
    assert verify.main() == 1
    assert "FAILED: " in capsys.readouterr().out


def test_a_profile_that_keeps_no_images_is_compared_with_the_tables_before(sandbox):
    with pytest.raises(ValueError, match="nothing to compare with: `make reproduce PROFILE=smoke`"):
        list(verify.checks(SMOKE, None))
    workspace.save_table(SMOKE, "03_global", pd.DataFrame({"fid_mnist": [90.0]}))
    verify.keep_aside(SMOKE)
    assert [holds for holds, _ in verify.checks(SMOKE, None)] == [True]
    workspace.save_table(SMOKE, "03_global", pd.DataFrame({"fid_mnist": [91.0]}))
    assert [holds for holds, _ in verify.checks(SMOKE, None)] == [False, False]


def test_missing_images_of_a_profile_that_keeps_them(sandbox):
    with pytest.raises(ValueError, match="results/paper/samples is missing: `git checkout"):
        list(verify.checks(Workspace("paper"), None))


@pytest.mark.slow
def test_the_tolerance_is_below_one_flipped_image(made):
    row = next(workspace.load_table(SMOKE, "01_baseline").itertuples())
    kept = ImageStore(SMOKE).images(row.sample, 4).astype(int)
    assert np.abs(kept - kept[::-1]).mean() > verify.GREY_LEVELS
