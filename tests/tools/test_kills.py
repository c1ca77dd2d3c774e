"""kill -9 in the middle of training, sampling and the tables: the run that goes on gives the bytes
of an undisturbed one.
"""

import os
import signal
import subprocess
import sys

import pytest

from lafq.study import workspace

# For each folder=n a fork that kills itself at its n-th rename of a file, with that file still
# under its temporary name.
CHILD = """
import os, pathlib, signal, sys
import torch
from lafq.study.diffusion import subject
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.training import fit
from lafq.study.diffusion.unet import UNet
from lafq.study.images.evaluate import evaluate
from lafq.study.images.features import mnist_extractor
from lafq.study.images.sampling import Sampling
from lafq.study import results, workspace
from lafq.study.rows import uniform_rows
from lafq.study.workspace import Workspace

torch.set_num_threads(1)
_ = mnist_extractor().reference  # once for all children
replace, renamed = pathlib.Path.replace, []

def run(folder, last):
    def counted(path, target):
        renamed.append(target)
        if len(renamed) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    pathlib.Path.replace = counted
    workspace.RESULTS, workspace.BUILD = folder / "results", folder / "build"
    work = Workspace("smoke")
    torch.manual_seed(0)
    model = UNet(4, 0.0).to(memory_format=torch.channels_last)
    settings = dict(batch_size=2, peak=1e-3, warmup=2, decay=2, seed=0, bf16=False, ema_decay=0.9)
    checkpoint, digits = work.build / subject.CHECKPOINT, mnist(train=False)[0][:16]
    ema, _ = fit(model, digits, checkpoint, steps=6, every=2, **settings)
    subject.save_weights(work, ema, width=4)
    model = subject.load_model(work, 4)
    made = evaluate(work, model, uniform_rows(model, ("int8",)), Sampling(4, 2, 0, 2))
    results.save_rows(work, "rows", *made)

for folder, last in (argument.split("=") for argument in sys.argv[1:]):
    if not (child := os.fork()):
        run(pathlib.Path(folder), int(last))
        sys.stdout.flush()
        os._exit(0)
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
MOMENTS = {"training": 2, "sampling": 7, "tables": 10}


def run(moments):
    asked = (f"{folder}={last}" for folder, last in moments.items())
    how = {"cwd": workspace.ROOT, "env": {**os.environ, "TQDM_DISABLE": "1"}}
    command = [sys.executable, "-c", CHILD, *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True, **how)
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status")]


def content(folder):
    """Files by name, without parts, and images.csv, which says what a run drew and what it took."""
    files = [p for p in folder.rglob("*.*") if p.suffix != ".part" and p.name != "images.csv"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    killed = {tmp_path / name: last for name, last in MOMENTS.items()}
    assert run({tmp_path / "undisturbed": 0} | killed) == [0, *[-signal.SIGKILL] * 3]
    undisturbed = content(tmp_path / "undisturbed")
    assert [len(content(folder)) for folder in killed] == [1, 4, 7]
    assert len(undisturbed) == 9
    assert run(dict.fromkeys(killed, 0)) == [0] * 3
    for folder in killed:
        assert content(folder) == undisturbed
