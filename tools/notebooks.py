"""The notebooks and their profiles: which there are, what parameters they take, and the form in
which they are kept.
"""

from pathlib import Path
from typing import Any

import nbformat
import yaml

from lafq.study import workspace
from lafq.study.workspace import profile_parameters
from lafq.tensors import atomic_write

EXPLORER = "00_explore"
WIDGET = "application/vnd.jupyter.widget-view+json"
QUIET_KERNEL = ["--IPKernelApp.log_level=50"]


def notebooks(only: str = "", profile: str = "") -> list[Path]:
    """The numbered notebooks in order, or those whose name begins with `only`; 00 last, as it opens
    what 01 makes.

    profile: without `only`, those that this profile runs (its file's `notebooks`; all, where it
    names none).
    """
    every = sorted(
        workspace.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"),
        key=lambda path: (path.stem == EXPLORER, path.name),
    )
    found = [path for path in every if path.name.startswith(only)]
    if profile and not only:
        profile_parameters(profile)
        chosen = yaml.safe_load((workspace.PROFILES / f"{profile}.yaml").read_text()).get(
            "notebooks"
        )
        found = [path for path in every if not chosen or path.stem in chosen]
    if not found:
        raise ValueError(
            f"no notebook's name begins with {only!r}: choose one of "
            f"{', '.join(path.stem for path in every)}"
        )
    return found


def declared(notebook: Path) -> dict[str, Any]:
    """The parameters that a notebook's `parameters` cell declares, with their defaults."""
    found: dict[str, Any] = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            exec(cell.source, {}, found)
    return found


def clean(path: Path, notebook: nbformat.NotebookNode | None = None) -> None:
    """Write a notebook without what names this run or machine: papermill's record, times, progress
    bars, versions.

    Widgets go too: their state is not kept, and a page that shows the notebook could not draw them
    without it.
    """
    notebook = notebook or nbformat.read(path, as_version=4)
    notebook.metadata = {k: notebook.metadata[k] for k in ("kernelspec",) if k in notebook.metadata}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type == "code":
            cell.outputs = [
                o
                for o in cell.outputs
                if o.get("name") != "stderr" and WIDGET not in o.get("data", {})
            ]
    with atomic_write(path) as temporary, temporary.open("w") as file:
        nbformat.write(notebook, file)
