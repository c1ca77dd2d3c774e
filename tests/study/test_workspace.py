import subprocess
import sys

import dask.system
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from lafq.study import workspace
from lafq.study.workspace import Workspace, compute_on, kind_of_machine, profile_parameters

SMOKE = Workspace("smoke")


def test_an_unknown_device_is_named():
    with pytest.raises(ValueError, match="DEVICE is 'tpu': choose one of auto, cpu, cuda"):
        compute_on(1, "tpu")


@pytest.mark.parametrize(
    ("cores", "threads", "printed"),
    [(1, 1, "threads: 1 instead of 2, one per available core\n"), (4, 2, "")],
)
def test_threads_are_at_most_the_cores(monkeypatch, capsys, cores, threads, printed):
    monkeypatch.setattr(dask.system, "CPU_COUNT", cores)
    compute_on(2, "cpu")
    assert torch.get_num_threads() == threads
    assert capsys.readouterr().out == printed


def test_a_machine_is_described_by_what_decides_the_bits_of_an_image(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert f"1 threads, torch {torch.__version__}" in kind_of_machine()
    torch.set_num_threads(2)
    assert "2 threads" in kind_of_machine()


def test_a_table_is_read_back_as_it_was_written(sandbox):
    table = pd.DataFrame({"threshold": ["0.350", "all"], "fid": [1 / 3, float("nan")]})
    with pytest.raises(FileNotFoundError, match="`make reproduce PROFILE=smoke` makes it"):
        workspace.load_table(SMOKE, "table")
    assert workspace.load_optional(SMOKE, "table") is None
    workspace.save_table(SMOKE, "table", table)
    expected = table.assign(fid=[0.333333, float("nan")])
    pd.testing.assert_frame_equal(workspace.load_table(SMOKE, "table"), expected)


def test_a_table_is_made_only_where_the_workspace_computes(sandbox):
    made = workspace.compute_or_load(
        Workspace("smoke", compute=True), "table", lambda: pd.DataFrame({"a": [1]})
    )
    loaded = workspace.compute_or_load(SMOKE, "table", lambda: pytest.fail("made again"))
    pd.testing.assert_frame_equal(made, loaded)


def test_images_are_read_back_as_they_were_written(sandbox):
    images = {"a": np.arange(2048, dtype=np.uint8).reshape(2, 32, 32)}
    workspace.save_arrays(SMOKE.results / "images.npz", images)
    [(key, read)] = workspace.load_images(SMOKE, "images").items()
    assert key == "a"
    np.testing.assert_array_equal(read, images["a"])


def test_equal_figures_are_equal_bytes(sandbox):
    def saved():
        figure, ax = plt.subplots()
        ax.plot([1, 2])
        workspace.save_figure(SMOKE, "figure", figure, "a note")
        plt.close(figure)
        return [(SMOKE.figures / f"figure.{suffix}").read_bytes() for suffix in ("png", "svg")]

    assert saved() == saved()


@pytest.mark.parametrize("profile", ["small", "paper"])
def test_figures_name_the_width_of_their_profile(profile):
    assert workspace.MODELS[profile] == f"width {profile_parameters(profile)['WIDTH']}"


def test_figures_are_imported_only_where_one_is_drawn():
    code = "import lafq.study.workspace, sys; print('matplotlib' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert answer == "False\n"
