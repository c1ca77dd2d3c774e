"""The pages with numbers (README, docs/, model card), filled from results/ between `<!-- name -->`
and `<!-- /name -->` marks.
"""

import re

from lafq.study import workspace
from lafq.tensors import atomic_write
from tools.summary import blocks

PATH, CARD = workspace.ROOT / "README.md", workspace.ROOT / "results" / "MODEL_CARD.md"
PAGES = (PATH, CARD, *sorted((workspace.ROOT / "docs").glob("*.md")))


def filled(text: str, profile: str = "mini") -> str:
    """A page with every marked block brought up to date; ValueError for a mark that names no block,
    or is not closed.
    """
    content = blocks(profile)

    def block(match: re.Match) -> str:
        if match["name"] not in content:
            raise ValueError(
                f"a page has a block marked {match['name']!r}: known are {', '.join(content)}"
            )
        return f"{match['open']}{content[match['name']]}\n{match['close']}"

    text, found = re.subn(
        r"(?P<open><!-- (?P<name>\w+) -->\n).*?(?P<close><!-- /(?P=name) -->)",
        block,
        text,
        flags=re.DOTALL,
    )
    if 2 * found != len(marks := re.findall(r"<!-- /?\w+ -->", text)):
        raise ValueError(
            f"{len(marks)} marks make {found} blocks: every <!-- name --> needs its <!-- /name -->"
        )
    return text


def refresh() -> None:
    """Write the pages' numbers anew."""
    for path in PAGES:
        text = filled(path.read_text())
        with atomic_write(path) as temporary:
            temporary.write_text(text)
