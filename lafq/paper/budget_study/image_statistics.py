"""Why FID and damage order some plans differently: what the images of such plans are like."""

import pandas as pd
import torch
from torch import Tensor

from lafq.evaluation import metrics
from lafq.evaluation.classifier import Classifier
from lafq.evaluation.metrics import Reference

REAL = "real digits"


def image_statistics(images: dict[str, Tensor], network: Classifier, reference: Reference) -> pd.DataFrame:
    """FID and its two terms, ink and digits of sets of images: one row per set.

    images: by name, uint8 (N, 1, 32, 32); the first set is the unquantized model's. Columns:
    fid_mnist = mean_term + covariance_term: the squared distance of the mean features from the reference's, and the rest
    (Heusel et al. 2017, equation 6);
    ink: mean grey value (0 to 1); class_changed: share of images whose predicted digit is not that of the first set's image from
    the same noise; digit, share: the digit predicted most often, and how often.
    """
    rows, first = [], None
    mean = torch.as_tensor(reference.statistics["mu"])
    for name, of_set in images.items():
        features, logits = metrics.mnist_features(network, of_set)
        digits = logits.argmax(1)
        first = digits if first is None else first
        fid, mean_term = metrics.fid(features, reference), (features.double().mean(0) - mean).square().sum().item()
        changed = (digits != first).double().mean().item() if name != REAL else float("nan")
        shares = torch.bincount(digits, minlength=10) / len(digits)
        row = {
            "images": name,
            "n_images": len(of_set),
            "fid_mnist": fid,
            "mean_term": mean_term,
            "covariance_term": fid - mean_term,
        }
        row |= {"ink": of_set.double().mean().item() / 255, "class_changed": changed}
        rows.append(row | {"digit": int(shares.argmax()), "share": shares.max().item()})
    return pd.DataFrame(rows)
