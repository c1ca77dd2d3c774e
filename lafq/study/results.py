"""The study's tables and images as files: how the notebooks make, keep and load them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from lafq.study import claims, poster
from lafq.study.images import samples
from lafq.study.images.evaluate import evaluate, load_inception, measure_peak_memory
from lafq.study.images.samples import Sampling
from lafq.study.rows import KEY, Row
from lafq.study.workspace import Workspace
from lafq.tensors import atomic_write

METHODS = ("baseline", "uniform", "global", "group", "mean_std", "ratio")


def save_table(work: Workspace, name: str, table: pd.DataFrame) -> None:
    """Write results/<profile>/<name>.csv, six significant digits."""
    with atomic_write(work.results / f"{name}.csv") as temporary:
        old = ["method", "threshold"] if "rounding" in table else []
        table.drop(columns=old, errors="ignore").to_csv(temporary, index=False, float_format="%.6g")


def load_table(work: Workspace, name: str) -> pd.DataFrame:
    """Read results/<profile>/<name>.csv; FileNotFoundError names the remedy when there is none.

    `setting` is text ("tau=1.2e-05", "0.35").
    """
    return with_old_names(_read(work, name))


def _read(work: Workspace, name: str) -> pd.DataFrame:
    path = _existing(work, f"{name}.csv")
    text = {"setting": str, "threshold": str}
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])


def with_old_names(table: pd.DataFrame) -> pd.DataFrame:
    """Columns method and threshold beside the key: for figures and pages, until they read the key."""
    if "rounding" not in table:
        return table
    endings = {
        "tuned": ", tuned",
        "nearest": {"allocate": ", nearest code"},
        "feedback": {"allocate": "", "allocate_all": ""},
    }
    methods = []
    for row in table.itertuples():
        ending = endings.get(row.rounding, "")
        if isinstance(ending, dict):
            ending = ending.get(row.rule, ", error feedback" if row.rounding == "feedback" else "")
        name = {"allocate": "allocator", "allocate_all": "allocator, all weights"}.get(row.rule)
        if row.format == "coded":
            name, ending = "allocator, entropy-coded", ""
        if row.format == "any" and name is None:
            name = f"by {row.rule}"
        methods.append(f"{name or row.rule}{ending}")
    table = table.assign(method=methods)
    if "setting" in table:
        table["threshold"] = table["setting"]
    if "choice" in table:
        table["threshold"] += ", " + table["choice"]
    return table


def load_optional(work: Workspace, name: str) -> pd.DataFrame | None:
    """Read a table that not every profile has; None where it has not been made."""
    return load_table(work, name) if _there(work, name) else None


def save_images(work: Workspace, name: str, images: dict[str, np.ndarray]) -> None:
    """Write generated images, uint8 (N, 32, 32) by key, to results/<profile>/<name>.npz."""
    with atomic_write(work.results / f"{name}.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **images)


def load_images(work: Workspace, name: str) -> dict[str, np.ndarray]:
    """Read what `save_images` wrote."""
    with np.load(_existing(work, f"{name}.npz")) as file:
        return dict(file)


def save_rows(
    work: Workspace, name: str, table: pd.DataFrame, images: dict[str, np.ndarray]
) -> None:
    """Write what `evaluate.evaluate` returned: the table, and the images unless they are kept in
    results/<profile>/samples.
    """
    if work.keep:
        (work.results / f"{name}.npz").unlink(missing_ok=True)
    else:
        save_images(work, name, images)
    save_table(work, name, table)


def load_rows(
    work: Workspace, name: str, with_baseline: bool = False
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Read what `save_rows` wrote, from where the images are, on request with the baseline of
    01_train as the first row.

    Raises ValueError for a baseline of other images or sampling steps.
    """
    table = load_table(work, name)
    if not (work.results / f"{name}.npz").is_file() and samples.samples_folder(work).is_dir():
        images = {
            row.sample: samples.stored_images(work, row.sample, row.n_images)
            for row in table.itertuples()
        }
    else:
        images = load_images(work, name)
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


def compute_or_load(work: Workspace, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table results/<profile>/<name>.csv, made and written first where the workspace computes."""
    if work.compute:
        save_table(work, name, make())
    return load_table(work, name)


def evaluate_rows(
    work: Workspace,
    name: str,
    model: nn.Module,
    rows: list[Row],
    sampling: Sampling,
    inception_reference: int = 0,
    compared: Sequence[Row] = (),
) -> None:
    """Evaluate the candidates of a notebook and write its table, its images and their peak memory.

    compared: those of the rows that go into paper_comparison.csv. The rest as in
    `evaluate.evaluate`.
    """
    table, images = evaluate(work, model, rows, sampling, inception_reference)
    save_rows(work, name, table, images)
    update(work, "peak_memory", measure_peak_memory(work, model, rows))
    keys = {row[: len(KEY)] for row in compared}
    if keys:
        compared_rows = table[[key in keys for key in table[KEY].itertuples(index=False)]]
        update_comparison(work, poster.compare(compared_rows, work.profile))


def update(work: Workspace, name: str, rows: pd.DataFrame) -> None:
    """Put rows into the table <name>.csv in place of those of the same KEY."""
    known = _read(work, name) if _there(work, name) else None
    save_table(work, name, pd.concat([known, rows]).drop_duplicates(KEY, keep="last"))


def update_comparison(work: Workspace, rows: pd.DataFrame) -> pd.DataFrame:
    """Put rows of `poster.compare` into results/<profile>/paper_comparison.csv in place of those of
    the same rules.

    Returns the rows as the file has them.
    """
    if _there(work, "paper_comparison"):
        old = _read(work, "paper_comparison")
        # The file's own columns may be in another order, or fewer, where an earlier version wrote
        # it.
        rows = pd.concat([old[~old["rule"].isin(rows["rule"])], rows])[list(rows.columns)]
    rows = rows.drop_duplicates(KEY, keep="last")
    order = [METHODS.index(rule) for rule in rows["rule"]]
    rows = rows.assign(order=order).sort_values(["order", *KEY[1:]], kind="stable")
    save_table(work, "paper_comparison", rows.drop(columns="order"))
    return load_table(work, "paper_comparison")


def save_claims(work: Workspace, name: str, found: list[claims.Claim]) -> None:
    """Write claims as the table `name`."""
    save_table(work, name, pd.DataFrame(found))


def image_claims(
    work: Workspace, seed: int, inception_reference: int, rows: Sequence[str]
) -> list[claims.Claim]:
    """C3, where its sweep is there, and C4, from these tables of rows with their images."""
    tables, images = zip(*(load_rows(work, name) for name in rows), strict=True)
    table = pd.concat(tables, ignore_index=True)
    by = claims.judge(
        {k: v for found in images for k, v in found.items()},
        seed,
        load_inception(work, inception_reference),
    )
    return [*claims.best_ratio(table, by), claims.layerwise_images(table, by)]


def fisher_claims(work: Workspace, seed: int) -> list[claims.Claim]:
    """C1 and C2 on every kind of Fisher information that 02 has estimated."""
    weights = (
        load_table(work, "02_fisher").drop_duplicates("parameter").set_index("parameter")["weights"]
    )
    blocks = load_table(work, "02_fisher_blocks")
    other = load_optional(work, "02_fisher_kinds")
    kinds = {"empirical, noised digits": blocks} | (
        dict(iter(other.groupby("kind", sort=False))) if other is not None else {}
    )
    return [
        claim
        for kind, rows in kinds.items()
        for claim in claims.fisher_claims(rows, weights, kind, seed)
    ]


def _there(work: Workspace, name: str) -> bool:
    return (work.results / f"{name}.csv").is_file()


def _existing(work: Workspace, name: str) -> Path:
    path = work.results / name
    if not path.is_file():
        raise FileNotFoundError(
            f"results/{work.profile}/{name} is missing: `make reproduce PROFILE={work.profile}` "
            f"makes it"
        )
    return path
