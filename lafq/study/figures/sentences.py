"""What the figures say of FID: the features that it is on, and what other noise does to it."""

import pandas as pd

from lafq.study import poster

FEATURES = {"fid_inception": "Inception", "fid_mnist": "MNIST"}


def mean_inside_range(rows: pd.DataFrame) -> float:
    """Mean FID (MNIST features) of the INT8 ratios that the poster calls best minus that of the
    others.
    """
    sweep = _int8_ratios(rows)
    means = (
        sweep["fid_mnist"]
        .groupby(sweep["threshold"].astype(float).between(*poster.BEST_RATIOS))
        .mean()
    )
    return means[True] - means[False]


def _int8_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[
        (rows["method"] == "ratio") & (rows["format"] == "int8") & (rows["granularity"] == "weight")
    ]


def noise_caption(table: pd.DataFrame, noise: pd.DataFrame | None, metric: str) -> str:
    """The second line of a title: how much other noise moves the FID of one model at the table's N.

    noise: the table of `noise_floor.noise_floor`, where it has been made; metric: fid_inception or
    fid_mnist.
    """
    if noise is None:
        return "other noise was not measured for this model"
    rows = noise[
        (noise["features"] == FEATURES[metric])
        & (noise["images"] == "generated")
        & (noise["metric"] == "fid")
    ]
    spread = rows[rows["n"] == table["n_images"].iloc[0]]["sd"]
    return (
        f"other noise moves it by ±{spread.item():.1f}, 1 sd"
        if len(spread)
        else "other noise was not measured at this N"
    )
