"""How a notebook opens, and how it saves its figures."""

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lafq.study.workspace import Workspace
from lafq.tensors import atomic_write

MODELS = {"smoke": "profile smoke", "mini": "width 16", "paper": "width 64"}


def set_style() -> None:
    """From here on tables show sentences whole, and figures have the style of all notebooks."""
    pd.options.display.max_colwidth = None
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette="colorblind",
        rc={"figure.constrained_layout.use": True},
    )


def open_workspace(
    profile: str, compute: bool, threads: int, device: str, **settings: bool | str
) -> Workspace:
    """`Workspace.open` in the notebooks' style; prints the line a notebook opens with, where its
    tables come from.
    """
    set_style()
    work = Workspace.open(profile, threads, device, compute=compute, **settings)
    if compute:
        print(f"COMPUTE is true: everything below is computed now and written to results/{profile}")
    else:
        print(
            f"COMPUTE is false: tables and images are loaded from results/{profile}, as the last "
            f"`make reproduce` wrote them"
        )
    return work


def save_figure(
    work: Workspace,
    name: str,
    figure: Figure,
    note: str = "",
    pixels: bool = False,
    model: str = "",
) -> None:
    """Write figures/<profile>/<name>.png and .svg, without dates so that equal figures are equal
    bytes.

    pixels: the figure is made of images, so only the .png is written. Below: the model (by default
    the width of the profile's), and the note (what the bars are).
    """
    below = "; ".join(part for part in (model or MODELS.get(work.profile, ""), note) if part)
    figure.text(1, -0.01, below, ha="right", va="top", fontsize=8, color="0.35")
    with matplotlib.rc_context({"svg.hashsalt": name}):
        kinds = (("png", {"Software": None}), ("svg", {"Date": None}))
        for suffix, metadata in kinds[:1] if pixels else kinds:
            with atomic_write(work.figures / f"{name}.{suffix}") as temporary:
                figure.savefig(
                    temporary, format=suffix, dpi=150, bbox_inches="tight", metadata=metadata
                )
