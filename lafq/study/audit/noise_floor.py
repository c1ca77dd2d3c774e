"""What FID and KID show of real against real digits, and of the unquantized model, at every number
of images.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lafq.rng import generator
from lafq.study.diffusion.mnist import HELD_OUT, mnist
from lafq.study.diffusion.subject import load_model
from lafq.study.images import metrics
from lafq.study.images.features import inception_extractor, mnist_extractor
from lafq.study.images.metrics import Reference
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.workspace import Workspace

SIZES = (50, 100, 200, 500, 1000, 2000, 5000)
BLOCKS = 20
EXTRAPOLATED_FROM = 200
INCEPTION_REFERENCE = 2000


def floor(features: Tensor, reference: Reference, seed: int) -> pd.DataFrame:
    """FID and KID of disjoint blocks of N of the features (M, d) against the reference: columns
    metric, n, mean, sd, blocks.

    The row with n = inf is FID extrapolated to infinite N from the mean FID of N >= 200
    (`metrics.fid_at_infinity`).
    """
    order = torch.randperm(len(features), generator=generator(seed))
    rows = []
    for n in (n for n in SIZES if n <= len(features)):
        blocks = torch.stack(
            [order[i * n : (i + 1) * n] for i in range(min(BLOCKS, len(features) // n))]
        )
        for metric, draws in (("fid", metrics.fid_draws), ("kid", metrics.kid_draws)):
            values = draws(features, reference, blocks)
            rows.append(
                (
                    metric,
                    n,
                    values.mean().item(),
                    values.std().item() if len(blocks) > 1 else np.nan,
                    len(blocks),
                )
            )
    table = pd.DataFrame(rows, columns=["metric", "n", "mean", "sd", "blocks"])
    line = table[(table["metric"] == "fid") & (table["n"] >= EXTRAPOLATED_FROM)]
    beyond = metrics.fid_at_infinity(line["n"], line["mean"])
    return pd.concat(
        [table, pd.DataFrame([("fid", np.inf, beyond, np.nan, 1)], columns=table.columns)],
        ignore_index=True,
    )


def noise_floor(parameters: dict[str, Any]) -> pd.DataFrame:
    """`floor` of real held-out digits and of the unquantized model's images, on MNIST and Inception
    features.

    The references are 5,000 digits, for Inception 2,000 (none where the profile has no Inception
    columns)."""
    p, work = (
        parameters,
        Workspace.open(parameters["PROFILE"], parameters["THREADS"], parameters["DEVICE"]),
    )
    sampling = Sampling(p["CHECK_IMAGES"], p["SAMPLING_STEPS"], p["SEED"])
    generated = ImageStore(work).draw(load_model(work, p["WIDTH"]), sampling).images
    digits = mnist(train=False)[0][HELD_OUT]
    extractors = {"MNIST": mnist_extractor()}
    if inception := inception_extractor(INCEPTION_REFERENCE if p["INCEPTION_REFERENCE"] else 0):
        extractors["Inception"] = inception
    tables = [
        floor(extractor.features(x).features, extractor.reference, p["SEED"]).assign(
            features=name, images=images
        )
        for name, extractor in extractors.items()
        for images, x in (("real", digits), ("generated", generated))
    ]
    return pd.concat(tables, ignore_index=True)[
        ["features", "images", "metric", "n", "mean", "sd", "blocks"]
    ]
