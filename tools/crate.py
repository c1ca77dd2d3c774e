"""ro-crate-metadata.json: which notebook made which table from which parameters, for archives that
read RO-Crate 1.1.

Source: Soiland-Reyes et al. 2022, "Packaging research artefacts with RO-Crate", and the RO-Crate
1.1 specification.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from lafq.study import workspace
from lafq.study.diffusion.subject import WEIGHTS
from lafq.tensors import atomic_write, sha256

PATH = workspace.ROOT / "ro-crate-metadata.json"
LICENSE = "https://spdx.org/licenses/MIT"
Entity = dict[str, Any]


def crate() -> Entity:
    """The metadata of the committed results: a root dataset, its files, and one action per notebook
    and profile.
    """
    about = yaml.safe_load((workspace.ROOT / "CITATION.cff").read_text())
    actions, files = [], {}
    for record in sorted(workspace.RESULTS.glob("*/record.json")):
        if record.parent.name == "smoke":
            continue
        for notebook, parameters in sorted(json.loads(record.read_text())["notebooks"].items()):
            made = [
                path
                for path in sorted(record.parent.glob(f"{notebook[:2]}_*"))
                if path.suffix in (".csv", ".npz")
            ]
            files |= {f"notebooks/{notebook}.ipynb": _software(f"notebooks/{notebook}.ipynb")} | {
                _name(p): _file(p) for p in made
            }
            actions.append(_action(record.parent.name, notebook, parameters, made))
    weights = workspace.RESULTS / "mini" / WEIGHTS
    files[_name(weights)] = _file(weights)
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": about["title"],
        "description": "Notebooks, code, trained weights and tables: one command computes each number anew.",
        "version": about["version"],
        "datePublished": str(about["date-released"]),
        "license": {"@id": LICENSE},
        "author": [{"@id": "#authors"}],
        "citation": {"@id": "#paper"},
        "hasPart": [{"@id": name} for name in files],
        "mentions": [{"@id": action["@id"]} for action in actions],
    }
    paper = about["references"][0]
    context = [
        {
            "@id": PATH.name,
            "@type": "CreativeWork",
            "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"},
            "about": {"@id": "./"},
        },
        {"@id": LICENSE, "@type": "CreativeWork", "name": "MIT License"},
        {"@id": "#authors", "@type": "Organization", "name": about["authors"][0]["name"]},
        {
            "@id": "#paper",
            "@type": "ScholarlyArticle",
            "name": paper["title"],
            "datePublished": str(paper["year"]),
        },
    ]
    return {
        "@context": "https://w3id.org/ro/crate/1.1/context",
        "@graph": [root, *context, *files.values(), *actions],
    }


def _name(path: Path) -> str:
    return f"results/{path.relative_to(workspace.RESULTS).as_posix()}"


def _software(name: str) -> Entity:
    return {
        "@id": name,
        "@type": ["File", "SoftwareSourceCode"],
        "name": name,
        "encodingFormat": "application/x-ipynb+json",
    }


def _file(path: Path) -> Entity:
    return {
        "@id": _name(path),
        "@type": "File",
        "name": path.name,
        "contentSize": path.stat().st_size,
        "sha256": sha256(path),
    }


def _action(profile: str, notebook: str, parameters: Entity, made: list[Path]) -> Entity:
    settings = ", ".join(
        f"{name}={value}" for name, value in sorted(parameters.items()) if name != "PROFILE"
    )
    return {
        "@id": f"#{profile}-{notebook}",
        "@type": "CreateAction",
        "name": f"{notebook} with profile {profile}",
        "description": settings,
        "instrument": {"@id": f"notebooks/{notebook}.ipynb"},
        "result": [{"@id": _name(path)} for path in made],
    }


def write() -> None:
    """Write the metadata anew."""
    with atomic_write(PATH) as temporary:
        temporary.write_text(json.dumps(crate(), indent=1) + "\n")
