"""The published values as data, and the comparison of ours with them.

Source: "Layer-Adaptive Quantization on Diffusion Model using Fisher Information", poster, IEIE
Symposium 2024, and the README of the authors' repository. The paper's "MB" are MiB (2**20 bytes).
"""

from typing import NamedTuple

import pandas as pd

BASELINE_MIB = 134.20
RATIOS = (0.30, 0.32, 0.35, 0.38, 0.40, 0.42, 0.45, 0.48)
BEST_RATIOS = (0.35, 0.40)
WIDTH, SAMPLING_STEPS = 64, 1000
# 14,062 steps of 64 digits are its 15 epochs.
TRAINING = {"steps": 14062, "peak": 2e-5, "dropout": 0.1, "ema_decay": 0.9999}


class Published(NamedTuple):
    """One published row; None where the source gives no value. fid is of `images` images; mem_mib
    in MiB.
    """

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
    Published(
        "group", "three taus", 57.8034, 1.7356, None
    ),  # the poster's memory is cut off after "134."
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
README = (
    Published("baseline", "none", 22.7512, None, 134.2, 5000, "README"),
    Published("uniform", "all", 24.1324, None, 67.7, 5000, "README"),
    Published("group", "12 / 3456", 23.84, None, 67.9, 5000, "README"),
    Published("ratio", "0.25", 22.42, None, 102.26, 5000, "README"),
    Published("mean_std", "mean and std", 23.16, None, 81.57, 5000, "README"),
)
# The share of the baseline's bytes our row of each method is chosen to come nearest to.
TARGET_SHARE = {
    "global": 71.48 / BASELINE_MIB,
    "group": 67.9 / BASELINE_MIB,  # the README's: the poster's is cut off
    "mean_std": 81.56 / BASELINE_MIB,
}
# The groups that share a threshold under the rule "group".
GROUPS = {
    "Layer1-2": ("Layer1", "Layer2"),
    "Layer3-5": ("Layer3", "Layer4", "Layer5"),
    "Layer6": ("Layer6",),
}
COLUMNS = [
    *(
        "profile",
        *("rule", "setting", "format", "granularity", "rounding"),
        "fid_paper",
        "is_paper",
        "mem_paper_mib",
        "mem_share_paper",
        "mem_mib",
        "mem_share",
        "n_images",
        "steps",
        "same_machine",
    ),
    *(
        f"{name}{end}"
        for metric in (
            "fid_inception",
            "is_inception",
            "kid_inception",
            "fid_mnist",
            "is_mnist",
            "kid_mnist",
        )
        for name in (metric, f"delta_{metric}")
        for end in ("", "_low", "_high")
    ),
    *("rmse", "psnr", "class_changed", "delta_loss", "delta_loss_low", "delta_loss_high"),
]


def group_of(name: str) -> str:
    """The group of a parameter's layer; ValueError for a layer of no group."""
    layer = name.split(".", 1)[0]
    for group, layers in GROUPS.items():
        if layer in layers:
            return group
    known = ", ".join(layer for layers in GROUPS.values() for layer in layers)
    raise ValueError(f"unknown layer {layer!r}: the groups cover {known}")


def compare(table: pd.DataFrame, profile: str) -> pd.DataFrame:
    """Our rows (columns of `evaluate.evaluate`) beside the poster's: matched by method, and by
    ratio where it has one.

    FID and IS are the poster's (100 images); memory falls back on the README's where the poster has
    none.
    """
    ours = table.assign(profile=profile)
    published = [_published(row.rule, row.setting, row.format) for row in ours.itertuples()]
    ours["fid_paper"] = [p.fid if p else None for p, _ in published]
    ours["is_paper"] = [p.inception_score if p else None for p, _ in published]
    ours["mem_paper_mib"] = [m for _, m in published]
    ours[["fid_paper", "is_paper", "mem_paper_mib"]] = ours[
        ["fid_paper", "is_paper", "mem_paper_mib"]
    ].astype(float)
    ours["mem_share_paper"] = ours["mem_paper_mib"] / BASELINE_MIB
    return ours.reindex(columns=COLUMNS)  # tables of earlier versions have fewer


def _published(method: str, threshold: str, low: str) -> tuple[Published | None, float | None]:
    if (method, low) == ("uniform", "int8"):  # the uniform row that was published is FP16
        return None, None
    poster, readme = (
        next(
            (
                p
                for p in rows
                if p.method == method and (method != "ratio" or p.threshold == threshold)
            ),
            None,
        )
        for rows in (POSTER, README)
    )
    memory = next((p.mem_mib for p in (poster, readme) if p and p.mem_mib), None)
    return poster, memory
