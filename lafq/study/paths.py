"""Folders of the repository, found from this file so that any working directory will do.

LAFQ_OUTPUT names another folder to hold results/ and figures/.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
BUILD = ROOT / "build"
OUTPUT = Path(os.environ.get("LAFQ_OUTPUT") or ROOT)
RESULTS = OUTPUT / "results"
FIGURES = OUTPUT / "figures"
