"""Other training runs: the claims on models that differ from each other in the training seed alone.

Every run trains anew, as the profile says but for fewer steps, takes its own Fisher information, thresholds and images, and
gives each claim as one number; the spread of that number over the runs is what an interval over images cannot show.
"""

import math

import pandas as pd
import torch
from scipy import stats
from torch import nn

from lafq import evaluation, experiment, paper, paths, plans, training, verdicts
from lafq.data import mnist
from lafq.fisher import empirical_fisher
from lafq.intervals import LEVEL
from lafq.notebooks import profile_parameters
from lafq.plans import Configuration
from lafq.seeds import generator
from lafq.thresholds import relative_to_group
from lafq.unet import UNet, quantizable
from lafq.verdicts import Claim

SEEDS = (1, 2, 3)
STEPS, DECAY = 600, 200
RATIOS_OF_MEANS = ("C1", "C2")


def claimed_rows(model: nn.Module, fisher: dict[str, torch.Tensor], cuts: int) -> list[Configuration]:
    """The rows C3 and C4 speak of, in INT8: the baseline, uniform FP16, the group row at the paper's size, the ratios."""
    scores = {"weight": relative_to_group(fisher)}
    sizes = plans.sweep(model, scores["weight"], "int8", "weight", cuts)
    group = plans.at_cuts("group", "factor", plans.nearest(sizes, paper.TARGET_SHARE["group"]), scores)
    ratios = plans.ratio_configurations(fisher, list(paper.RATIOS), [], ["int8"])
    baseline = Configuration("baseline", "none", "fp32", "none", {})
    return [baseline, *plans.uniform(model, ("fp16",)), *group, *(row for row in ratios if row.unit == "weight")]


def on_images(table: pd.DataFrame, images: dict, seed: int) -> list[Claim]:
    """C3 (INT8) and C4 (images) on the rows of `claimed_rows` with their images."""
    return [verdicts.best_ratio(table, images, "int8", seed), verdicts.layerwise_images(table, images, seed)]


def trained(profile: str, seed: int, steps: int = STEPS, decay: int = DECAY) -> UNet:
    """A model trained from another seed; it goes on from its checkpoint in build/<profile>, where there is one."""
    p = profile_parameters(profile)
    device = experiment.set_up(profile, p["THREADS"], p["DEVICE"])
    torch.manual_seed(int(torch.randint(2**62, (), generator=generator(seed))))
    settings = {**p["TRAINING"], "steps": steps, "decay": decay, "seed": seed}
    model = UNet(p["WIDTH"], settings.pop("dropout")).to(device, memory_format=torch.channels_last)
    checkpoint = paths.BUILD / profile / f"replicate_{seed}.safetensors"
    weights, _ = training.fit(model, mnist(train=True)[0], checkpoint, **settings)
    result = UNet(p["WIDTH"])
    result.load_state_dict(weights)
    return result.eval().to(device, memory_format=torch.channels_last)


def replicate(profile: str, seed: int, steps: int = STEPS, decay: int = DECAY) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One run: its rows as `evaluation.evaluate` gives them, and its claims; both with columns seed and steps in front."""
    p = profile_parameters(profile)
    model = trained(profile, seed, steps, decay)
    samples = max(p["TIMESTEP_BINS"], p["FISHER_SAMPLES"] // 4)
    fisher = empirical_fisher(
        model, list(quantizable(model)), mnist(train=True)[0], samples=samples, bins=p["TIMESTEP_BINS"], seed=seed
    )
    rows = claimed_rows(model, fisher.weights, p["CUTS"])
    table, images = evaluation.evaluate(model, rows, profile, images=p["IMAGES"], steps=p["SAMPLING_STEPS"], seed=seed)
    found = [verdicts.later_steps(fisher.timesteps, seed), verdicts.front_layers(fisher.timesteps, seed)]
    claims = pd.DataFrame([*found, *on_images(table, images, seed)])
    return tuple(t.assign(seed=seed, steps=steps)[["seed", "steps", *t.columns]] for t in (table, claims))


def over_runs(claims: pd.DataFrame) -> pd.DataFrame:
    """Each claim over training runs: rows `seed, claim, paper, quantity, measured, ...` become one Claim a claim.

    The interval is Student's t over the runs (of the logarithm where the number is a ratio of means), at least two of them.
    """
    found = []
    for name, rows in claims.groupby("claim", sort=False):
        ratio = name in RATIOS_OF_MEANS
        forth, back = (math.log, math.exp) if ratio else (float, float)
        mean, low, high = (back(v) for v in _student([forth(v) for v in rows["measured"]]))
        bound = verdicts.verdict(low, high, 1.0 if ratio else 0.0, above=ratio)
        quantity = f"{'geometric mean' if ratio else 'mean'} of the {len(rows)} training runs' numbers"
        found.append(Claim(name, rows["paper"].iloc[0], quantity, mean, low, high, bound))
    return pd.DataFrame(found)


def _student(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval."""
    if len(values) < 2:
        raise ValueError(f"{len(values)} training run: an interval over runs needs at least two")
    series = pd.Series(values)
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * series.sem()
    return series.mean(), series.mean() - half, series.mean() + half
