"""The site that `make site` builds: README, docs/ and the committed notebooks, none of which is
executed.
"""

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

project = "lafq"
copyright = "the authors of lafq, MIT"
version = release = installed("lafq")
root_doc = "docs/index"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
include_patterns = [
    *("docs/**", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/*.md", "data/README.md"),
    *("notebooks/*.ipynb", "notebooks/beyond/*.ipynb"),
]
nb_execution_mode = "off"
nb_merge_streams = True
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
default_role = "code"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["lafq.css"]
html_title = "lafq"
html_theme_options = {"navigation_with_keys": True}
