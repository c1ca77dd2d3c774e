import os
import subprocess
import sys

import nbformat
import psutil
import pytest
import torch

from lafq.study import workspace
from tools import run
from tools.pages import notebooks


@pytest.fixture
def refused(monkeypatch, capsys):
    """Asserts that a command stops with one line, which begins so."""

    def call(line, *arguments):
        monkeypatch.setattr(sys, "argv", ["tools.run", *arguments])
        assert run.main() == 1
        printed = capsys.readouterr().err
        assert printed.startswith(f"stopped: {line}")
        assert printed.count("\n") == 1

    return call


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("IMAGE=3", "unknown parameter IMAGE: the notebooks declare"),
        ("IMAGES=0", "IMAGES is 0: it must lie in [1, inf]"),
        ("IMAGES=abc", "IMAGES is 'abc': it must be of type int"),
        ("IMAGES=2.5", "IMAGES is 2.5: it must be of type int"),
        ("IMAGES=true", "IMAGES is True: it must be of type int"),
        ("IMAGES", "IMAGES is None: it must be of type int"),
        ("SEED=-1", "SEED is -1: it must lie in [0, inf]"),
        ("RATIOS=[0.3, 1.2]", "RATIOS is 1.2: it must lie in [0, 1]"),
        ("RATIOS=[.nan]", "RATIOS is nan: it must lie in [0, 1]"),
        ("PROFILE=small", "PROFILE is set beside profile smoke: name one"),
        ("RATIOS=[]", "RATIOS is []: it must have at least one value"),
        ("RATIOS=[", "--set 'RATIOS=[' is not NAME=VALUE"),
        ("TRAINING={steps: 5}", "TRAINING is {'steps': 5}: it must name batch_size too"),
        ("TUNED={bits: [3.0], steps: 0}", "TUNED.steps is 0: it must lie in [1, inf]"),
    ],
)
def test_a_bad_setting_stops_before_anything_is_touched(setting, message, refused):
    refused(message, "reproduce", "--profile", "smoke", "--set", setting)


@pytest.mark.parametrize("profile", ["huge", "../profiles/smoke"])
def test_an_unknown_profile(profile, refused):
    known = "choose one of paper, small, smoke"
    refused(f"unknown profile {profile!r}: {known}", "reproduce", "--profile", profile)


def test_no_such_notebook(refused):
    refused("no notebook's name begins with '99'", "resume", "--profile", "smoke", "--only", "99")


@pytest.mark.parametrize("profile", ["smoke", "small", "paper"])
def test_profiles_fit_what_the_notebooks_declare(profile):
    parameters = run.check(profile, {"COMPUTE": False}, notebooks())
    assert parameters["PROFILE"] == profile
    assert run.check(profile, {"RATIO": 1, "INCEPTION_REFERENCE": 0}, notebooks())["RATIO"] == 1


def test_a_folder_that_cannot_be_written_stops_before_any_work(sandbox, monkeypatch, refused):
    workspace.RESULTS.write_text("a file in the folder's place")
    monkeypatch.setattr(run.papermill, "execute_notebook", None)
    refused("", "reproduce", "--profile", "smoke")


def test_paper_without_its_weights_names_the_remedies(sandbox, refused):
    path = workspace.RESULTS / "paper" / "weights" / "model.safetensors.index.json"
    remedy = "`git checkout -- results/paper` restores it, or train anew with TRAIN=1"
    refused(f"the trained weights {path} are missing: {remedy}", "reproduce", "--profile", "paper")
    assert not workspace.BUILD.exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '"text"', '{"profile": ""}'])
def test_a_damaged_record_of_the_last_run(content, sandbox, refused):
    workspace.BUILD.mkdir()
    (workspace.BUILD / run.LAST).write_text(content)
    refused(f"{workspace.BUILD / run.LAST} is damaged: delete it", "resume")


@pytest.mark.parametrize("gpu", [True, False])
def test_without_a_profile_it_is_paper_also_beside_a_gpu(gpu, sandbox, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(sys, "argv", ["tools.run", "reproduce"])
    monkeypatch.setattr(run, "check", lambda *_: {})
    asked = {}
    monkeypatch.setattr(run, "execute", lambda profile, *_, **__: asked.update(profile=profile))
    assert run.main() == 0
    assert asked["profile"] == "paper"


def run_notebook(folder, source):
    """Reproduce with one notebook in the place of 01_train, whose second cell is `source`."""
    parameters = nbformat.v4.new_code_cell("COMPUTE = False", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(source)])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["kernelspec"] = kernel
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
for name in ("NOTEBOOKS", "RESULTS", "BUILD"):
    setattr(workspace, name, folder / name.lower())
run.check = lambda *_: {{"COMPUTE": True, "TRAIN": False}}
sys.argv = ["tools.run", "reproduce", "--profile", "smoke", "--only", "01"]
sys.exit(run.main())
"""
    how = {"cwd": workspace.ROOT, "env": {**os.environ, "TQDM_DISABLE": "1"}}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=False, **how)


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
    assert done.stderr == f"\ninterrupted: what was finished is kept, and {run.RESUME}\n"
    assert not psutil.pid_exists(int((tmp_path / "notebooks" / "pid").read_text()))


@pytest.mark.slow
def test_a_dead_notebook_process_names_memory_and_resume(tmp_path):
    done = run_notebook(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == 1
    assert done.stderr == f"stopped: {run.DIED}; then {run.RESUME}\n"
