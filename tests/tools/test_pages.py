import re
from collections import Counter

import jinja2
import nbformat
import pandas as pd
import pytest

from lafq.study import workspace
from tools import pages, publish

BLOCKS = sorted(path.name.removesuffix(".md.j2") for path in pages.BLOCKS.glob("[!_]*.md.j2"))
# Names, definitions and limits; every other number of a block is a value of a table.
TYPED = re.compile(
    r"(INT|FP|MIDRISE|bfloat|sha)\d+|\b[CRN]\d\b|Layers? ?\d(-\d)?|`[^`]*`|SA[_ ]3\.0"  # names
    r"|0\.35-0\.40|t (<|>=|<=|=) (1|500)\b|batch 64 |\(15 epochs\)|\(1 \+ r\) / 2"  # the poster's
    r"|32x32|28x28|500 real|2\*\*20|255 grey|95 % interval"
    r"|(below|Below|contains?|less than) [01]\b|\b(1|2|3|6|8|64|2 to 32)( FID| bits?| dB| passes)"
    r"|^\d\. |0[267]_\w+",
    flags=re.MULTILINE,
)


@pytest.mark.parametrize("path", pages.PAGES, ids=lambda p: p.name)
def test_numbers_on_a_page_are_those_of_results(path):
    text = path.read_text()
    assert pages.filled(text) == text


@pytest.mark.parametrize("path", pages.notebooks(), ids=lambda p: p.stem)
def test_numbers_in_a_notebooks_text_are_those_of_results(path):
    profile = publish.declared(path)["PROFILE"]
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            assert pages.filled(cell.source, profile) == cell.source


def test_every_block_is_used_once():
    read = [nbformat.read(path, as_version=4) for path in pages.notebooks()]
    cells = [c.source for n in read for c in n.cells if c.cell_type == "markdown"]
    texts = (*(path.read_text() for path in pages.PAGES), *cells)
    assert Counter(m["name"] for t in texts for m in pages.MARKED.finditer(t)) == Counter(BLOCKS)


@pytest.mark.parametrize(
    "text",
    ["<!-- nonsense -->\n<!-- /nonsense -->", "<!-- claims -->\n"],
    ids=["unknown", "not closed"],
)
def test_marks_that_make_no_block(text):
    with pytest.raises(ValueError, match=r"nonsense|marks make 0 blocks"):
        pages.filled(text)


def test_a_changed_number_is_noticed():
    text = pages.README.read_text()
    assert "| 59.3 |" in text
    changed = text.replace("| 59.3 |", "| 59.4 |")
    assert pages.filled(changed) != changed


@pytest.fixture
def typed(monkeypatch):
    """Blocks typed in a test, by name; a table `made` of two rows."""
    environment = pages._environment().overlay(loader=jinja2.DictLoader(blocks := {}), cache_size=0)
    table = pd.DataFrame({"rule": ["global", "ratio"], "bits": [4.0, 3.02], "x": [0.5, 2.0]})
    monkeypatch.setattr(pages, "_environment", lambda: environment)
    monkeypatch.setattr(pages, "_table", lambda path: table)
    return blocks


def test_a_block_reads_rows_by_their_values(typed):
    typed["said.md.j2"] = (
        '{{ row("made", rule="ratio").x | to(".1f") }} {{ rows("made", bits=3.02) | length }} '
        '{{ rows("made", rule=["global", "ratio"], x=0.5) | length }} '
        "{{ 0.125 | percent }} {{ profile }}"
    )
    assert pages.block("said", "paper") == "2.0 1 1 12.5% paper"
    typed["two.md.j2"] = '{{ row("made").x }}'
    with pytest.raises(ValueError, match=r"two\.md\.j2.*2 rows"):
        pages.block("two")


def test_a_comparison_that_no_longer_holds_stops_with_the_blocks_name(typed):
    typed["said.md.j2"] = (
        '{{ holds(row("made", rule="global").x < row("made", rule="ratio").x) }}less'
    )
    assert pages.block("said") == "less"
    typed["said.md.j2"] = typed["said.md.j2"].replace("<", ">")
    with pytest.raises(ValueError, match=r"docs/blocks/said\.md\.j2.*no longer"):
        pages.block("said")


def test_the_badge_opens_binder_once_the_address_is_known(monkeypatch):
    address = {"repository-code": "https://github.com/us/lafq"}
    monkeypatch.setitem(pages._environment().globals, "citation", address)
    link = "(https://mybinder.org/v2/gh/us/lafq/HEAD?labpath=notebooks/explore.ipynb)"
    assert link in pages.block("badges")


def test_minutes_count_text_and_figures_but_no_code(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "NOTEBOOKS", tmp_path)
    drawn = nbformat.v4.new_output("display_data", {"image/png": ""})
    code = nbformat.v4.new_code_cell("x " * 999, outputs=[drawn])
    cells = [nbformat.v4.new_markdown_cell("<!-- a -->" + " word" * 300), code]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    assert pages.minutes("a") == 300 / 200 + 1 / 2


def test_an_exponent_is_the_slope_between_the_two_largest():
    table = pd.DataFrame({"n": [1.0, 10.0, 100.0], "s": [5.0, 2.0, 200.0]})
    assert pages.exponent(table, "s", "n") == pytest.approx(2)


@pytest.mark.parametrize("path", sorted(pages.BLOCKS.glob("*.j2")), ids=lambda p: p.name)
def test_no_number_is_typed_in_a_block(path):
    words = re.sub(r"\{[{%#].*?[}%#]\}", "", path.read_text(), flags=re.DOTALL)
    assert not re.findall(r".*\d.*", TYPED.sub("", words))
