"""The committed notebooks and pages: written from results/, without computing anything."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from lafq.study import workspace
from lafq.tensors import atomic_write
from tools import crate, pages

WIDGET = "application/vnd.jupyter.widget-view+json"
QUIET_KERNEL = ["--IPKernelApp.log_level=50"]


def declared(notebook: Path) -> dict[str, Any]:
    """The parameters that a notebook's `parameters` cell declares, with their defaults."""
    parameters: dict[str, Any] = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            exec(cell.source, {}, parameters)
    return parameters


def clean(path: Path, notebook: nbformat.NotebookNode | None = None) -> None:
    """Write a notebook without what names this run or machine: papermill's record, times, progress
    bars, versions; and without widgets, which no page can draw without their state.
    """
    notebook = notebook or nbformat.read(path, as_version=4)
    notebook.metadata = {k: notebook.metadata[k] for k in ("kernelspec",) if k in notebook.metadata}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type == "code":
            shown = (o for o in cell.outputs if WIDGET not in o.get("data", {}))
            cell.outputs = [o for o in shown if o.get("name") != "stderr"]
    write_text(path, nbformat.writes(notebook) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file of text, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def publish(only: str = "") -> None:
    """Fill and execute notebooks/ in place, COMPUTE false; then write the pages, the crate, and
    results/<profile>/timing.json of the last complete `make reproduce`.
    """
    for timing in workspace.BUILD.glob("*/timing.json"):
        asked = {path.stem for path in pages.notebooks(profile=timing.parent.name)}
        if asked <= set(json.loads(timing.read_text())["notebooks"]):
            write_text(workspace.RESULTS / timing.parent.name / timing.name, timing.read_text())
    for path in pages.notebooks(only):
        notebook = nbformat.read(path, as_version=4)
        pages.fill_notebook(notebook, declared(path)["PROFILE"])
        client = NotebookClient(notebook, record_timing=False, extra_arguments=QUIET_KERNEL)
        client.resources = {"metadata": {"path": str(workspace.NOTEBOOKS)}}
        client.execute()
        clean(path, notebook)
        print(f"{path.relative_to(workspace.ROOT)}: refreshed from results/")
    texts = {path: pages.filled(path.read_text()) for path in pages.PAGES}
    texts[crate.PATH] = json.dumps(crate.crate(), indent=1) + "\n"
    for path, text in texts.items():
        write_text(path, text)
        print(f"{path.relative_to(workspace.ROOT)}: refreshed from results/")


def published() -> Path:
    """The folder whose results/ the committed pages show: the repository, or, where results/ was
    computed anew since, a copy of the last commit's.
    """

    if not shutil.which("git"):
        return workspace.ROOT

    def changed(*names: str) -> bool:
        git = ["git", "diff", "--quiet", "HEAD", "--", *names]
        return subprocess.run(git, cwd=workspace.ROOT, capture_output=True).returncode == 1

    if not changed("results") or changed("notebooks", "README.md"):
        return workspace.ROOT
    folder, archive = workspace.BUILD / "published", workspace.BUILD / "published.tar"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    git = ["git", "archive", "-o", str(archive), "HEAD", "results"]
    subprocess.run(git, cwd=workspace.ROOT, check=True)
    shutil.unpack_archive(archive, folder, filter="data")
    print("results/ is newer than the pages: held against the last commit's", file=sys.stderr)
    return folder
