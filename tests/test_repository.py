import ast
import json
import os
import re
import subprocess
import sys
import tomllib

import nbformat
import pandas as pd
import pytest
import torch
import torchvision
import yaml

from lafq.allocation import rules
from lafq.quantization.formats import MIB
from lafq.quantization.model import nbytes, resident_bytes
from lafq.quantization.plan import make_plan
from lafq.study import poster, workspace
from lafq.study.diffusion import subject
from lafq.study.diffusion.unet import layer_of, quantizable
from lafq.study.rows import KEY, Row, kept_share
from lafq.study.workspace import Workspace, profile_parameters
from tools import pages
from tools.publish import published

SMALL = Workspace("small")

ROOT = workspace.ROOT
DOCUMENTED = (ast.Module, ast.FunctionDef, ast.ClassDef)


def pins(text):
    return {
        name.lower().replace("_", "-"): version
        for name, version in re.findall(
            r"^\s*-?\s*([A-Za-z0-9_.-]+)={1,2}([0-9][^\s;#]*)", text, flags=re.MULTILINE
        )
    }


def test_environment_and_requirements_are_in_step():
    lock = pins((ROOT / "requirements.txt").read_text())
    environment = pins((ROOT / "environment.yml").read_text())
    environment["torch"] = environment.pop("pytorch-cpu")
    python = environment.pop("python")
    assert python.startswith("3.11")
    assert environment == {name: lock[name] for name in environment}
    assert lock["torch"] == "2.13.0"
    assert lock["torchvision"] == "0.28.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core, study = project["dependencies"], project["optional-dependencies"]["study"]
    assert {re.match("[a-z0-9-]+", name)[0] for name in core + study} <= set(environment)
    files = [p for p in (ROOT / "lafq").rglob("*.py") if "study" not in p.parts]
    text = "".join(p.read_text() for p in files)
    found = re.findall(r"(?m)^ *(?:import|from) (\w+)(?:$| as |.* import )", text)
    imported = set(found) - {"lafq"} - sys.stdlib_module_names
    assert imported == {re.match("[a-z]+", name)[0] for name in core}


def test_binder_builds_the_conda_environment():
    """repo2docker takes the first build pack that finds its file; these come before conda's."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    assert os.access(ROOT / "postBuild", os.X_OK)
    earlier = "Dockerfile Project.toml JuliaProject.toml REQUIRE default.nix DESCRIPTION install.R"
    earlier += " runtime.txt binder .binder"  # can ask for R; would be read instead of the root
    assert not [name for name in earlier.split() if (ROOT / name).exists()]


OTHERS = ("CONTRIBUTING.md", "CHANGELOG.md", "results/README.md", "data/README.md")
TEXTS = [*pages.PAGES, *(ROOT / name for name in OTHERS)]


def headings(path):
    """The anchors of the headings of a page or notebook, as GitHub names them."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join(
            cell.source for cell in nbformat.reads(text, 4).cells if cell.cell_type == "markdown"
        )
    found = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in found}


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_headings_that_a_page_names_are_there(path):
    text = path.read_text()
    anchors = headings(path)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif "://" not in link:
            page, _, heading = link.partition("#")
            assert (path.parent / page).exists(), link
            assert not heading or heading in headings(path.parent / page), link
    committed = r"`((?:lafq|tests|notebooks|benchmarks|figures/small|results/small)/[\w./-]+)`"
    for name in re.findall(committed, text):
        assert (ROOT / name).exists(), name


def defined(path):
    """Names that a module defines at its top, and the attributes and methods of its classes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def test_modules_and_names_that_docstrings_mention_are_there():
    modules = {path.stem: path for path in (ROOT / "lafq").rglob("*.py") if path.stem != "__init__"}
    for path in modules.values():
        said = "\n".join(
            ast.get_docstring(n) or ""
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, DOCUMENTED)
        )
        for module in re.findall(r"\b(\w+)\.py\b", said):
            assert module in modules, (path, module)
        for module, name in re.findall(r"`(\w+)\.(\w+)`", said):
            if module in modules:
                assert name in defined(modules[module]), (path, f"{module}.{name}")


def words(page):
    """Words of its sentences: no tables, no code, no addresses of links."""
    sentences = re.sub(r"```.*?```|<!--.*?-->|\]\([^)]*\)|^\|[^\n]*", " ", page, flags=re.S | re.M)
    return len(re.findall(r"\S*\w\S*", sentences))


def test_pages_are_short():
    assert words(pages.README.read_text()) <= 620
    assert sum(words(page.read_text()) for page in (ROOT / "docs").glob("*.md")) <= 5600


def test_readme_names_the_two_commands():
    text = pages.README.read_text()
    assert "make reproduce" in text
    assert "make test" in text
    assert re.search(r"^\s*make test", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)


def snippets(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


class Timed(torch.nn.Linear):
    def forward(self, x, t):
        return super().forward(x) / t


@pytest.mark.slow
def test_examples_run(digits, tmp_path):
    sized, coded, looped, alike, own, diffusion = snippets("docs/own-model.md")
    [first] = snippets("README.md")
    assert max(len(re.findall(r"\S.*", s)) for s in (own, sized, coded, looped, alike, first)) <= 10
    imports = "\n".join(line for s in (own, first) for line in s.splitlines() if "import " in line)
    subprocess.run([sys.executable, "-c", imports], check=True)  # in the page's order
    scope = {"path": tmp_path / "model.safetensors"}
    exec(own, scope)
    stored = scope["nbytes"](scope["model"], scope["plan"])
    header = 8 + int.from_bytes(scope["path"].read_bytes()[:8], "little")
    assert scope["path"].stat().st_size - header == stored < 0.2 * resident_bytes(scope["model"])
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(scope["fast"](x), scope["small"](x))
    scope = {"images": digits}
    exec(diffusion.replace("width=16", "width=4").replace("samples=200", "samples=20"), scope)
    assert resident_bytes(scope["small"]) == nbytes(scope["model"], scope["plan"])
    noise = torch.randn(4, 3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    scope = {"model": Timed(8, 8), "noise": noise, "timesteps": (3, 2, 1)}
    scope["step"] = lambda x, eps, t, z: eps
    exec(looped.replace("_mib=5.0", "_mib=0.0002") + alike, scope)
    assert scope["plan"].nbytes <= 0.0002 * 2**20 < 4 * 72
    torch.manual_seed(15)  # one price for all stops at 1.7 MiB
    network = torchvision.models.mobilenet_v3_small(num_classes=10).eval()
    for snippet in (sized, coded, first):
        scope = {
            "model": network,
            "inputs": torch.randn(16, 3, 32, 32),
            "path": tmp_path / "sized.safetensors",
        }
        exec(snippet.replace("_mib=5.0", "_mib=2.0"), scope)
        size = resident_bytes(scope["small"]) if snippet is sized else scope["path"].stat().st_size
        assert 0.99 * 2 < size / 2**20 <= 2


def test_a_new_threshold_rule_as_contributing_shows_it(tiny):
    rule, row = snippets("CONTRIBUTING.md")
    fisher = {n: w.square() for n, w in quantizable(tiny).items()}
    scope = {
        **vars(rules),
        "layer_of": layer_of,
        "group_of": subject.group_of,
        "Row": Row,
        "make_plan": make_plan,
        "fisher": fisher,
        "rows": [],
    }
    exec(rule + row, scope)
    [candidate] = scope["rows"]
    assert 0.45 < kept_share(tiny, candidate.plan) < 0.55


def test_shipped_weights_are_those_of_the_profile():
    for profile in ("small", "paper"):
        p, index = profile_parameters(profile), workspace.RESULTS / profile / subject.WEIGHTS
        training = json.loads(index.read_text())["metadata"]["training"]
        assert training == p["TRAINING"] | {"width": p["WIDTH"], "seed": p["SEED"]}
        shards = subject.check_weights(Workspace(profile), p)
        assert all(path.stat().st_size <= 45 * MIB for path in shards)


def test_every_ratio_of_the_poster_is_in_the_sweeps():
    for name in ("small/05_ratio_sweep", "paper/05_ratio_sweep", "paper/05_published"):
        ratios = pages.rows(name, rule="ratio")
        assert not ratios.duplicated(KEY).any()
        for _, rows in ratios.groupby(["format", "granularity"]):
            assert {f"{r:.2f}" for r in poster.RATIOS} <= set(rows["setting"])


def test_equal_samples_have_equal_scores():
    rows = pd.concat(
        [workspace.load_table(SMALL, n) for n in ("03_global", "04_group", "05_ratio_sweep")]
    )
    assert (rows.groupby("sample")["fid_mnist"].nunique() == 1).all()
    assert rows.groupby("sample").size().max() > 1


def test_make_draws_anew_into_an_absolute_folder_without_a_window_system():
    show = "show:\n\t@echo $(CHOICE) $$LAFQ_OUTPUT $$MPLBACKEND\n"
    make = ["make", "-s", "-f", "Makefile", "-f", "-", "show", "IMAGES=fresh"]
    environment = os.environ | {"LAFQ_OUTPUT": "out", "MPLBACKEND": "TkAgg"}
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    shown = subprocess.run(make, input=show, check=True, **how).stdout.split()
    assert shown == ["--set", "KEEP=false", str(ROOT / "out")]
    wrong = subprocess.run(["make", "-n", "test", "IMAGES=new"], check=False, **how)
    assert wrong.returncode == 2 and "IMAGES is 'new': give fresh" in wrong.stderr
    lower = subprocess.run(["make", "-n", "reproduce", "profile=small"], check=False, **how)
    assert lower.returncode == 2 and "profile is lower case: write it in capitals" in lower.stderr
    spaced = subprocess.run(["make", "-n", "evidence", "PUBLISHED=a b"], check=True, **how).stdout
    assert '--published "a b"' in spaced


def test_without_git_the_committed_pages_are_those_here(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert published() == ROOT
