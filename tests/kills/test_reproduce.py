"""`make test-kill`: `make reproduce PROFILE=smoke` killed at 20 seeded moments and resumed gives
the bytes of an undisturbed run.

A kill falls in one notebook, so the notebooks before it, which repeat to the byte, are not computed
again for each kill.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from lafq.study import workspace
from tools.pages import notebooks

KILLS = 20
FOLDERS = ("results/smoke", "figures/smoke")


def start(root, verb, only=""):
    command = [
        sys.executable,
        "-m",
        "tools.run",
        verb,
        "--profile",
        "smoke",
        *(["--only", only] if only else []),
    ]
    # The notebooks shall import the copy's lafq, not the one that is installed.
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(root)}
    return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL)


def kill(process):
    """Kill -9 the run and the notebook's process."""
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def content(root):
    """Bytes of each table, image file, weight file and figure; peak memory is a measurement and
    left out.
    """
    found = (path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in found
        if "peak_memory" not in path.name
    }


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A copy of the tracked files with a finished run, and the seconds of each notebook."""
    root = tmp_path_factory.mktemp("kills") / "lafq"
    subprocess.run(["git", "clone", "--quiet", str(workspace.ROOT), str(root)], check=True)
    seconds = {}
    for path in notebooks(profile="smoke"):
        began = time.monotonic()
        assert start(root, "reproduce", path.stem).wait() == 0
        seconds[path.stem] = time.monotonic() - began
    return root, seconds


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_that_is_resumed_gives_the_same_bytes(undisturbed, number):
    root, seconds = undisturbed
    moment = random.Random(f"kill {number}").uniform(0, sum(seconds.values()))
    for name in seconds:
        if moment < seconds[name]:
            break
        moment -= seconds[name]
    wanted = content(root)
    shutil.rmtree(root / "build" / "smoke" / "samples", ignore_errors=True)
    process = start(root, "reproduce", name)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=moment)
    if process.poll() is None:
        kill(process)
    assert start(root, "resume", name).wait() == 0
    found = content(root)
    assert sorted(found) == sorted(wanted)
    assert [path for path in wanted if found[path] != wanted[path]] == []
