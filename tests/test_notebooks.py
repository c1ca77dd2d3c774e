import ast
import re

import nbformat
import pytest

from lafq.study import workspace
from lafq.study.workspace import profile_parameters
from tools import pages, publish

NOTEBOOKS = pages.notebooks()
PROFILES = sorted(workspace.PROFILES.glob("*.yaml"))
MACHINE_PATH = re.compile(
    r"(?<![\w.:/<])/[A-Za-z][\w.-]*/[\w.-]"
)  # any absolute path of two parts or more


def code(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def used(path):
    return {
        n.id
        for c in code(path)
        for n in ast.walk(ast.parse(c.source))
        if isinstance(n, ast.Name) and n.id.isupper()
    }


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.stem)
def test_every_parameter_of_a_profile_is_declared_where_it_is_used(profile):
    parameters = profile_parameters(profile.stem)
    declared = {path.stem: set(publish.declared(path)) for path in NOTEBOOKS}
    assert parameters["PROFILE"] == profile.stem
    assert not set(parameters) - set().union(*declared.values())
    for path in NOTEBOOKS:
        assert not (used(path) & set(parameters)) - declared[path.stem], path.stem


def test_profiles_name_the_same_parameters():
    names = {profile.stem: set(profile_parameters(profile.stem)) for profile in PROFILES}
    assert names["small"] == names["paper"] == names["smoke"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_defaults_are_papers_or_where_paper_does_not_run_it_smalls(path):
    runs = path in pages.notebooks(profile="paper")
    profile = profile_parameters("paper" if runs else "small")
    values = publish.declared(path)
    assert values["COMPUTE"] is False
    shared = values.keys() & profile.keys()
    assert {n: values[n] for n in shared} == {n: profile[n] for n in shared}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebook_is_executed_clean_and_small(path):
    for cell in code(path):
        assert cell.execution_count is not None
        assert len(cell.source.splitlines()) <= 15
        tree = ast.parse(cell.source)
        assert not any(
            isinstance(n, ast.FunctionDef | ast.ClassDef | ast.For | ast.While)
            for n in ast.walk(tree)
        )
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert publish.WIDGET not in output.get("data", {})
            assert not MACHINE_PATH.search(
                str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            )
    notebook = nbformat.read(path, as_version=4)
    assert "widgets" not in notebook.metadata
    assert "papermill" not in notebook.metadata
    assert sum("parameters" in c.metadata.get("tags", []) for c in notebook.cells) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_first_cell_links_the_other_notebooks(path):
    first = nbformat.read(path, as_version=4).cells[0].source
    assert re.match(r"# (\w+)", first)[1].lower() == path.stem.split("_")[0]
    links = re.findall(r"\[(\w+)\]\(([^)]+)\)", first[first.index("[README]") :])
    others = [(p.stem, p) for p in NOTEBOOKS if p != path]
    found = [(name, (path.parent / link).resolve()) for name, link in links]
    assert found == [("README", workspace.ROOT / "README.md"), *others]


def test_the_path_pattern_sees_a_path():
    assert MACHINE_PATH.search("in " + "/".join(("", "home", "someone", "lafq")))
    assert not MACHINE_PATH.search("results/small/samples/x.csv")
