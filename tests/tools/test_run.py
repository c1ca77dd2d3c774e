import os
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from lafq.allocation.rules import by_granularity, keep_above
from lafq.quantization.model import nbytes
from lafq.quantization.plan import make_plan
from lafq.study import results, workspace
from lafq.study import rows as study_rows
from lafq.study.diffusion import subject
from lafq.study.diffusion.unet import UNet, quantizable
from lafq.study.images import evaluate as evaluation
from lafq.study.images import sampling
from lafq.study.rows import BASELINE, KEY, Row, sizes
from lafq.study.workspace import Workspace, profile_parameters
from tools import run
from tools.pages import notebooks

SMOKE = Workspace("smoke")


def lafq_run(*arguments):
    command = [sys.executable, "-m", "tools.run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=workspace.ROOT, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["reproduce", "--profile", "huge"],
            "unknown profile 'huge': choose one of mini, paper, smoke",
        ),
        (
            ["reproduce", "--profile", "smoke", "--set", "IMAGE=3"],
            "unknown parameter IMAGE: the notebooks declare",
        ),
        (
            ["reproduce", "--profile", "smoke", "--set", "IMAGES=0"],
            "IMAGES is 0: it must be at least 1",
        ),
        (
            ["reproduce", "--profile", "smoke", "--set", "IMAGES=abc"],
            "IMAGES is 'abc': it must be of type int",
        ),
        (
            ["reproduce", "--profile", "smoke", "--set", "IMAGES=2.5"],
            "IMAGES is 2.5: it must be of type int",
        ),
        (
            ["reproduce", "--profile", "smoke", "--set", "IMAGES=true"],
            "IMAGES is True: it must be of type int",
        ),
        (
            ["reproduce", "--profile", "smoke", "--set", "SEED=-1"],
            "SEED is -1: it must be at least 0",
        ),
        (
            ["reproduce", "--profile", "smoke", "--set", "RATIOS=[0.3, 1.2]"],
            "RATIOS has 1.2, which is out of range",
        ),
        (
            ["reproduce", "--profile", "smoke", "--set", "RATIOS=[]"],
            "RATIOS is []: it must have at least one value",
        ),
        (
            ["reproduce", "--profile", "smoke", "--set", "TRAINING=3"],
            "TRAINING is 3: it must be of type dict",
        ),
        (
            ["reproduce", "--profile", "smoke", "--set", "TRAINING={steps: 5}"],
            "TRAINING is {'steps': 5}: it must name batch_size too",
        ),
        (
            ["reproduce", "--profile", "smoke", "--set", "PUBLISHED={steps: 0, ratios: [0.3]}"],
            "PUBLISHED.steps is 0: it must be at least 1",
        ),
        (
            ["reproduce", "--profile", "smoke", "--set", "DEVICE=1"],
            "DEVICE is 1: it must be of type str",
        ),
        (
            ["reproduce", "--profile", "smoke", "--set", "IMAGES"],
            "--set 'IMAGES' is not NAME=VALUE",
        ),
        (
            ["reproduce", "--profile", "smoke", "--set", "RATIOS=["],
            "--set 'RATIOS=[' is not NAME=VALUE",
        ),
        (
            ["reproduce", "--profile", "../profiles/smoke"],
            "unknown profile '../profiles/smoke': choose one of mini, paper, smoke",
        ),
        (["resume", "--profile", "smoke", "--only", "99"], "no notebook's name begins with '99'"),
    ],
)
def test_bad_input_stops_before_anything_is_touched(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tools.run", *arguments])
    assert run.main() == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("profile", ["smoke", "mini", "paper"])
def test_profiles_fit_what_the_notebooks_declare(profile):
    parameters = run.check(profile, {"COMPUTE": False}, notebooks())
    assert parameters["PROFILE"] == profile
    assert run.check(profile, {"RATIO": 1, "INCEPTION_REFERENCE": 0}, notebooks())["RATIO"] == 1


def test_a_folder_that_cannot_be_written_stops_before_any_work(sandbox, monkeypatch, capsys):
    workspace.RESULTS.write_text("a file in the folder's place")
    monkeypatch.setattr(sys, "argv", ["tools.run", "reproduce", "--profile", "smoke"])
    monkeypatch.setattr(run.papermill, "execute_notebook", None)
    assert run.main() == 1
    said = capsys.readouterr().err
    assert str(workspace.RESULTS) in said
    assert len(said.strip().splitlines()) == 1


def run_notebook(folder, source):
    """Reproduce with one notebook in the place of 01_train, whose second cell is `source`."""
    parameters = nbformat.v4.new_code_cell("COMPUTE = False", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(source)])
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    (folder / "notebooks").mkdir()
    nbformat.write(notebook, folder / "notebooks" / "01_train.ipynb")
    # A shell starts a background command with SIGINT ignored, which its children inherit.
    program = f"""
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from lafq.study import workspace
from tools import run
folder = Path({str(folder)!r})
workspace.NOTEBOOKS, workspace.RESULTS, workspace.BUILD = folder / "notebooks", folder / "results", folder / "build"
run.check = lambda *_: {{"COMPUTE": True, "TRAIN": False}}
sys.argv = ["tools.run", "reproduce", "--profile", "smoke", "--only", "01"]
sys.exit(run.main())
"""
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=workspace.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_ctrl_c_names_resume_and_ends_the_notebook(tmp_path):
    source = """
import os, signal, threading
open("pid", "w").write(str(os.getpid()))
os.kill(os.getppid(), signal.SIGINT)
threading.Event().wait()
"""
    done = run_notebook(tmp_path, source)
    assert done.returncode == 130
    assert (
        done.stderr
        == "\ninterrupted: what was finished is kept, and `make resume` goes on from here\n"
    )
    assert not psutil.pid_exists(int((tmp_path / "notebooks" / "pid").read_text()))


@pytest.mark.slow
def test_a_dead_notebook_process_names_memory_and_resume(tmp_path):
    done = run_notebook(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "stopped: the notebook's process died, most likely for want of memory"
    )
    assert done.stderr.endswith("then `make resume` goes on from here\n")
    assert len(done.stderr.splitlines()) == 1


def test_a_damaged_record_of_the_last_run(sandbox, monkeypatch, capsys):
    (workspace.BUILD / run.LAST).parent.mkdir(parents=True)
    (workspace.BUILD / run.LAST).write_text("{")
    monkeypatch.setattr(sys, "argv", ["tools.run", "resume"])
    assert run.main() == 1
    assert "last_run.json is damaged: delete it" in capsys.readouterr().err


@pytest.mark.slow
def test_the_exit_status_of_a_process_with_bad_input():
    done = lafq_run("reproduce", "--profile", "huge")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "stopped: unknown profile 'huge': choose one of mini, paper, smoke\n"


@pytest.fixture
def cached_samples(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    original = sampling.sample
    monkeypatch.setattr(sampling, "sample", counted)
    return calls


def evaluate(model, candidates, **changes):
    return evaluation.evaluate(
        SMOKE, model, candidates, sampling.Sampling(3, 2, 0)._replace(**changes)
    )


@pytest.mark.slow
def test_equal_plans_are_sampled_once_and_finished_rows_not_again(sandbox, cached_samples, tiny):
    fp16 = dict.fromkeys(quantizable(tiny), "fp16")
    rows = [
        BASELINE,
        Row("ratio", "0.00", "fp16", "weight", "nearest", fp16),
        *study_rows.uniform_rows(tiny, ("fp16",)),
    ]
    table, images = evaluate(tiny, rows)
    assert len(cached_samples) == 2
    assert len(images) == 2
    assert table["mem_mib"].iloc[1] == table["mem_mib"].iloc[2] == nbytes(tiny, fp16) / 2**20
    assert table["fid_inception"].isna().all()
    again, _ = evaluate(tiny, rows)
    assert len(cached_samples) == 2
    pd.testing.assert_frame_equal(table, again)
    evaluate(tiny, rows[:1], seed=1)
    assert len(cached_samples) == 3


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on_where_it_was(sandbox, tiny, monkeypatch):
    rows = [BASELINE, *study_rows.uniform_rows(tiny)]
    whole, _ = evaluate(tiny, rows)
    shutil.rmtree(workspace.BUILD)
    calls = []

    def killed_at_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = sampling.sample
    monkeypatch.setattr(sampling, "sample", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny, rows)
    resumed, _ = evaluate(tiny, rows)
    assert len(calls) == 4
    pd.testing.assert_frame_equal(whole, resumed)


@pytest.mark.parametrize("gpu", [True, False])
def test_without_a_profile_it_is_mini_also_beside_a_gpu(gpu, sandbox, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(sys, "argv", ["tools.run", "reproduce"])
    monkeypatch.setattr(run, "check", lambda *_: {})
    asked = {}
    monkeypatch.setattr(run, "execute", lambda profile, *_, **__: asked.update(profile=profile))
    assert run.main() == 0
    assert asked["profile"] == "mini"


def test_paper_without_its_weights_refuses_in_one_sentence(sandbox, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tools.run", "reproduce", "--profile", "paper"])
    assert run.main() == 1
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert (
        "results/paper/ema.safetensors are missing: give a file that has them with WEIGHTS=path, "
        "or train them anew with TRAIN=1" in said
    )
    assert not workspace.BUILD.exists()


def weights_file(path, width=4, **changes):
    training = profile_parameters("smoke")["TRAINING"] | changes
    subject.save_tensors(
        path, dict(UNet(width).named_parameters()), width=width, seed=0, **training
    )


def test_weights_are_taken_from_a_path(sandbox):
    weights_file(sandbox / "own.safetensors")
    training = profile_parameters("smoke")["TRAINING"]
    subject.take_weights(SMOKE, sandbox / "own.safetensors", 4, 0, training)
    assert subject.load_model(SMOKE, 4).width == 4
    subject.check_weights(SMOKE, 4, 0, training)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 8}, "trained with width=8, profile smoke has 4"),
        ({"steps": 7}, "trained with steps=7, profile smoke has 12"),
    ],
)
def test_weights_of_another_width_or_training_are_refused(sandbox, changes, message):
    weights_file(sandbox / "own.safetensors", **changes)
    with pytest.raises(
        ValueError, match=f"{message}: give the weights of this profile with WEIGHTS=path"
    ):
        subject.take_weights(
            SMOKE, sandbox / "own.safetensors", 4, 0, profile_parameters("smoke")["TRAINING"]
        )
    assert not (SMOKE.results / subject.WEIGHTS).exists()


def test_a_bad_plan_stops_before_sampling(sandbox, cached_samples, tiny):
    good = BASELINE
    with pytest.raises(ValueError, match="unknown format 'int1'"):
        evaluate(tiny, [good, Row("x", "", "int1", "tensor", "nearest", {"inp.weight": "int1"})])
    with pytest.raises(ValueError, match="0 images asked for"):
        evaluate(tiny, [good], images=0)
    with pytest.raises(ValueError, match=r"ratio 1.2 is outside \[0, 1\]"):
        study_rows.ratio_rows(
            {n: w**2 for n, w in quantizable(tiny).items()}, [0.3, 1.2], [], ["fp16"]
        )
    assert not cached_samples


def test_sweep_and_nearest(tiny):
    scores = {n: w.square() for n, w in quantizable(tiny).items()}
    table = study_rows.size_sweep(tiny, scores, "int8", "weight", 20)
    assert table["kept_share"].iloc[0] == 0
    assert table["kept_share"].iloc[-1] == 1
    assert table["kept_share"].is_monotonic_increasing
    assert table["mem_share"].iloc[-1] == 1
    chosen = study_rows.nearest_size(table, 0.5)
    assert abs(chosen["mem_share"].item() - 0.5) == (table["mem_share"] - 0.5).abs().min()
    [row] = study_rows.threshold_rows("global", scores, chosen)
    assert nbytes(tiny, row.plan) / 2**20 == chosen["mem_mib"].item()


@pytest.mark.parametrize("granularity", ["tensor", "weight"])
@pytest.mark.parametrize("low", ["fp16", "int8"])
def test_sizes_counted_are_those_of_the_plans(tiny, low, granularity):
    scores = by_granularity({n: w.square() for n, w in quantizable(tiny).items()}, granularity)
    table = study_rows.size_sweep(tiny, scores, low, granularity, 20)
    made = [make_plan(keep_above(scores, cut), low) for cut in table["threshold"]]
    pd.testing.assert_frame_equal(
        table[["kept_share", "mem_mib", "mem_share"]], sizes(tiny, made), check_exact=True
    )


def test_missing_and_foreign_weights(sandbox):
    with pytest.raises(FileNotFoundError, match="run 01_train with TRAIN=1 first"):
        subject.load_model(SMOKE, 4)
    with pytest.raises(FileNotFoundError, match="run 02_fisher"):
        subject.load_fisher(SMOKE, 4)
    subject.save_tensors(SMOKE.results / subject.WEIGHTS, dict(UNet(4).named_parameters()), width=4)
    with pytest.raises(ValueError, match="width=4, not 16"):
        subject.load_model(SMOKE, 16)
    assert subject.load_model(SMOKE, 4).width == 4


def test_fisher_of_other_weights_is_refused(sandbox):
    path = SMOKE.results / subject.WEIGHTS
    subject.save_tensors(path, dict(UNet(4).named_parameters()), width=4)
    subject.save_fisher(SMOKE, {"a": torch.ones(2)}, 4)
    assert subject.load_fisher(SMOKE, 4)["a"].tolist() == [1, 1]
    subject.save_tensors(path, dict(UNet(4).named_parameters()), width=4)
    with pytest.raises(
        ValueError, match=r"fisher.safetensors was made with weights=.* run 02_fisher"
    ):
        subject.load_fisher(SMOKE, 4)


def test_set_up_refuses():
    with pytest.raises(ValueError, match="unknown profile 'tiny'"):
        Workspace.open("tiny", 2)
    with pytest.raises(ValueError, match="DEVICE is 'gpu': choose one of auto, cpu, cuda"):
        Workspace.open("smoke", 2, "gpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA GPU is visible"):
            Workspace.open("smoke", 2, "cuda")


def test_gather_replaces_only_the_rules_it_is_given(sandbox):
    def row(rule, setting, fid):
        key = dict(zip(KEY, (rule, setting, "fp16", "t", "nearest"), strict=True))
        return pd.DataFrame([{"profile": "smoke", **key, "fid": fid}])

    results.update_comparison(SMOKE, row("ratio", "0.35", 1.0))
    results.update_comparison(SMOKE, row("baseline", "none", 2.0))
    table = results.update_comparison(SMOKE, row("ratio", "0.40", 3.0))
    assert table[["rule", "setting", "fid"]].to_numpy().tolist() == [
        ["baseline", "none", 2.0],
        ["ratio", "0.40", 3.0],
    ]
    # A file of an earlier version: its columns are in another order.
    workspace.save_table(SMOKE, "paper_comparison", table[table.columns[::-1]].assign(gone=1))
    assert list(results.update_comparison(SMOKE, row("ratio", "0.40", 3.0)).columns) == list(
        table.columns
    )


def test_tables_and_images_come_back(sandbox):
    table = pd.DataFrame({"setting": ["none", "0.30"], "value": [1.5, float("nan")]})
    results.save_rows(SMOKE, "x", table, {"a": np.zeros((2, 32, 32), np.uint8)})
    loaded, images = results.load_rows(SMOKE, "x")
    pd.testing.assert_frame_equal(table, loaded)
    assert images["a"].shape == (2, 32, 32)
    with pytest.raises(FileNotFoundError, match="make reproduce PROFILE=smoke"):
        workspace.load_table(SMOKE, "y")
