import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from lafq.study import results, workspace
from lafq.study.diffusion import subject
from lafq.study.diffusion.subject import UNet, mnist, quantizable
from lafq.study.fisher_by_timestep import fisher_by_timestep
from lafq.study.images.evaluate import GREY_LEVELS, evaluate
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.rows import BASELINE, mask_sample, published_rows, uniform_rows
from lafq.study.workspace import Workspace, profile_parameters
from tools import verify

SMOKE, P = Workspace("smoke", keep=True), profile_parameters("smoke")
DRAW = Sampling(P["IMAGES"], P["SAMPLING_STEPS"], P["SEED"], P["SAMPLING_BATCH"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder with weights, the headline's and other tables, and their images."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("verify")
    draws = {"samples": P["FISHER_SAMPLES"], "bins": P["TIMESTEP_BINS"], "seed": P["SEED"]}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RESULTS", "BUILD"):
            patch.setattr(workspace, name, folder / name.lower())
        weights = dict(UNet(4).named_parameters())
        subject.save_weights(SMOKE, weights, width=4, seed=P["SEED"], **P["TRAINING"])
        model = subject.load_model(SMOKE, 4)
        images, names = mnist(train=True)[0], list(quantizable(model))
        fisher = fisher_by_timestep(model, names, images, **draws).by_weight
        subject.save_fisher(SMOKE, fisher, 4, **draws)
        published = published_rows(model, fisher, P["RATIOS"], P["THRESHOLDS"])
        tables = {
            "01_baseline": ([BASELINE], DRAW),
            "03_global": (uniform_rows(model), DRAW),
            "evidence_int4": ([BASELINE], DRAW._replace(images=6, batch=4)),
            verify.HEADLINE: (published, DRAW._replace(steps=P["ALL_STEPS"])),
        }
        for name, (rows, sampling) in tables.items():
            results.save_rows(SMOKE, name, *evaluate(SMOKE, model, rows, sampling))
        masks = mask_sample(model, published)
        workspace.save_arrays(SMOKE.results / f"{verify.MASKS}.npz", masks)
    return folder


@pytest.fixture
def made(tree, sandbox):
    """A copy of the tree in the workspace's place."""
    torch.set_num_threads(1)  # another number rounds Fisher values, and a tiny model's bytes, else
    shutil.copytree(tree, sandbox, dirs_exist_ok=True)


def failing():
    return [line.partition(":")[0] for holds, line in verify.checks(SMOKE) if holds is False]


@pytest.mark.slow
def test_all_that_is_right_holds(made, monkeypatch, capsys):
    lines = dict(reversed(check) for check in verify.checks(SMOKE))
    assert list(lines.values()) == [True] * 10 + [None]
    [drawn] = [line for line in lines if line.startswith("baseline")]
    assert "4 images drawn again, 0 of 255 grey levels" in drawn
    monkeypatch.setattr("sys.argv", ["tools.verify", "--profile", "smoke"])
    assert verify.main() == 0
    printed = capsys.readouterr().out
    assert "not checked: Inception scores of other tables" in printed
    assert printed.endswith("checks that failed: 0\n")


@pytest.mark.slow
def test_a_changed_number_flipped_masks_and_a_damaged_file_are_found(made, monkeypatch, capsys):
    table = workspace.load_table(SMOKE, "03_global")
    workspace.save_table(SMOKE, "03_global", table.assign(fid_mnist=table["fid_mnist"] + 0.1))
    masks = workspace.load_images(SMOKE, verify.MASKS)
    masks = {row: bits ^ np.uint8(row.startswith("ratio")) for row, bits in masks.items()}
    workspace.save_arrays(SMOKE.results / f"{verify.MASKS}.npz", masks)
    assert failing() == ["03_global.csv", "masks"]
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
        list(verify.checks(Workspace("paper")))


@pytest.mark.slow
def test_the_tolerance_is_below_one_flipped_image(made):
    row = next(workspace.load_table(SMOKE, "01_baseline").itertuples())
    kept = ImageStore(SMOKE).images(row.sample, 4).astype(int)
    assert np.abs(kept - kept[::-1]).mean() > GREY_LEVELS
