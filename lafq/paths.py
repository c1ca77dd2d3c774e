"""Folders of the repository, found from this file so that any working directory will do."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
RESULTS = ROOT / "results"
FIGURES = ROOT / "figures"
BUILD = ROOT / "build"
