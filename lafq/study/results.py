"""The tables of rows and their images as files: how the notebooks make, keep and load them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import nn

from lafq.study import poster, workspace
from lafq.study.images.evaluate import evaluate
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.rows import KEY, Row
from lafq.study.workspace import Workspace, load_optional, load_table, save_table

COMPARED_RULES = ("baseline", "uniform", *poster.TARGET_SHARE, "ratio")


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
    compared: Sequence[Row] = (),
) -> None:
    """`evaluate.evaluate`, written as a table with its images; the rows `compared` go into
    paper_comparison.csv too.
    """
    table, images = evaluate(work, model, rows, sampling, inception_reference)
    save_rows(work, name, table, images)
    keys = {row[: len(KEY)] for row in compared}
    if keys:
        chosen = table[[key in keys for key in table[KEY].itertuples(index=False)]]
        update_comparison(work, poster.compare(chosen, work.profile))


def update(work: Workspace, name: str, rows: pd.DataFrame) -> None:
    """Put rows into the table <name>.csv in place of those of the same KEY."""
    table = pd.concat([load_optional(work, name), rows])
    save_table(work, name, table.drop_duplicates(KEY, keep="last"))


def update_comparison(work: Workspace, rows: pd.DataFrame) -> pd.DataFrame:
    """Put rows of `poster.compare` into paper_comparison.csv in place of those of the same rules;
    returns the file's rows.
    """
    old = load_optional(work, "paper_comparison")
    if old is not None:
        # An earlier version may have written other columns, or in another order.
        rows = pd.concat([old[~old["rule"].isin(rows["rule"])], rows])[list(rows.columns)]
    rows = rows.drop_duplicates(KEY, keep="last").assign(
        order=lambda t: t["rule"].map(COMPARED_RULES.index)
    )
    rows = rows.sort_values(["order", *KEY[1:]], kind="stable").drop(columns="order")
    save_table(work, "paper_comparison", rows)
    return load_table(work, "paper_comparison")
