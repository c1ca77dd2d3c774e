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
