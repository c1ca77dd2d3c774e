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
    paper, actions = about["references"][0], []
    weights = _file(workspace.RESULTS / "mini" / WEIGHTS)
    files = {weights["@id"]: weights}
    for record in sorted(workspace.RESULTS.glob("*/record.json")):
        profile, ran = record.parent.name, json.loads(record.read_text())["notebooks"]
        for notebook, parameters in sorted(ran.items() if profile != "smoke" else ()):
            found = sorted(record.parent.glob(f"{notebook[:2]}_*"))
            made = [_file(path) for path in found if path.suffix in (".csv", ".npz")]
            software = _software(f"notebooks/{notebook}.ipynb")
            files |= {entity["@id"]: entity for entity in (software, *made)}
            actions.append(_action(profile, notebook, parameters, made))
    description = "Notebooks, code, weights and tables: one command computes each number anew."
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": about["title"],
        "description": description,
        "version": about["version"],
        "datePublished": str(about["date-released"]),
        "license": {"@id": LICENSE},
        "author": [{"@id": "#authors"}],
        "citation": {"@id": "#paper"},
        "hasPart": [{"@id": name} for name in files],
        "mentions": [{"@id": action["@id"]} for action in actions],
    }
    version = {"conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"}, "about": {"@id": "./"}}
    written = {"name": paper["title"], "datePublished": str(paper["year"])}
    context = [
        {"@id": PATH.name, "@type": "CreativeWork", **version},
        {"@id": LICENSE, "@type": "CreativeWork", "name": "MIT License"},
        {"@id": "#authors", "@type": "Organization", "name": about["authors"][0]["name"]},
        {"@id": "#paper", "@type": "ScholarlyArticle", **written},
    ]
    graph = [root, *context, *files.values(), *actions]
    return {"@context": "https://w3id.org/ro/crate/1.1/context", "@graph": graph}


def _software(name: str) -> Entity:
    kind = {"@type": ["File", "SoftwareSourceCode"], "encodingFormat": "application/x-ipynb+json"}
    return {"@id": name, "name": name, **kind}


def _file(path: Path) -> Entity:
    name = f"results/{path.relative_to(workspace.RESULTS).as_posix()}"
    content = {"contentSize": path.stat().st_size, "sha256": sha256(path)}
    return {"@id": name, "@type": "File", "name": path.name, **content}


def _action(profile: str, notebook: str, parameters: Entity, made: list[Entity]) -> Entity:
    settings = (f"{name}={value}" for name, value in sorted(parameters.items()))
    return {
        "@id": f"#{profile}-{notebook}",
        "@type": "CreateAction",
        "name": f"{notebook} with profile {profile}",
        "description": ", ".join(word for word in settings if not word.startswith("PROFILE=")),
        "instrument": {"@id": f"notebooks/{notebook}.ipynb"},
        "result": [{"@id": file["@id"]} for file in made],
    }


def write() -> None:
    """Write the metadata anew."""
    with atomic_write(PATH) as temporary:
        temporary.write_text(json.dumps(crate(), indent=1) + "\n")
