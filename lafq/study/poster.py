"""The published values as data, and the comparison of ours with them.

Source: "Layer-Adaptive Quantization on Diffusion Model using Fisher Information", poster, IEIE
Symposium 2024, and the README of the authors' repository. The paper's "MB" are MiB (2**20 bytes).
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

BASELINE_MIB = 134.20
RATIOS = (0.30, 0.32, 0.35, 0.38, 0.40, 0.42, 0.45, 0.48)
BEST_RATIOS = (0.35, 0.40)
WIDTH, SAMPLING_STEPS = 64, 1000
# 14,062 steps of 64 digits are its 15 epochs.
TRAINING = {"steps": 14062, "peak": 2e-5, "dropout": 0.1, "ema_decay": 0.9999}


class Published(NamedTuple):
    """One published row, of so many images; None where the source gives no value."""

    method: str
    threshold: str
    fid: float
    inception_score: float | None
    mem_mib: float | None
    images: int = 100
    source: str = "poster"


POSTER = (
    Published("baseline", "none", 59.3030, 1.7225, 134.20),
    Published("global", "one tau", 59.7148, 2.0846, 71.48),
    # The poster's memory of the next row is cut off after "134."
    Published("group", "three taus", 57.8034, 1.7356, None),
    Published("mean_std", "mean -+ k*std", 55.5387, None, 81.56),
    Published("ratio", "0.30", 59.9, None, None, source="poster's plot"),
    Published("ratio", "0.32", 61.3, None, None, source="poster's plot"),
    Published("ratio", "0.35", 56.2130, 1.7628, 68.02),
    Published("ratio", "0.38", 55.6704, 1.8436, 64.23),
    Published("ratio", "0.40", 57.7688, 1.7454, 67.70),
    Published("ratio", "0.42", 64.1, None, None, source="poster's plot"),
    Published("ratio", "0.45", 63.3, None, None, source="poster's plot"),
    Published("ratio", "0.48", 62.1, None, None, source="poster's plot"),
)
# Rows whose memory the poster does not state; that of the group row is of two groups.
README = (
    Published("uniform", "all", 24.1324, None, 67.7, 5000, "README"),
    Published("group", "12 / 3456", 23.84, None, 67.9, 5000, "README"),
)


def published(rule: str, setting: str = "") -> tuple[float | None, float | None, float | None]:
    """The poster's FID and IS of a row, and its MiB (the README's where the poster has none)."""
    rows = [row for row in POSTER + README if row.method == rule and setting in (row.threshold, "")]
    scores = ((row.fid, row.inception_score) for row in rows if row in POSTER)
    memory = (row.mem_mib for row in rows if row.mem_mib)
    return *next(scores, (None, None)), next(memory, None)


# The share of the baseline's bytes our row of each rule is chosen to come nearest to.
TARGET_SHARE = {rule: published(rule)[2] / BASELINE_MIB for rule in ("global", "group", "mean_std")}


def new_noise(scores: pd.DataFrame, images: int = 100) -> float:
    """Standard deviation of the FID difference of two draws of so many of the authors' images."""
    unquantized = scores.query("features == 'Inception' and set == 'FP32' and n == @images")
    return 2**0.5 * unquantized["fid_sd"].item()


def beside_noise(scores: pd.DataFrame) -> pd.DataFrame:
    """The poster's rows and the points of its plot, POSTER's columns: the `change` of FID from its
    FP32's, and `z`, this over `new_noise`.
    """
    table = pd.DataFrame(POSTER[1:]).assign(change=lambda rows: rows["fid"] - POSTER[0].fid)
    return table.assign(z=table["change"] / new_noise(scores))


def best_ratios(scores: pd.DataFrame) -> pd.Series:
    """Mean FID of the poster's BEST_RATIOS minus that of its other ratios (`change`), `z`, and `p`
    (two-sided) times the number of windows of as many neighbours: the poster chose after seeing.
    """
    sweep = pd.DataFrame([row for row in POSTER if row.method == "ratio"])
    best = sweep["threshold"].astype(float).between(*BEST_RATIOS)
    change = sweep["fid"][best].mean() - sweep["fid"][~best].mean()
    z = change / (new_noise(scores) / 2**0.5 * (1 / best.sum() + 1 / (~best).sum()) ** 0.5)
    p = min(1.0, (len(sweep) - best.sum() + 1) * math.erfc(abs(z) / 2**0.5))
    return pd.Series({"change": change, "z": z, "p": p})


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """Our rows (columns of `evaluate.evaluate`) beside the published values, by rule and ratio."""
    values = [published(r.rule, r.setting if r.rule == "ratio" else "") for r in table.itertuples()]
    ours, columns = table.copy(), ["fid_paper", "is_paper", "mem_paper_mib"]
    ours[columns] = np.array(values, dtype=float)
    # The uniform row that was published is FP16.
    ours.loc[(ours["rule"] == "uniform") & (ours["format"] == "int8"), columns] = np.nan
    ours["mem_share_paper"] = ours["mem_paper_mib"] / BASELINE_MIB
    return ours
