"""The tables of rows and their images as files: how the notebooks make, keep and load them."""

import numpy as np
import pandas as pd
from torch import nn

from lafq.study import workspace
from lafq.study.images.evaluate import evaluate
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.rows import KEY, Row
from lafq.study.workspace import Workspace, load_optional, load_table, save_table


def save_rows(
    work: Workspace, name: str, table: pd.DataFrame, images: dict[str, np.ndarray]
) -> None:
    """Write a table of rows, and beside it its images by `sample`, unless the store keeps them."""
    if work.keep:
        (work.results / f"{name}.npz").unlink(missing_ok=True)
    else:
        workspace.save_arrays(work.results / f"{name}.npz", images)
    save_table(work, name, table)


def load_rows(
    work: Workspace, name: str, with_baseline: bool = False
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Read a table of rows and its images, on request with the baseline of 01_train as the first
    row; ValueError for a baseline of other images or sampling steps.
    """
    table, store = load_table(work, name), ImageStore(work)
    if (work.results / f"{name}.npz").is_file() or not store.folder.is_dir():
        images = workspace.load_images(work, name)
    else:
        rows = zip(table["sample"], table["n_images"], strict=True)
        images = {key: store.images(key, count) for key, count in rows}
    if with_baseline:
        baseline, its_images = load_rows(work, "01_baseline")
        for column in ("n_images", "steps"):
            if (theirs := baseline[column].iloc[0]) != (ours := table[column].iloc[0]):
                both = f"01_baseline has {column} {theirs}, {name} has {ours}"
                raise ValueError(f"{both}: run 01_train with the same settings")
        table, images = pd.concat([baseline, table], ignore_index=True), its_images | images
    return table, images


def evaluate_rows(
    work: Workspace,
    name: str,
    model: nn.Module,
    rows: list[Row],
    sampling: Sampling,
    inception_reference: int = 0,
) -> None:
    """`evaluate.evaluate`, written as a table with its images."""
    save_rows(work, name, *evaluate(work, model, rows, sampling, inception_reference))


def update(work: Workspace, name: str, rows: pd.DataFrame) -> None:
    """Put rows into the table <name>.csv in place of those of the same KEY."""
    table = pd.concat([load_optional(work, name), rows])
    save_table(work, name, table.drop_duplicates(KEY, keep="last"))
