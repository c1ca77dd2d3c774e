"""The committed notebooks: executed from results/, and told apart from results that were computed anew since."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from lafq import paths
from lafq.io import atomic_write
from tools.notebooks import EXPLORER, QUIET_KERNEL, clean, notebooks


def publish(only: str = "") -> None:
    """Execute notebooks/ in place as they are committed: COMPUTE false, everything loaded from results/.

    The times of the last `make reproduce` of a profile, kept in build/, go to results/<profile>/timing.json.
    """
    selected = notebooks(only)
    for timing in paths.BUILD.glob("*/timing.json"):
        # A run before 00_explore was there has timed all that takes long.
        if {path.stem for path in notebooks()} - set(json.loads(timing.read_text())["notebooks"]) - {EXPLORER}:
            continue
        with atomic_write(paths.RESULTS / timing.parent.name / timing.name) as temporary:
            shutil.copy(timing, temporary)
    for path in selected:
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(notebook, record_timing=False, extra_arguments=QUIET_KERNEL)
        client.resources = {"metadata": {"path": str(paths.NOTEBOOKS)}}
        client.execute()
        clean(path, notebook)
        print(f"notebooks/{path.name}: refreshed from results/")


def published() -> Path:
    """The folder whose results/ the committed notebooks and README were published from.

    That is the repository itself, unless results/ was computed anew since and not published: then a copy of what the last
    commit holds, in build/published, and one line says so.
    """

    def changed(*names: str) -> bool:
        git = ["git", "diff", "--quiet", "HEAD", "--", *names]
        return subprocess.run(git, cwd=paths.ROOT, capture_output=True, check=False).returncode == 1

    if not changed("results") or changed("notebooks", "README.md"):
        return paths.ROOT
    folder = paths.BUILD / "published"
    shutil.rmtree(folder, ignore_errors=True)
    archive = subprocess.run(["git", "archive", "HEAD", "results"], cwd=paths.ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    print("results/ was computed anew and not published: notebooks/ and README are held against the last commit's", file=sys.stderr)
    return folder
