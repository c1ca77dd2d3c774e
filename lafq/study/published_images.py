"""The images that the authors published, scored by our metrics and compared with those of their own
unquantized model.

The images stand in the authors' public repository (github.com/doeunyy/ewha-laqfi, commit 7e9838e2).
They are not copied here: `make evidence PUBLISHED=path` reads a clone of that repository, or an npz
file with the arrays of SETS, and writes both tables of results/published. The real digits are
training digits 100-4,999 for Inception features, test digits 0-4,999 for the classifier's.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.stats import chi2_contingency
from torch import Tensor

from lafq.rng import generator
from lafq.study import workspace
from lafq.study.workspace import Workspace
from lafq.tensors import atomic_write

if TYPE_CHECKING:
    # A notebook loads the tables alone; what computes them is imported where it is used.
    from lafq.study.images.features import FeatureExtractor
    from lafq.study.images.metrics import Reference

FOLDER = workspace.RESULTS / "published"
UNQUANTIZED = "FP32"
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
REAL = slice(100, 5000)
SIZES = (100, 1000)
PERMUTATIONS = 1999
README = (
    UNQUANTIZED,
    "ratio 0.25",
)  # the sets whose FID the authors' README has: first, and against 28x28 digits as well (R6)
UNPADDED = "Inception, real digits 28x28"


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
    found = {}
    for name, (words, folder, count) in SETS.items():
        if name not in arrays or len(arrays[name]) != count:
            raise ValueError(
                f"{path} has {len(arrays.get(name, ()))} images of the set {name} ({folder}), not "
                f"{count}: is it the right commit?"
            )
        found[words] = torch.from_numpy(arrays[name])[:, None]
    return found


def scores(
    features: Tensor, logits: Tensor | None, reference: "Reference", seed: int
) -> pd.DataFrame:
    """FID, KID and (from logits) IS of features (M, d): mean and standard deviation over disjoint
    blocks of N, and of all of them.

    Columns n, blocks, fid, fid_sd, kid, kid_sd, is, is_sd.
    """
    from lafq.study.images import metrics

    order, rows = torch.randperm(len(features), generator=generator(seed)), []
    for n in (*SIZES, len(features)):
        count = len(features) // n
        blocks = order[: count * n].view(count, n)
        values = {
            "fid": metrics.fid_draws(features, reference, blocks),
            "kid": metrics.kid_draws(features, reference, blocks),
        }
        if logits is not None:
            values["is"] = metrics.inception_score_draws(logits, blocks)
        row = {"n": n, "blocks": count}
        for name, found in values.items():
            row |= {
                name: found.mean().item(),
                f"{name}_sd": found.std().item() if count > 1 else float("nan"),
            }
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
    from lafq.study.claims import holm
    from lafq.study.images import metrics

    order = torch.randperm(len(features[UNQUANTIZED]), generator=generator(seed))
    first, second = order.chunk(2)
    half = features[UNQUANTIZED][second]
    statistics = metrics.Reference(half)
    rows = []
    for name, found in features.items():
        control = name == UNQUANTIZED
        one, other = (found[first], half) if control else (found, features[UNQUANTIZED])
        digits = [
            classes[name][first] if control else classes[name],
            classes[UNQUANTIZED][second if control else order],
        ]
        counts = torch.stack([torch.bincount(d, minlength=10) for d in digits]).numpy()
        shares = counts / counts.sum(1, keepdims=True)
        most = int(abs(shares[0] - shares[1]).argmax())
        kid, p = mmd_test(one, other, seed)
        row = {
            "set": f"{name}, one half against the other" if control else name,
            "images": len(one),
            "images_fp32": len(other),
        }
        row |= {
            "fid_to_fp32": metrics.fid(one[: len(half)], statistics),
            "kid_to_fp32": kid,
            "kid_p": p,
        }
        row |= {"classes_p": chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue}
        rows.append(row | {"digit": most, "share": shares[0, most], "share_fp32": shares[1, most]})
    table = pd.DataFrame(rows)
    # The control tests no set, so it stays out of the correction.
    tested = table.index[1:]
    corrected = holm([*table.loc[tested, "kid_p"], *table.loc[tested, "classes_p"]])
    for name, part in (
        ("kid_p", corrected[: len(tested)]),
        ("classes_p", corrected[len(tested) :]),
    ):
        table.loc[tested, f"{name}_holm"] = part
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
    found = within / (n * (n - 1)) + among / (m * (m - 1)) - 2 * across / (n * m)
    return found[0].item(), (found >= found[0]).double().mean().item()


def measure(path: Path, seed: int) -> None:
    """Read the published images and write results/published/compared.csv and scores.csv;
    Inception's rows come set by set.
    """
    from lafq.study.diffusion.mnist import mnist, unpadded
    from lafq.study.images.features import inception_extractor, mnist_extractor
    from lafq.study.images.metrics import Reference

    images, extractor = read(path), mnist_extractor()
    seen = {name: extractor.features(x) for name, x in images.items()}
    features = {name: of_set.features for name, of_set in seen.items()}
    digits = {name: of_set.logits.argmax(1) for name, of_set in seen.items()}
    _save("compared", compared(features, digits, seed))
    tables = [
        scores(*seen[name], extractor.reference, seed).assign(features="MNIST", set=name)
        for name in images
    ]
    _save_scores(tables)
    if extractor := inception_extractor(REAL.stop - REAL.start):
        real = mnist(train=True)[0][REAL]
        references = {
            name: Reference(extractor.features(x).features)
            for name, x in (("Inception", real), (UNPADDED, unpadded(real)))
        }
        for name in sorted(images, key=lambda name: name not in README):
            for features, reference in references.items():
                if features == "Inception" or name in README:
                    table = scores(*extractor.features(images[name]), reference, seed)
                    tables.append(table.assign(features=features, set=name))
            _save_scores(tables)
            print(f"{name}: scored on Inception features", flush=True)


def load(name: str) -> pd.DataFrame:
    """The table `scores` or `compared`; FileNotFoundError names what makes it."""
    path = FOLDER / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"results/published/{name}.csv is missing: `make evidence PUBLISHED=path` makes it"
        )
    return pd.read_csv(path)


def fid_noise(images: int = 100) -> float:
    """Standard deviation of Inception FID over blocks of so many of the unquantized model's
    published images.
    """
    rows = load("scores").query(
        f"features == 'Inception' and set == '{UNQUANTIZED}' and n == {images}"
    )
    return rows["fid_sd"].item()


def _save_scores(tables: list[pd.DataFrame]) -> None:
    table = pd.concat(tables, ignore_index=True)
    _save("scores", table[["features", "set", *table.columns.drop(["features", "set"])]])


def _save(name: str, table: pd.DataFrame) -> None:
    with atomic_write(FOLDER / f"{name}.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def _pictures(folder: Path) -> np.ndarray:
    """The PNG files below a folder as grey images (N, 32, 32), in the order of the numbers in their
    names.
    """
    files = sorted(folder.rglob("*.png"), key=lambda path: (len(path.stem), path.stem))
    return (
        np.stack([np.asarray(Image.open(path).convert("L")) for path in files])
        if files
        else np.empty((0, 32, 32), np.uint8)
    )


FLOOR_SIZES = (50, 100, 200, 500, 1000, 2000, 5000)
BLOCKS = 20
EXTRAPOLATED_FROM = 200
INCEPTION_REFERENCE = 2000


def floor(features: Tensor, reference: "Reference", seed: int) -> pd.DataFrame:
    """FID and KID of disjoint blocks of N of the features (M, d) against the reference: columns
    metric, n, mean, sd, blocks.

    The row with n = inf is FID extrapolated to infinite N from the mean FID of N >= 200
    (`metrics.fid_at_infinity`).
    """
    from lafq.study.images import metrics

    order = torch.randperm(len(features), generator=generator(seed))
    rows = []
    for n in (n for n in FLOOR_SIZES if n <= len(features)):
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
    from lafq.study.diffusion.mnist import HELD_OUT, mnist
    from lafq.study.diffusion.subject import load_model
    from lafq.study.images.features import inception_extractor, mnist_extractor
    from lafq.study.images.sampling import ImageStore, Sampling

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


REAL_DIGITS, FRAME = "real digits", 2


def image_statistics(images: dict[str, Tensor], extractor: "FeatureExtractor") -> pd.DataFrame:
    """FID and its two terms, ink and digits of sets of images: one row per set.

    images: by name, uint8 (N, 1, 32, 32); the first set is the unquantized model's. Columns:
    fid_mnist = mean_term + covariance_term: the squared distance of the mean features from the
    reference's, and the rest (Heusel et al. 2017, equation 6);
    ink, background: mean grey value (0 to 1) of the image, and of its outer frame of 2 pixels,
    black in real digits;
    class_changed: share of images whose predicted digit is not that of the first set's image from
    the same noise;
    digit, share: the digit predicted most often, and how often.
    """
    from lafq.study.images import metrics

    rows, first, frame = [], None, torch.ones(32, 32, dtype=torch.bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    reference = extractor.reference
    mean = torch.as_tensor(reference.statistics["mu"])
    for name, of_set in images.items():
        features, logits = extractor.features(of_set)
        digits = logits.argmax(1)
        first = digits if first is None else first
        fid, mean_term = (
            metrics.fid(features, reference),
            (features.double().mean(0) - mean).square().sum().item(),
        )
        changed = (digits != first).double().mean().item() if name != REAL_DIGITS else float("nan")
        shares = torch.bincount(digits, minlength=10) / len(digits)
        row = {"images": name, "n_images": len(of_set), "fid_mnist": fid, "mean_term": mean_term}
        row |= {"covariance_term": fid - mean_term, "ink": of_set.double().mean().item() / 255}
        row |= {
            "background": of_set[..., frame].double().mean().item() / 255,
            "class_changed": changed,
        }
        rows.append(row | {"digit": int(shares.argmax()), "share": shares.max().item()})
    return pd.DataFrame(rows)


def with_damage(table: pd.DataFrame, budget: pd.DataFrame) -> pd.DataFrame:
    """A table of `image_statistics` with the damage of each set's model, from rows of
    `damage.measure_damage`.
    """
    nearest = budget[budget["rounding"] == "nearest"]
    names = [
        f"{row.rule} INT{row.budget_bits:.0f}"
        if row.granularity == "tensor"
        else f"{row.rule}, {row.budget_bits:g} bits per weight"
        for row in nearest.itertuples()
    ]
    return table.assign(
        damage=table["images"].map(dict(zip(names, nearest["damage"], strict=True)))
    )
