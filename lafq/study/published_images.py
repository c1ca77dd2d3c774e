"""Sets of images scored: those that the authors published, real digits and our own beside them at
every N (the noise floor), and those of rows that FID and damage order differently.

The published images stand in the authors' repository (github.com/doeunyy/ewha-laqfi, commit
7e9838e2). They are not copied here: `make evidence PUBLISHED=path` reads a clone of that
repository, or an npz file with the arrays of SETS, and writes both tables of results/published.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.stats import chi2_contingency
from torch import Tensor

from lafq.rng import generator
from lafq.study import workspace
from lafq.study.claims import holm
from lafq.study.diffusion.mnist import HELD_OUT, mnist, unpadded
from lafq.study.images import metrics
from lafq.study.images.features import FeatureExtractor, inception_extractor, mnist_extractor
from lafq.study.images.metrics import Reference
from lafq.study.workspace import Workspace

PUBLISHED, UNQUANTIZED = Workspace("published"), "FP32"
# By the name of its array: what a set is, its folder in the authors' repository, and its number of
# images.
SETS = {
    "fp32": (UNQUANTIZED, "generated_images", 5000),
    "whole": ("uniform FP16", "quant_whole", 5000),
    "threshold_1": ("global", "images/quant_threshold/1", 5000),
    "group": ("group", "images/layer_group", 5000),
    "ratio_0.25": ("ratio 0.25", "images/layer_ratio/0.25", 5000),
    "math_k1_a0.5": ("mean_std", "images/layer_math/adaptive_k_1_alpha_0.5", 1500),
}
# The sets whose FID the authors' README has: against 28x28 digits as well (R6).
README, UNPADDED = (UNQUANTIZED, "ratio 0.25"), "Inception, real digits 28x28"
REAL = slice(100, 5000)  # training digits, for Inception features
SIZES, FLOOR_SIZES = (100, 1000), (50, 100, 200, 500, 1000, 2000, 5000)
FLOOR_BLOCKS, EXTRAPOLATED_FROM, FLOOR_REFERENCE = 20, 200, 2000
PERMUTATIONS = 1999
REAL_DIGITS, FRAME = "real digits", 2


def read(path: Path) -> dict[str, Tensor]:
    """The published images by what they are (SETS), uint8 (N, 1, 32, 32), from a clone of the
    authors' repository or an npz file.

    Raises FileNotFoundError when there is nothing at `path`, ValueError when a set is missing or
    has another number of images.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: give a clone of the authors' repository, or an npz file of "
            f"their images"
        )
    if path.is_file():
        with np.load(path) as file:
            arrays = {name: file[name] for name in SETS if name in file}
    else:
        arrays = {name: _pictures(path / folder) for name, (_, folder, _) in SETS.items()}
    for name, (_, folder, count) in SETS.items():
        if (there := len(arrays.get(name, ()))) != count:
            raise ValueError(
                f"{path} has {there} images of the set {name} ({folder}), not {count}: is it the "
                f"right commit?"
            )
    return {SETS[name][0]: torch.from_numpy(array)[:, None] for name, array in arrays.items()}


def _pictures(folder: Path) -> np.ndarray:
    """PNG files as grey images (N, 32, 32), in the order of the numbers in their names."""
    files = sorted(folder.rglob("*.png"), key=lambda path: (len(path.stem), path.stem))
    return np.array([np.asarray(Image.open(path).convert("L")) for path in files])


def block_scores(
    features: Tensor,
    logits: Tensor | None,
    reference: Reference,
    seed: int,
    sizes: list[int],
    most: int | None = None,
) -> pd.DataFrame:
    """FID, KID and (from logits) IS of features (M, d): mean and standard deviation over (at most
    so many) disjoint blocks of N.

    Columns n, blocks, fid, fid_sd, kid, kid_sd, is, is_sd.
    """
    order, rows = torch.randperm(len(features), generator=generator(seed)), []
    for n in sizes:
        blocks = order[: len(order) // n * n].view(-1, n)[:most]
        draws = metrics.score_draws(features, logits, reference, blocks)
        row = {"n": n, "blocks": len(blocks)}
        for name, values in draws.items():
            row |= {name: values.mean().item(), f"{name}_sd": pd.Series(values.numpy()).std()}
        rows.append(row)
    return pd.DataFrame(rows)


def compared(features: dict[str, Tensor], classes: dict[str, Tensor], seed: int) -> pd.DataFrame:
    """Every set against the unquantized one, and as a control two halves of the unquantized one
    against each other.

    features: (N, d) by set; classes: predicted digits (N,). Columns:
    fid_to_fp32: FID between up to 2,500 images of the set and the second half of the unquantized
    one;
    kid_p: permutation test of the squared MMD that KID estimates (Gretton et al. 2012, "A kernel
    two-sample test");
    classes_p: chi-squared test of the predicted digits; *_holm: corrected for the number of sets
    and both tests;
    digit, share, share_fp32: the digit whose share differs most.
    """
    everything = features[UNQUANTIZED], classes[UNQUANTIZED]
    order = torch.randperm(len(everything[0]), generator=generator(seed))
    first, second = ([of_all[part] for of_all in everything] for part in order.chunk(2))
    statistics, rows = Reference(second[0]), []
    for name in features:
        control = name == UNQUANTIZED
        one, digits = first if control else (features[name], classes[name])
        other, other_digits = second if control else everything
        counts = torch.stack([x.bincount(minlength=10) for x in (digits, other_digits)]).numpy()
        shares = counts / counts.sum(1, keepdims=True)
        most = int(abs(shares[0] - shares[1]).argmax())
        row = {"set": f"{name}, one half against the other" if control else name}
        row |= {"images": len(one), "images_fp32": len(other)}
        row["fid_to_fp32"] = metrics.fid(one[: len(second[0])], statistics)
        row["kid_to_fp32"], row["kid_p"] = mmd_test(one, other, seed)
        row["classes_p"] = chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue
        rows.append(row | {"digit": most, "share": shares[0, most], "share_fp32": shares[1, most]})
    table, ps = pd.DataFrame(rows), ["kid_p", "classes_p"]
    # The control tests no set, so it stays out of the correction.
    corrected = holm(table.loc[1:, ps].to_numpy().T.ravel().tolist())
    for p, values in zip(ps, np.reshape(corrected, (2, -1)), strict=True):
        table.loc[1:, f"{p}_holm"] = values
    return table


def mmd_test(
    x: Tensor, y: Tensor, seed: int, permutations: int = PERMUTATIONS
) -> tuple[float, float]:
    """The unbiased squared MMD of features (n, d) and (m, d) under KID's kernel, and its
    permutation p value.
    """
    pooled = torch.cat([x, y]).double()
    kernel = (pooled @ pooled.T).div_(pooled.shape[1]).add_(1).pow_(3).fill_diagonal_(0)
    n, m = len(x), len(y)
    chosen = torch.zeros(permutations + 1, n + m, dtype=torch.float64)
    chosen[0, :n] = 1
    g = generator(seed, n, m)
    for row in chosen[1:]:
        row[torch.randperm(n + m, generator=g)[:n]] = 1
    rows = kernel.sum(1)
    within = ((chosen @ kernel) * chosen).sum(1)
    across = chosen @ rows - within
    among = rows.sum() - within - 2 * across
    mmd = within / (n * (n - 1)) + among / (m * (m - 1)) - 2 * across / (n * m)
    return mmd[0].item(), (mmd >= mmd[0]).double().mean().item()


def measure(path: Path, seed: int) -> None:
    """Read the published images and write results/published/compared.csv and scores.csv."""
    images, extractor = read(path), mnist_extractor()
    seen = {name: extractor.features(x) for name, x in images.items()}
    digits = {name: of_set.logits.argmax(1) for name, of_set in seen.items()}
    table = compared({name: of_set.features for name, of_set in seen.items()}, digits, seed)
    workspace.save_table(PUBLISHED, "compared", table)
    scored = [("MNIST", name, *of_set, extractor.reference) for name, of_set in seen.items()]
    if inception := inception_extractor(REAL.stop - REAL.start):
        real = mnist(train=True)[0][REAL]
        references = {
            kind: Reference(inception.features(x).features)
            for kind, x in (("Inception", real), (UNPADDED, unpadded(real)))
        }
        for name, x in images.items():
            of_set = inception.features(x)
            kinds = references if name in README else ["Inception"]
            scored += [(kind, name, *of_set, references[kind]) for kind in kinds]
    tables = [
        block_scores(*of_set, seed, [*SIZES, len(of_set[0])]).assign(features=kind, set=name)
        for kind, name, *of_set in scored
    ]
    table = pd.concat(tables, ignore_index=True)
    first = ["features", "set"]
    workspace.save_table(PUBLISHED, "scores", table[[*first, *table.columns.drop(first)]])


def floor(features: Tensor, reference: Reference, seed: int) -> pd.DataFrame:
    """FID and KID of disjoint blocks of N of the features (M, d): columns metric, n, mean, sd,
    blocks; FID at n = inf is extrapolated from the means at N >= 200 (`metrics.fid_at_infinity`).
    """
    sizes = [n for n in FLOOR_SIZES if n <= len(features)]
    wide = block_scores(features, None, reference, seed, sizes, FLOOR_BLOCKS)
    fid, kid = (
        wide.rename(columns={metric: "mean", f"{metric}_sd": "sd"}).assign(metric=metric)
        for metric in ("fid", "kid")
    )
    line = fid[fid["n"] >= EXTRAPOLATED_FROM]
    beyond = {"mean": metrics.fid_at_infinity(line["n"], line["mean"]), "blocks": 1}
    at_infinity = pd.DataFrame([{"metric": "fid", "n": np.inf, "sd": np.nan, **beyond}])
    table = pd.concat([fid, kid, at_infinity])[["metric", "n", "mean", "sd", "blocks"]]
    return table.sort_values("n", kind="stable", ignore_index=True)


def noise_floor(generated: Tensor, seed: int, inception: bool) -> pd.DataFrame:
    """`floor` of real held-out digits and of the unquantized model's images, on MNIST and, if asked
    for, Inception features; the references are 5,000 digits, for Inception 2,000.
    """
    extractors = {"MNIST": mnist_extractor()}
    extractors["Inception"] = inception_extractor(FLOOR_REFERENCE if inception else 0)
    sets = {"real": mnist(train=False)[0][HELD_OUT], "generated": generated}
    tables = [
        floor(extractor.features(x).features, extractor.reference, seed).assign(
            features=name, images=images
        )
        for name, extractor in extractors.items()
        if extractor
        for images, x in sets.items()
    ]
    columns = ["features", "images", "metric", "n", "mean", "sd", "blocks"]
    return pd.concat(tables, ignore_index=True)[columns]


def image_statistics(images: dict[str, Tensor], extractor: FeatureExtractor) -> pd.DataFrame:
    """FID and its two terms, ink and digits of sets of images: one row per set.

    images: by name, uint8 (N, 1, 32, 32), with the unquantized model's. Columns:
    fid_mnist = mean_term + covariance_term: the squared distance of the mean features from the
    reference's, and the rest (Heusel et al. 2017, equation 6);
    ink, background: mean grey value (0 to 1) of the image, and of its outer frame of 2 pixels,
    black in real digits;
    class_changed: share of images whose predicted digit is not that of the unquantized model's
    image from the same noise;
    digit, share: the digit predicted most often, and how often.
    """
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    mean = torch.as_tensor(extractor.reference.statistics["mu"])
    seen, rows = {name: extractor.features(x) for name, x in images.items()}, []
    for name, (features, logits) in seen.items():
        pixels, digits = images[name].double() / 255, logits.argmax(1)
        row = {"images": name, "n_images": len(digits)}
        row["fid_mnist"] = metrics.fid(features, extractor.reference)
        row["mean_term"] = (features.double().mean(0) - mean).square().sum().item()
        row["covariance_term"] = row["fid_mnist"] - row["mean_term"]
        row |= {"ink": pixels.mean().item(), "background": pixels[..., frame].mean().item()}
        if name != REAL_DIGITS:
            changed = digits != seen[UNQUANTIZED].logits.argmax(1)
            row["class_changed"] = changed.double().mean().item()
        shares = torch.bincount(digits, minlength=10) / len(digits)
        rows.append(row | {"digit": int(shares.argmax()), "share": shares.max().item()})
    return pd.DataFrame(rows)


def with_damage(table: pd.DataFrame, budget: pd.DataFrame) -> pd.DataFrame:
    """A table of `image_statistics` with the damage of each set's model, from rows of
    `damage.measure_damage`.
    """
    damages = {
        f"{row.rule} INT{row.budget_bits:.0f}"
        if row.granularity == "tensor"
        else f"{row.rule}, {row.budget_bits:g} bits per weight": row.damage
        for row in budget[budget["rounding"] == "nearest"].itertuples()
    }
    return table.assign(damage=table["images"].map(damages))
