"""The committed notebooks: executed from results/, and told apart from results that were computed
anew since.
"""

import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from lafq.study import workspace
from lafq.study.workspace import Workspace, profile_parameters
from lafq.tensors import atomic_write
from tools import openings
from tools.notebooks import EXPLORER, QUIET_KERNEL, clean, declared, notebooks

PAPER = "paper"
MAIN_TABLE = {"01_train": "01_baseline"}


def publish(only: str = "") -> None:
    """Execute notebooks/ in place as they are committed: COMPUTE false, everything loaded from
    results/.

    notebooks/paper/ gets the same notebooks with the values of profile paper, as far as that
    profile has their tables.

    The times of the last `make reproduce` of a profile, kept in build/, go to
    results/<profile>/timing.json.
    """
    selected = notebooks(only)
    for timing in workspace.BUILD.glob("*/timing.json"):
        # A run before 00_explore was there has timed all that takes long.
        if (
            {path.stem for path in notebooks(profile=timing.parent.name)}
            - set(json.loads(timing.read_text())["notebooks"])
            - {EXPLORER}
        ):
            continue
        with atomic_write(workspace.RESULTS / timing.parent.name / timing.name) as temporary:
            shutil.copy(timing, temporary)
    for path in selected:
        _execute(nbformat.read(path, as_version=4), path)
        openings.fill(path, Workspace(declared(path)["PROFILE"]))
    for path in selected:
        if path in rendered(PAPER):
            notebook = with_parameters(nbformat.read(path, as_version=4), profile_parameters(PAPER))
            _execute(notebook, workspace.NOTEBOOKS / PAPER / path.name)
            openings.fill(workspace.NOTEBOOKS / PAPER / path.name, Workspace(PAPER))


def rendered(profile: str) -> list[Path]:
    """The notebooks that stand in notebooks/<profile>/ as well: what that profile runs, has tables
    of, and is not their default.
    """
    found = []
    for path in notebooks(profile=profile):
        table = workspace.RESULTS / profile / f"{MAIN_TABLE.get(path.stem, path.stem)}.csv"
        if table.is_file() and declared(path)["PROFILE"] != profile:
            found.append(path)
    return found


def with_parameters(
    notebook: nbformat.NotebookNode, parameters: dict[str, Any]
) -> nbformat.NotebookNode:
    """The notebook with a profile's values in its parameters cell, and with links that hold one
    folder deeper.
    """
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = _with_values(cell.source, parameters)
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\(((?:\.\./)*[\w./]+)\)", r"](../\1)", cell.source)
    return notebook


def _with_values(source: str, parameters: dict[str, Any]) -> str:
    """The source with other values assigned, each on a line with the comment that stood there."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        name = ast.unparse(node).split()[0]
        if name in parameters:
            comment = lines[node.end_lineno - 1][node.end_col_offset :]
            value = f"{name} = {_literal(parameters[name])}{comment}"
            # What is assigned in parts, with |=, stands whole in the first.
            lines[node.lineno - 1 : node.end_lineno] = [value] * isinstance(node, ast.Assign)
    return "\n".join(lines)


def _literal(value: Any) -> str:
    """The value as ruff writes it: strings in double quotes."""
    return repr(value).replace("'", '"')


def _execute(notebook: nbformat.NotebookNode, path: Path) -> None:
    client = NotebookClient(notebook, record_timing=False, extra_arguments=QUIET_KERNEL)
    client.resources = {"metadata": {"path": str(workspace.NOTEBOOKS)}}
    client.execute()
    clean(path, notebook)
    print(f"{path.relative_to(workspace.ROOT)}: refreshed from results/")


def published() -> Path:
    """The folder whose results/ the committed notebooks and README were published from.

    That is the repository itself, unless results/ was computed anew since and not published: then a
    copy of what the last commit holds, in build/published, and one line says so.
    """

    def changed(*names: str) -> bool:
        git = ["git", "diff", "--quiet", "HEAD", "--", *names]
        return (
            subprocess.run(git, cwd=workspace.ROOT, capture_output=True, check=False).returncode
            == 1
        )

    if not changed("results") or changed("notebooks", "README.md"):
        return workspace.ROOT
    folder = workspace.BUILD / "published"
    shutil.rmtree(folder, ignore_errors=True)
    archive = subprocess.run(
        ["git", "archive", "HEAD", "results"], cwd=workspace.ROOT, capture_output=True, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    print(
        "results/ was computed anew and not published: notebooks/ and README are held against the "
        "last commit's",
        file=sys.stderr,
    )
    return folder
