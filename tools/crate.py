"""ro-crate-metadata.json (RO-Crate 1.1): which notebook made which table from which parameters.

Source: Soiland-Reyes et al. 2022, "Packaging research artefacts with RO-Crate".
"""

import json
from pathlib import Path
from typing import Any

import yaml

from lafq.study import workspace
from lafq.study.diffusion.subject import WEIGHTS
from lafq.tensors import sha256
from tools.pages import notebooks

PATH = workspace.ROOT / "ro-crate-metadata.json"
LICENSE = "https://spdx.org/licenses/MIT"
VERSION = "https://w3id.org/ro/crate/1.1"
DESCRIPTION = "Notebooks, code, weights and tables: one command computes each number anew."
NOTEBOOK = {"@type": ["File", "SoftwareSourceCode"], "encodingFormat": "application/x-ipynb+json"}
Entity = dict[str, Any]


def crate() -> Entity:
    """A root dataset, the committed results' files, and one action per notebook and profile."""
    about = yaml.safe_load((workspace.ROOT / "CITATION.cff").read_text())
    paper, actions = about["references"][0], []
    indices = [workspace.RESULTS / profile / WEIGHTS for profile in ("paper", "small")]
    files = [_file(path) for index in indices for path in sorted(index.parent.iterdir())]
    records = workspace.RESULTS.glob("*/record.json")
    for record in sorted(path for path in records if path.parent.name != "smoke"):
        ran = json.loads(record.read_text())["notebooks"]
        for notebook in (path for path in notebooks() if path.stem in ran):
            paths = sorted(record.parent.glob(f"{notebook.stem.split('_')[0]}[_.]*"))
            made = [_file(path) for path in paths if path.suffix in (".csv", ".npz")]
            actions.append(_action(record.parent.name, notebook, ran[notebook.stem], made))
            software = actions[-1]["instrument"]
            files += [software | {"name": software["@id"]} | NOTEBOOK, *made]
    files = list({file["@id"]: file for file in files}.values())
    root = {
        "name": about["title"],
        "description": DESCRIPTION,
        "version": about["version"],
        "datePublished": str(about["date-released"]),
        "license": {"@id": LICENSE},
        "author": [{"@id": "#authors"}],
        "citation": {"@id": "#paper"},
        "hasPart": _references(files),
        "mentions": _references(actions),
    }
    metadata = {"conformsTo": {"@id": VERSION}, "about": {"@id": "./"}}
    article = {"name": paper["title"], "datePublished": str(paper["year"])}
    graph = [
        {"@id": "./", "@type": "Dataset", **root},
        {"@id": PATH.name, "@type": "CreativeWork", **metadata},
        {"@id": LICENSE, "@type": "CreativeWork", "name": "MIT License"},
        {"@id": "#authors", "@type": "Organization", "name": about["authors"][0]["name"]},
        {"@id": "#paper", "@type": "ScholarlyArticle", **article},
    ]
    return {"@context": f"{VERSION}/context", "@graph": graph + files + actions}


def _references(entities: list[Entity]) -> list[Entity]:
    return [{"@id": entity["@id"]} for entity in entities]


def _file(path: Path) -> Entity:
    name = f"results/{path.relative_to(workspace.RESULTS).as_posix()}"
    content = {"contentSize": path.stat().st_size, "sha256": sha256(path)}
    return {"@id": name, "@type": "File", "name": path.name, **content}


def _action(profile: str, path: Path, parameters: Entity, made: list[Entity]) -> Entity:
    settings = [f"{n}={value}" for n, value in sorted(parameters.items()) if n != "PROFILE"]
    return {
        "@id": f"#{profile}-{path.stem}",
        "@type": "CreateAction",
        "name": f"{path.stem} with profile {profile}",
        "description": ", ".join(settings),
        "instrument": {"@id": path.relative_to(workspace.ROOT).as_posix()},
        "result": _references(made),
    }
