"""Why FID and damage order some plans differently: what the images of such plans are like."""

import pandas as pd
import torch
from torch import Tensor

from lafq.study.images import metrics
from lafq.study.images.features import FeatureExtractor

REAL, FRAME = "real digits", 2


def image_statistics(images: dict[str, Tensor], extractor: FeatureExtractor) -> pd.DataFrame:
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
        changed = (digits != first).double().mean().item() if name != REAL else float("nan")
        shares = torch.bincount(digits, minlength=10) / len(digits)
        row = {"images": name, "n_images": len(of_set), "fid_mnist": fid, "mean_term": mean_term}
        row |= {"covariance_term": fid - mean_term, "ink": of_set.double().mean().item() / 255}
        row |= {
            "background": of_set[..., frame].double().mean().item() / 255,
            "class_changed": changed,
        }
        rows.append(row | {"digit": int(shares.argmax()), "share": shares.max().item()})
    return pd.DataFrame(rows)


def why_fid_and_damage_differ(table: pd.DataFrame) -> str:
    """What a table of `image_statistics` says of uniform INT4 beside INT3, and of the rule by
    magnitude beside FP32.
    """
    rows = table.set_index("images")
    three, four, fp32, real = (
        rows.loc[name] for name in ("uniform INT3", "uniform INT4", "FP32", REAL)
    )
    magnitude = rows.loc["magnitude, 6 bits per weight"]
    return (
        f"N = {four['n_images']:.0f}, MNIST features: FID is {four['fid_mnist']:.0f} for uniform "
        f"INT4 and "
        f"{three['fid_mnist']:.0f} for INT3. The background of INT4's images has a grey value of "
        f"{four['background']:.3f} (INT3: "
        f"{three['background']:.3f}; real digits: {real['background']:.3f}). An MNIST classifier "
        f"reads {four['share']:.0%} of "
        f"INT4's images as {four['digit']:.0f}. FP32 has FID {fp32['fid_mnist']:.1f}; the rule "
        f"magnitude at 6 bits has "
        f"{magnitude['fid_mnist']:.1f}, while {magnitude['class_changed']:.0%} of its images show "
        f"another digit."
    )


def with_damage(table: pd.DataFrame, budget: pd.DataFrame) -> pd.DataFrame:
    """A table of `image_statistics` with the damage of each set's model, from rows of
    `budget.measure_candidates`.
    """
    names = [
        f"{row.method} INT{row.budget_bits:.0f}"
        if row.granularity == "tensor"
        else f"{row.method}, {row.budget_bits:g} bits per weight"
        for row in budget.itertuples()
    ]
    return table.assign(damage=table["images"].map(dict(zip(names, budget["damage"], strict=True))))
