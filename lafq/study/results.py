"""The study's tables and images as files: how the notebooks make, keep and load them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import nn

from lafq.study import poster
from lafq.study.images.evaluate import evaluate
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.rows import KEY, Row
from lafq.study.workspace import Workspace, load_table, save_table

METHODS = ("baseline", "uniform", "global", "group", "mean_std", "ratio")


def save_rows(
    work: Workspace, name: str, table: pd.DataFrame, images: dict[str, np.ndarray]
) -> None:
    """Write what `evaluate.evaluate` returned."""
    ImageStore(work).save_rows(name, table, images)


def load_rows(
    work: Workspace, name: str, with_baseline: bool = False
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Read what `save_rows` wrote, on request with the baseline of 01_train as the first row.

    Raises ValueError for a baseline of other images or sampling steps.
    """
    table, images = ImageStore(work).load_rows(name)
    if with_baseline:
        baseline, its_images = load_rows(work, "01_baseline")
        for column in ("n_images", "steps"):
            if (theirs := baseline[column].iloc[0]) != (ours := table[column].iloc[0]):
                raise ValueError(
                    f"01_baseline has {column} {theirs}, {name} has {ours}: run 01_train with the "
                    f"same settings"
                )
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
    """Evaluate the candidates of a notebook and write its table and its images.

    compared: those of the rows that go into paper_comparison.csv. The rest as in
    `evaluate.evaluate`.
    """
    table, images = evaluate(work, model, rows, sampling, inception_reference)
    save_rows(work, name, table, images)
    keys = {row[: len(KEY)] for row in compared}
    if keys:
        compared_rows = table[[key in keys for key in table[KEY].itertuples(index=False)]]
        update_comparison(work, poster.compare(compared_rows, work.profile))


def update(work: Workspace, name: str, rows: pd.DataFrame) -> None:
    """Put rows into the table <name>.csv in place of those of the same KEY."""
    there = (work.results / f"{name}.csv").is_file()
    known = load_table(work, name) if there else None
    save_table(work, name, pd.concat([known, rows]).drop_duplicates(KEY, keep="last"))


def update_comparison(work: Workspace, rows: pd.DataFrame) -> pd.DataFrame:
    """Put rows of `poster.compare` into results/<profile>/paper_comparison.csv in place of those of
    the same rules.

    Returns the rows as the file has them.
    """
    if (work.results / "paper_comparison.csv").is_file():
        old = load_table(work, "paper_comparison")
        # The file's own columns may be in another order, or fewer, where an earlier version wrote
        # it.
        rows = pd.concat([old[~old["rule"].isin(rows["rule"])], rows])[list(rows.columns)]
    rows = rows.drop_duplicates(KEY, keep="last")
    order = [METHODS.index(rule) for rule in rows["rule"]]
    rows = rows.assign(order=order).sort_values(["order", *KEY[1:]], kind="stable")
    save_table(work, "paper_comparison", rows.drop(columns="order"))
    return load_table(work, "paper_comparison")
