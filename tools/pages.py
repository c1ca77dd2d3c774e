"""The pages and notebooks, typed in docs/blocks/ with slots for numbers, filled from results/.

Text between `<!-- NAME -->` and `<!-- /NAME -->` in a page, or in a Markdown cell of a notebook,
is docs/blocks/NAME.md.j2 rendered by Jinja2.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import nbformat
import numpy as np
import pandas as pd

from lafq.study import workspace
from lafq.study.figures import text
from lafq.tensors import atomic_write

BLOCKS = workspace.ROOT / "docs" / "blocks"
README, CARD = workspace.ROOT / "README.md", workspace.ROOT / "results" / "MODEL_CARD.md"
PAGES = (README, CARD, *sorted((workspace.ROOT / "docs").glob("*.md")))
MARKED = re.compile(
    r"(?P<open><!-- (?P<name>\w+) -->\n).*?(?P<close><!-- /(?P=name) -->)", flags=re.DOTALL
)


@cache
def _table(name: str) -> pd.DataFrame:
    path = workspace.RESULTS / f"{name}.csv"
    if not path.is_file():
        raise ValueError(f"there is no table {name} in results/")
    return pd.read_csv(path, dtype={"setting": str}, keep_default_na=True)


def rows(name: str, **where: Any) -> pd.DataFrame:
    """Rows of results/<name>.csv whose columns have these values (or one of a list of values)."""
    table = _table(name)
    for column, value in where.items():
        if isinstance(value, float):
            table = table[np.isclose(table[column], value)]
        else:
            table = table[table[column].isin(value if isinstance(value, list) else [value])]
    return table


def row(name: str, **where: Any) -> pd.Series:
    """The one row of `rows`; ValueError where there are none or several."""
    found = rows(name, **where)
    if len(found) != 1:
        raise ValueError(f"{name} has {len(found)} rows with {where}, and one is needed")
    return found.iloc[0]


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(BLOCKS),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"to": text.write, "percent": lambda x: f"{x:.1%}"}
    environment.globals |= {
        "rows": rows,
        "row": row,
        "interval": text.interval,
        "table": text.table,
        "markdown": text.markdown,
        "holds": text.holds,
    }
    return environment


def block(name: str, profile: str = "mini") -> str:
    """The text of one block; ValueError that names it where it is not there or no longer holds."""
    try:
        return _environment().get_template(f"{name}.md.j2").render(profile=profile).strip()
    except jinja2.TemplateNotFound:
        raise ValueError(f"a page has a mark {name!r}, but there is no {name}.md.j2") from None
    except ValueError as error:
        raise ValueError(f"docs/blocks/{name}.md.j2: {error}") from error


def filled(page: str, profile: str = "mini") -> str:
    """A page with every marked block brought up to date; ValueError for a mark that names no block,
    or is not closed.
    """
    page, count = MARKED.subn(
        lambda mark: f"{mark['open']}{block(mark['name'], profile)}\n{mark['close']}", page
    )
    if 2 * count != len(marks := re.findall(r"<!-- /?\w+ -->", page)):
        raise ValueError(
            f"{len(marks)} marks make {count} blocks: every <!-- name --> needs its <!-- /name -->"
        )
    return page


def fill_notebook(notebook: nbformat.NotebookNode, profile: str) -> None:
    """Fill the marks of a notebook's Markdown cells with a profile's numbers."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = filled(cell.source, profile)


def refresh(pages: tuple[Path, ...] = PAGES) -> None:
    """Write the pages' numbers anew."""
    for path in pages:
        page = filled(path.read_text())
        with atomic_write(path) as temporary:
            temporary.write_text(page)
