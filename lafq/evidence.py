"""What takes longer than `make reproduce` may: `make evidence` makes it, step by step, and the notebooks load it.

Steps whose tables are there already are left alone (`--anew` makes them again); within a step, images that were sampled
and training that was done before an interruption are kept in build/<profile>.
"""

import argparse

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lafq import classifier, evaluation, experiment, intervals, metrics, paths, replicates, report
from lafq.data import HELD_OUT, mnist
from lafq.evaluation import inception_features, sampled
from lafq.metrics import Reference
from lafq.run import profile_parameters
from lafq.seeds import generator

SIZES = (50, 100, 200, 500, 1000, 2000, 5000)
BLOCKS = 20
EXTRAPOLATED_FROM = 200
IMAGES = 1000


def floor(features: Tensor, reference: Reference, seed: int) -> pd.DataFrame:
    """FID and KID of disjoint blocks of N of the features (M, d) against the reference: columns metric, n, mean, sd, blocks.

    The row with n = inf is FID extrapolated to infinite N: the intercept of a line through the mean FID of N >= 200 over 1 / N
    (Chong and Forsyth 2020, "Effectively Unbiased FID and Inception Score").
    """
    order = torch.randperm(len(features), generator=generator(seed))
    rows = []
    for n in (n for n in SIZES if n <= len(features)):
        blocks = torch.stack([order[i * n : (i + 1) * n] for i in range(min(BLOCKS, len(features) // n))])
        for metric, draws in (("fid", intervals.fid_draws), ("kid", intervals.kid_draws)):
            values = draws(reference, blocks)(features)
            rows.append((metric, n, values.mean().item(), values.std().item() if len(blocks) > 1 else np.nan, len(blocks)))
    table = pd.DataFrame(rows, columns=["metric", "n", "mean", "sd", "blocks"])
    line = table[(table["metric"] == "fid") & (table["n"] >= EXTRAPOLATED_FROM)]
    _, intercept = np.polyfit(1 / line["n"], line["mean"], 1)
    return pd.concat([table, pd.DataFrame([("fid", np.inf, intercept, np.nan, 1)], columns=table.columns)], ignore_index=True)


def noise_floor(profile: str) -> pd.DataFrame:
    """`floor` of real held-out digits and of the unquantized model's images, on MNIST and Inception features."""
    p = profile_parameters(profile)
    device = experiment.set_up(profile, p["THREADS"], p["DEVICE"])
    model = experiment.load_model(profile, p["WIDTH"], device)
    key, generated = sampled(model, profile, p["CHECK_IMAGES"], p["SAMPLING_STEPS"], p["SEED"])
    digits = mnist(train=False)[0][HELD_OUT]
    network = classifier.load()
    seen = [
        ("MNIST", images, metrics.mnist_features(network, x)[0], metrics.mnist_reference(network))
        for images, x in (("real", digits), ("generated", generated))
    ]
    if eye := inception_features(profile, p["INCEPTION_REFERENCE"]):
        sets = (("real", "held_out", digits), ("generated", key, generated))
        seen += [("Inception", images, eye.of(name, x), eye.reference) for images, name, x in sets]
    tables = [floor(f, reference, p["SEED"]).assign(features=name, images=images) for name, images, f, reference in seen]
    return pd.concat(tables, ignore_index=True)[["features", "images", "metric", "n", "mean", "sd", "blocks"]]


def rows(profile: str, images: int = IMAGES) -> dict[str, pd.DataFrame]:
    """The rows that C3 and C4 speak of with ten times the images, on disjoint blocks too, and these claims at that N."""
    p = profile_parameters(profile)
    device = experiment.set_up(profile, p["THREADS"], p["DEVICE"])
    model, fisher = experiment.load_model(profile, p["WIDTH"], device), experiment.load_fisher(profile, p["WIDTH"])
    claimed = replicates.claimed_rows(model, fisher, p["CUTS"])
    table, samples = evaluation.evaluate(model, claimed, profile, images=images, steps=p["SAMPLING_STEPS"], seed=p["SEED"])
    table = table.merge(evaluation.in_blocks(samples, table["sample"][0], images // 10), on="sample", how="left")
    return {"rows": table, "rows_claims": pd.DataFrame(replicates.on_images(table, samples, p["SEED"]))}


def runs(profile: str, seeds: tuple[int, ...] = replicates.SEEDS, **training: int) -> dict[str, pd.DataFrame]:
    """Rows and claims of models trained from other seeds, and each claim over them."""
    found = [replicates.replicate(profile, seed, **training) for seed in seeds]
    table, claims = (pd.concat(parts, ignore_index=True) for parts in zip(*found, strict=True))
    return {"runs": table, "runs_claims": claims, "runs_over": replicates.over_runs(claims)}


STEPS = {
    "noise_floor": lambda profile: {"noise_floor": noise_floor(profile)},
    "evidence_rows": lambda profile: {f"evidence_{name}": table for name, table in rows(profile).items()},
    "evidence_runs": lambda profile: {f"evidence_{name}": table for name, table in runs(profile).items()},
}


def main() -> None:
    """Make the steps that are missing."""
    parser = argparse.ArgumentParser(prog="lafq.evidence")
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--anew", action="store_true", help="make every step again")
    parser.add_argument("--only", default="", choices=["", *STEPS])
    args = parser.parse_args()
    for name, make in STEPS.items():
        if args.only not in ("", name):
            continue
        if (paths.RESULTS / args.profile / f"{name}.csv").is_file() and not args.anew:
            print(f"{name}: there already, in results/{args.profile}")
            continue
        # The step's own table comes last: where it is, the others are.
        for table, content in sorted(make(args.profile).items(), key=lambda item: item[0] == name):
            report.save_table(args.profile, table, content)
            print(f"{table}: written to results/{args.profile}")


if __name__ == "__main__":
    main()
