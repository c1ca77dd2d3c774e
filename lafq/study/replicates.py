"""Other training runs: the claims on models that differ from each other in the training seed alone.

The first run is the shipped model; the others train anew with the settings of the profile. Every
run takes its own Fisher information, thresholds and images. It gives each claim as one number. An
interval over images cannot show how that number varies from run to run. A run computes with one
thread, so that its numbers do not depend on how many runs share a machine.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import nn

from lafq.allocation.rules import relative_to_group
from lafq.rng import generator
from lafq.study import claims, poster, threshold_rows
from lafq.study.claims import Claim
from lafq.study.diffusion import training
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.subject import load_model
from lafq.study.diffusion.unet import UNet, quantizable
from lafq.study.fisher_analysis import fisher_by_timestep
from lafq.study.images.evaluate import evaluate
from lafq.study.images.metrics import LEVEL
from lafq.study.images.sampling import Sampling
from lafq.study.rows import BASELINE, Row
from lafq.study.verdict import verdict
from lafq.study.workspace import Workspace

SEEDS = (0, 1, 2, 3, 4)
RATIOS_OF_MEANS = ("C1", "C2")
# The row that C4 compares is another one in each run.
VARYING = {
    "C4 images": "FID of the layer or group row nearest to uniform FP16 in bytes, minus FID of uniform FP16"
}


def claimed_rows(model: nn.Module, fisher: dict[str, torch.Tensor], count: int) -> list[Row]:
    """The rows C3 and C4 speak of, in INT8: the baseline, uniform FP16, the group row at the
    paper's size, the ratios.
    """
    scores = {"weight": relative_to_group(fisher)}
    sizes = threshold_rows.size_sweep(model, scores["weight"], "int8", "weight", count)
    group = threshold_rows.candidates_at(
        "group", "factor", threshold_rows.nearest_size(sizes, poster.TARGET_SHARE["group"]), scores
    )
    ratios = threshold_rows.ratio_candidates(fisher, list(poster.RATIOS), [], ["int8"])
    return [
        BASELINE,
        *threshold_rows.uniform(model, ("fp16",)),
        *group,
        *(row for row in ratios if row.granularity == "weight"),
    ]


def on_images(table: pd.DataFrame, images: dict[str, np.ndarray], seed: int) -> list[Claim]:
    """C3 (INT8) and C4 (images) on the rows of `claimed_rows` with their images, on MNIST features."""
    by = claims.judge(images, seed, None)
    return [*claims.best_ratio(table, by, ["int8"]), claims.layerwise_images(table, by)]


def trained(work: Workspace, parameters: dict[str, Any], seed: int) -> UNet:
    """The model of a seed: the shipped one for the profile's seed; else trained, on from its
    checkpoint where there is one.
    """
    if seed == parameters["SEED"]:
        return load_model(work, parameters["WIDTH"])
    torch.manual_seed(int(torch.randint(2**62, (), generator=generator(seed))))
    settings = {**parameters["TRAINING"], "seed": seed}
    model = UNet(parameters["WIDTH"], settings.pop("dropout")).to(
        work.device, memory_format=torch.channels_last
    )
    checkpoint = work.build / f"replicate_{seed}.pt"
    weights, _ = training.fit(model, mnist(train=True)[0], checkpoint, **settings)
    result = UNet(parameters["WIDTH"])
    result.load_state_dict(weights)
    return result.eval().to(work.device, memory_format=torch.channels_last)


def replicate(parameters: dict[str, Any], seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One run: its rows as `evaluate.evaluate` gives them, and its claims; both with columns seed
    and steps in front.
    """
    p, work = parameters, Workspace.open(parameters["PROFILE"], 1, parameters["DEVICE"])
    model, digits = trained(work, p, seed), mnist(train=True)[0]
    fisher = fisher_by_timestep(
        model,
        list(quantizable(model)),
        digits,
        samples=p["FISHER_SAMPLES"],
        bins=p["TIMESTEP_BINS"],
        seed=seed,
    )
    rows = claimed_rows(model, fisher.by_weight, p["THRESHOLDS"])
    table, images = evaluate(work, model, rows, Sampling(p["IMAGES"], p["SAMPLING_STEPS"], seed))
    weights = fisher.timesteps.drop_duplicates("parameter").set_index("parameter")["weights"]
    found = claims.fisher_claims(fisher.blocks, weights, "empirical, noised digits", seed)
    table_of_claims = pd.DataFrame([*found, *on_images(table, images, seed)])
    run = {"seed": seed, "steps": p["TRAINING"]["steps"]}
    return tuple(
        t.assign(**run)[[*run, *(c for c in t if c not in run)]] for t in (table, table_of_claims)
    )


def over_runs(found_by_run: pd.DataFrame) -> pd.DataFrame:
    """Each claim over training runs: rows `seed, claim, paper, quantity, measured, ...` become one
    Claim each.

    The interval is Student's t over the runs (of the logarithm where the number is a ratio of
    means), at least two of them.
    """
    found = []
    for name, rows in found_by_run.groupby("claim", sort=False):
        ratio = name in RATIOS_OF_MEANS
        forth, back = (math.log, math.exp) if ratio else (float, float)
        mean, low, high = (back(v) for v in _student([forth(v) for v in rows["measured"]]))
        found_verdict = verdict(
            low, high, above=name in claims.NULL, null=claims.NULL.get(name, 0.0)
        )
        what = VARYING.get(name, rows["quantity"].iloc[0])
        quantity = f"{what}; {'geometric mean' if ratio else 'mean'} of {len(rows)} training runs"
        found.append(Claim(name, rows["paper"].iloc[0], quantity, mean, low, high, found_verdict))
    return pd.DataFrame(found)


def _student(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval."""
    if len(values) < 2:
        raise ValueError(f"{len(values)} training run: an interval over runs needs at least two")
    low, high = stats.ttest_1samp(values, 0).confidence_interval(LEVEL)
    return sum(values) / len(values), float(low), float(high)
