"""The pages and the notebooks' Markdown, typed in docs/blocks/ with slots for numbers.

Text between `<!-- NAME -->` and `<!-- /NAME -->` in a page, or in a Markdown cell of a notebook,
is docs/blocks/NAME.md.j2, rendered by Jinja2 with the numbers of results/.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import nbformat
import numpy as np
import pandas as pd
import yaml

from lafq.quantization.formats import MIB
from lafq.study import claims, poster, workspace
from lafq.study.damage import bits_of_equal_damage
from lafq.study.diffusion.subject import REFERENCE
from lafq.study.figures import text
from lafq.study.workspace import profile_parameters
from lafq.tensors import sha256

ORDER = ("[0-9][0-9]_*.ipynb", "beyond/*.ipynb", "explore.ipynb")
BLOCKS = workspace.ROOT / "docs" / "blocks"
README, CARD = workspace.ROOT / "README.md", workspace.ROOT / "results" / "MODEL_CARD.md"
PAGES = (README, CARD, *sorted((workspace.ROOT / "docs").glob("*.md")))
MARK = re.compile(r"<!-- /?\w+ -->")
MARKED = re.compile(r"(<!-- (?P<name>\w+) -->\n).*?(<!-- /(?P=name) -->)", flags=re.DOTALL)


def notebooks(only: str = "", profile: str = "") -> list[Path]:
    """The notebooks in reading order, or those whose name begins with `only`. profile: without
    `only`, those that this profile's file names, if it names any.
    """
    every = [path for names in ORDER for path in sorted(workspace.NOTEBOOKS.glob(names))]
    if profile and not only:
        profile_parameters(profile)
        about = yaml.safe_load((workspace.PROFILES / f"{profile}.yaml").read_text())
        return [path for path in every if path.stem in about.get("notebooks", path.stem)]
    if not (selected := [path for path in every if path.name.startswith(only)]):
        names = ", ".join(path.stem for path in every)
        raise ValueError(f"no notebook's name begins with {only!r}: choose one of {names}")
    return selected


@cache
def _table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"setting": str})


def rows(name: str | list[str], **where: Any) -> pd.DataFrame:
    """Rows of results/<name>.csv (or several) whose columns have a value, or one of a list."""
    names = [name] if isinstance(name, str) else name
    table = pd.concat([_table(workspace.RESULTS / f"{n}.csv") for n in names], ignore_index=True)
    for column, value in where.items():
        if isinstance(value, float):
            table = table[np.isclose(table[column], value)]
        else:
            table = table[table[column].isin(value if isinstance(value, list) else [value])]
    return table


def row(name: str, **where: Any) -> pd.Series:
    """The one row of `rows`; ValueError where there are none or several."""
    if len(table := rows(name, **where)) != 1:
        raise ValueError(f"{name} has {len(table)} rows with {where}, and one is needed")
    return table.iloc[0]


def record(name: str) -> dict[str, Any]:
    """The record results/<name>.json."""
    return json.loads((workspace.RESULTS / f"{name}.json").read_text())


def file(name: str) -> dict[str, Any]:
    """Bytes, MiB and sha256 of a file in results/."""
    size = (path := workspace.RESULTS / name).stat().st_size
    return {"bytes": size, "mib": size / MIB, "sha256": sha256(path)}


def minutes(name: str) -> float:
    """Minutes to read a notebook: one for 200 words of its text, and one for two figures."""
    cells = nbformat.read(workspace.NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    words = sum(len(MARK.sub("", c.source).split()) for c in cells if c.cell_type == "markdown")
    figures = sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", []))
    return words / 200 + figures / 2


def exponent(table: pd.DataFrame, column: str, by: str) -> float:
    """How a column grows with `by`: the slope of the logarithms between its two largest values."""
    (x1, y1), (x2, y2) = np.log(table.nlargest(2, by)[[by, column]].to_numpy())
    return float((y1 - y2) / (x1 - x2))


@cache
def _environment() -> jinja2.Environment:
    how = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(BLOCKS), **how)
    environment.filters |= {"to": text.write, "percent": "{:.1%}".format}
    helpers = [rows, row, record, file, minutes, exponent, bits_of_equal_damage]
    helpers += [profile_parameters, text.interval, text.table, text.markdown, text.holds]
    helpers += [text.name, text.method]
    environment.globals |= {helper.__name__: helper for helper in helpers}
    about = yaml.safe_load((workspace.ROOT / "CITATION.cff").read_text())
    environment.globals |= {"poster": poster, "citation": about, "CLAIMS": text.CLAIMS | text.NOTE}
    environment.globals |= {"COMPARED": text.COMPARED, "rise": claims.MNIST_MARGIN}
    environment.globals |= {"reference": REFERENCE, "notebooks": [p.stem for p in notebooks()]}
    return environment


def block(name: str, profile: str = "small") -> str:
    """The text of one block; ValueError that names it where it is missing or no longer holds."""
    try:
        rendered = _environment().get_template(f"{name}.md.j2").render(profile=profile)
    except (ValueError, LookupError, OSError, jinja2.TemplateError) as error:
        raise ValueError(f"docs/blocks/{name}.md.j2: {type(error).__name__}: {error}") from error
    return re.sub(r"\n{3,}", "\n\n", rendered.strip())


def filled(page: str, profile: str = "small") -> str:
    """A page with its marked blocks up to date; ValueError for a mark without block or end."""
    page, count = MARKED.subn(lambda m: f"{m[1]}{block(m['name'], profile)}\n{m[3]}", page)
    if 2 * count != (marks := len(MARK.findall(page))):
        raise ValueError(f"{marks} marks make {count} blocks: <!-- name --> needs <!-- /name -->")
    return page


def fill_notebook(notebook: nbformat.NotebookNode, profile: str) -> None:
    """Fill the marks of a notebook's Markdown cells with a profile's numbers."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = filled(cell.source, profile)
