"""Sets of images scored: those that the authors published, real digits and our own beside them at
every N (the noise floor), and those of rows that FID and damage order differently.

The published images are not copied here: `make evidence PUBLISHED=path` reads a clone of the
authors' repository (github.com/doeunyy/ewha-laqfi, commit 7e9838e2), or an npz file with the arrays
of SETS, and writes both tables of results/published.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.stats import chi2_contingency
from torch import Tensor

from lafq.rng import generator
from lafq.study.claims import holm
from lafq.study.diffusion.subject import HELD_OUT, mnist, unpadded
from lafq.study.images import metrics
from lafq.study.images.features import FeatureExtractor, Features, extractors_of
from lafq.study.images.metrics import Reference
from lafq.study.workspace import Workspace, save_table

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
REAL_DIGITS, FRAME = "real digits", 2


def read(path: Path) -> dict[str, Tensor]:
    """The published images by what they are (SETS), uint8 (N, 1, 32, 32)."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: give a clone of the authors' repository")
    if path.is_file():
        with np.load(path) as file:
            arrays = {name: file[name] for name in SETS if name in file}
    else:
        arrays = {name: _pictures(path / folder) for name, (_, folder, _) in SETS.items()}
    for name, (_, folder, count) in SETS.items():
        if (there := len(arrays.get(name, ()))) != count:
            wrong = f"{path} has {there} images of the set {name} ({folder})"
            raise ValueError(f"{wrong}, not {count}: is it the right commit?")
    return {SETS[name][0]: torch.from_numpy(array)[:, None] for name, array in arrays.items()}


def _pictures(folder: Path) -> np.ndarray:
    """PNG files as grey images (N, 32, 32), in the order of the numbers in their names."""
    files = sorted(folder.rglob("*.png"), key=lambda path: (len(path.stem), path.stem))
    return np.array([np.asarray(Image.open(path).convert("L")) for path in files])


def block_scores(
    seen: Features, reference: Reference, seed: int, sizes: list[int], most: int | None = None
) -> pd.DataFrame:
    """Mean and standard deviation of each metric over (at most so many) disjoint blocks of N."""
    order, rows = torch.randperm(len(seen.features), generator=generator(seed)), []
    for n in sizes:
        blocks = order[: len(order) // n * n].view(-1, n)[:most]
        row = {"n": n, "blocks": len(blocks)}
        for name, values in metrics.score_draws(*seen, reference, blocks).items():
            row |= {name: values.mean().item(), f"{name}_sd": pd.Series(values.numpy()).std()}
        rows.append(row)
    return pd.DataFrame(rows)


def compared(sets: dict[str, tuple[Tensor, Tensor]], seed: int) -> pd.DataFrame:
    """Every set against the unquantized one, and as a control two halves of that against each
    other (columns: results/README.md). sets: features (N, d) and predicted digits (N,) by name.
    """
    unquantized = sets[UNQUANTIZED]
    order = torch.randperm(len(unquantized[0]), generator=generator(seed))
    first, second = ([values[half] for values in unquantized] for half in order.chunk(2))
    statistics, rows = Reference(second[0]), []
    pairs = {f"{UNQUANTIZED}, one half against the other": (first, second)}
    pairs |= {name: (sets[name], unquantized) for name in sets if name != UNQUANTIZED}
    for name, ((features, digits), (other, other_digits)) in pairs.items():
        counts = torch.stack([x.bincount(minlength=10) for x in (digits, other_digits)]).numpy()
        shares = counts / counts.sum(1, keepdims=True)
        most = int(abs(shares[0] - shares[1]).argmax())
        row = {"set": name, "images": len(features), "images_fp32": len(other)}
        row["fid_to_fp32"] = metrics.fid(features[: len(second[0])], statistics)
        row["kid_to_fp32"], row["kid_p"] = mmd_test(features, other, seed)
        row["classes_p"] = chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue
        rows.append(row | {"digit": most, "share": shares[0, most], "share_fp32": shares[1, most]})
    table = pd.DataFrame(rows)
    # The control tests no set, so it stays out of the correction.
    ps = table.loc[1:, ["kid_p", "classes_p"]]
    corrected = np.reshape(holm(ps.to_numpy().ravel().tolist()), ps.shape)
    return table.join(pd.DataFrame(corrected, ps.index, ps.columns + "_holm"))


def mmd_test(x: Tensor, y: Tensor, seed: int, permutations: int = 1999) -> tuple[float, float]:
    """Unbiased squared MMD of features (n, d) and (m, d) under KID's kernel, and its permutation
    p (Gretton et al. 2012, "A kernel two-sample test").
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
    images, (extractor, *others) = read(path), extractors_of(REAL.stop - REAL.start)
    seen = {name: extractor.features(x) for name, x in images.items()}
    sets = {name: (features, logits.argmax(1)) for name, (features, logits) in seen.items()}
    save_table(PUBLISHED, "compared", compared(sets, seed))
    scored = {("MNIST", name): (of_set, extractor.reference) for name, of_set in seen.items()}
    for inception in others:
        real = mnist(train=True)[0][REAL]
        references = {"Inception": real, UNPADDED: unpadded(real)}
        references = {k: Reference(inception.features(x).features) for k, x in references.items()}
        for name, x in images.items():
            of_set = inception.features(x)
            kinds = references if name in README else ["Inception"]
            scored |= {(kind, name): (of_set, references[kind]) for kind in kinds}
    tables = {
        key: block_scores(of_set, reference, seed, [*SIZES, len(of_set.features)])
        for key, (of_set, reference) in scored.items()
    }
    scores = pd.concat(tables, names=["features", "set"]).droplevel(-1).reset_index()
    save_table(PUBLISHED, "scores", scores)


def floor(features: Tensor, reference: Reference, seed: int) -> pd.DataFrame:
    """FID and KID of disjoint blocks of N of features (M, d); at n = inf the extrapolated FID."""
    sizes = [n for n in FLOOR_SIZES if n <= len(features)]
    wide = block_scores(Features(features, None), reference, seed, sizes, FLOOR_BLOCKS)
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
    """`floor` of held-out digits and of the FP32 model's images, by feature extractor."""
    sets = {"real": mnist(train=False)[0][HELD_OUT], "generated": generated}
    extractors = extractors_of(FLOOR_REFERENCE if inception else 0)
    tables = {
        (name, images): floor(extractor.features(x).features, extractor.reference, seed)
        for name, extractor in zip(("MNIST", "Inception"), extractors, strict=False)
        for images, x in sets.items()
    }
    return pd.concat(tables, names=["features", "images"]).droplevel(-1).reset_index()


def image_statistics(images: dict[str, Tensor], extractor: FeatureExtractor) -> pd.DataFrame:
    """FID with its two terms (Heusel et al. 2017, equation 6), ink and digits of sets of images."""
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
    """A table of `image_statistics` with the damage of each set's model (rows of `budget.csv`)."""
    rows = budget.query("rounding == 'nearest'")
    bits = rows["budget_bits"]
    uniform = rows["rule"] + bits.map(" INT{:.0f}".format)
    ruled = rows["rule"] + bits.map(", {:g} bits per weight".format)
    names = uniform.where(rows["granularity"] == "tensor", ruled)
    return table.assign(damage=table["images"].map(dict(zip(names, rows["damage"], strict=True))))
