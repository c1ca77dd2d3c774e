"""Tables, images and figures of the notebooks: where they are kept, and how they are written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import nn

from lafq import paths
from lafq.evaluation import samples
from lafq.evaluation.candidates import KEY, Candidate
from lafq.evaluation.evaluate import evaluate, peak_memory
from lafq.io import atomic_write
from lafq.paper import claims, poster

METHODS = ("baseline", "uniform", "global", "group", "mean_std", "ratio")


def source(compute: bool, profile: str) -> str:
    """The line a notebook opens with: where its tables come from. From here on tables show their sentences whole."""
    pd.options.display.max_colwidth = None
    folder = f"results/{profile}"
    if compute:
        return f"COMPUTE is true: everything below is computed now and written to {folder}"
    return f"COMPUTE is false: tables and images are loaded from {folder}, as the last `make reproduce` wrote them"


def save_table(profile: str, name: str, table: pd.DataFrame) -> None:
    """Write results/<profile>/<name>.csv, six significant digits."""
    with atomic_write(paths.RESULTS / profile / f"{name}.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def load_table(profile: str, name: str) -> pd.DataFrame:
    """Read results/<profile>/<name>.csv; FileNotFoundError names the remedy when there is none."""
    path = _existing(profile, f"{name}.csv")
    return pd.read_csv(path, dtype={"threshold": str}, keep_default_na=False, na_values=[""])


def load_optional(profile: str, name: str) -> pd.DataFrame | None:
    """Read a table that not every profile has; None where it has not been made."""
    return load_table(profile, name) if (paths.RESULTS / profile / f"{name}.csv").is_file() else None


def save_images(profile: str, name: str, images: dict[str, np.ndarray]) -> None:
    """Write generated images, uint8 (N, 32, 32) by key, to results/<profile>/<name>.npz."""
    with atomic_write(paths.RESULTS / profile / f"{name}.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **images)


def load_images(profile: str, name: str) -> dict[str, np.ndarray]:
    """Read what `save_images` wrote."""
    with np.load(_existing(profile, f"{name}.npz")) as file:
        return dict(file)


def save_rows(profile: str, name: str, table: pd.DataFrame, images: dict[str, np.ndarray]) -> None:
    """Write what `evaluate.evaluate` returned: the table, and the images unless they are kept in results/<profile>/samples."""
    if not samples.kept_folder(profile).is_dir():
        save_images(profile, name, images)
    save_table(profile, name, table)


def load_rows(profile: str, name: str, with_baseline: bool = False) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Read what `save_rows` wrote, on request with the baseline of 01_train as the first row."""
    table = load_table(profile, name)
    if (paths.RESULTS / profile / "peak_memory.csv").is_file():
        table = table.merge(load_table(profile, "peak_memory"), on=KEY, how="left")
    if samples.kept_folder(profile).is_dir():
        images = {row.sample: samples.kept(profile, row.sample, row.n_images) for row in table.itertuples()}
    else:
        images = load_images(profile, name)
    if with_baseline:
        baseline, its_images = load_rows(profile, "01_baseline")
        table, images = pd.concat([baseline, table], ignore_index=True), its_images | images
    return table, images


def save_figure(profile: str, name: str, figure: Figure, note: str = "", pixels: bool = False) -> None:
    """Write figures/<profile>/<name>.png and .svg, without dates so that equal figures are equal bytes.

    pixels: the figure is made of images, so only the .png is written. Below stands the profile, and the note: what the bars are.
    """
    figure.text(1, -0.01, f"profile {profile}" + (f"; {note}" if note else ""), ha="right", va="top", fontsize=8, color="0.35")
    with matplotlib.rc_context({"svg.hashsalt": name}):
        kinds = (("png", {"Software": None}), ("svg", {"Date": None}))
        for suffix, metadata in kinds[:1] if pixels else kinds:
            with atomic_write(paths.FIGURES / profile / f"{name}.{suffix}") as temporary:
                figure.savefig(temporary, format=suffix, dpi=150, bbox_inches="tight", metadata=metadata)


def update_comparison(profile: str, rows: pd.DataFrame) -> pd.DataFrame:
    """Put rows of `poster.compare` into results/<profile>/paper_comparison.csv in place of those of the same methods.

    Returns the rows as the file has them.
    """
    path = paths.RESULTS / profile / "paper_comparison.csv"
    if path.is_file():
        old = load_table(profile, "paper_comparison")
        # The file's own columns may be in another order, or fewer, where an earlier version wrote it.
        rows = pd.concat([old[~old["method"].isin(rows["method"])], rows])[list(rows.columns)]
    rows = rows.drop_duplicates(KEY, keep="last")
    order = [METHODS.index(m) for m in rows["method"]]
    rows = rows.assign(order=order).sort_values(["order", "threshold", "format", "unit"], kind="stable")
    save_table(profile, "paper_comparison", rows.drop(columns="order"))
    return load_table(profile, "paper_comparison")


def compute_or_load(compute: bool, profile: str, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table results/<profile>/<name>.csv, made and written first where `compute` says so."""
    if compute:
        save_table(profile, name, make())
    return load_table(profile, name)


def evaluate_rows(
    profile: str, name: str, model: nn.Module, rows: list[Candidate], compared: list[Candidate] = (), **sampling: Any
) -> None:
    """Evaluate the candidates of a notebook and write its table, its images and their peak memory.

    compared: those of the rows that go into paper_comparison.csv. sampling: settings of `evaluate.evaluate`.
    """
    table, images = evaluate(model, rows, profile, **sampling)
    save_rows(profile, name, table, images)
    update_peaks(profile, peak_memory(model, rows, profile))
    keys = {tuple(getattr(row, column) for column in KEY) for row in compared}
    if keys:
        update_comparison(profile, poster.compare(table[[key in keys for key in table[KEY].itertuples(index=False)]], profile))


def update_claims(profile: str, seed: int) -> None:
    """Write claims.csv from the tables and images of 02, 04 and 05."""
    (table, images), (group, group_images) = (load_rows(profile, name, True) for name in ("05_ratio_sweep", "04_group"))
    rows = pd.concat([table, group], ignore_index=True)
    save_table(profile, "claims", claims.claims_table(load_table(profile, "02_fisher"), rows, images | group_images, seed))


def update_peaks(profile: str, rows: pd.DataFrame) -> None:
    """Put rows of `evaluate.peak_memory` into results/<profile>/peak_memory.csv in place of those of the same key."""
    path = paths.RESULTS / profile / "peak_memory.csv"
    known = [load_table(profile, "peak_memory")] if path.is_file() else []
    save_table(profile, "peak_memory", pd.concat([*known, rows]).drop_duplicates(KEY, keep="last"))


def _existing(profile: str, name: str) -> Path:
    path = paths.RESULTS / profile / name
    if not path.is_file():
        raise FileNotFoundError(f"results/{profile}/{name} is missing: `make reproduce PROFILE={profile}` makes it")
    return path
