"""Why FID and damage order some plans differently: what the images of such plans are like."""

import pandas as pd
import torch
from torch import Tensor

from lafq.evaluation import metrics
from lafq.evaluation.classifier import Classifier
from lafq.evaluation.metrics import Reference

REAL, FRAME = "real digits", 2


def image_statistics(images: dict[str, Tensor], network: Classifier, reference: Reference) -> pd.DataFrame:
    """FID and its two terms, ink and digits of sets of images: one row per set.

    images: by name, uint8 (N, 1, 32, 32); the first set is the unquantized model's. Columns:
    fid_mnist = mean_term + covariance_term: the squared distance of the mean features from the reference's, and the rest
    (Heusel et al. 2017, equation 6);
    ink, background: mean grey value (0 to 1) of the image, and of its outer frame of 2 pixels, black in real digits;
    class_changed: share of images whose predicted digit is not that of the first set's image from the same noise;
    digit, share: the digit predicted most often, and how often.
    """
    rows, first, frame = [], None, torch.ones(32, 32, dtype=torch.bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    mean = torch.as_tensor(reference.statistics["mu"])
    for name, of_set in images.items():
        features, logits = metrics.mnist_features(network, of_set)
        digits = logits.argmax(1)
        first = digits if first is None else first
        fid, mean_term = metrics.fid(features, reference), (features.double().mean(0) - mean).square().sum().item()
        changed = (digits != first).double().mean().item() if name != REAL else float("nan")
        shares = torch.bincount(digits, minlength=10) / len(digits)
        row = {"images": name, "n_images": len(of_set), "fid_mnist": fid, "mean_term": mean_term}
        row |= {"covariance_term": fid - mean_term, "ink": of_set.double().mean().item() / 255}
        row |= {"background": of_set[..., frame].double().mean().item() / 255, "class_changed": changed}
        rows.append(row | {"digit": int(shares.argmax()), "share": shares.max().item()})
    return pd.DataFrame(rows)


def why_fid_and_damage_differ(table: pd.DataFrame) -> str:
    """What a table of `image_statistics` says of uniform INT4 beside INT3, and of the rule by magnitude beside FP32."""
    rows = table.set_index("images")
    three, four, fp32, real = (rows.loc[name] for name in ("uniform INT3", "uniform INT4", "FP32", REAL))
    magnitude = rows.loc["magnitude, 6 bits per weight"]
    return (
        f"Uniform INT4 has a FID of {four['fid_mnist']:.0f}, INT3 one of {three['fid_mnist']:.0f}. The background of INT4's images "
        f"has a grey value of {four['background']:.3f} (INT3: {three['background']:.3f}; real digits: {real['background']:.3f}). "
        f"An MNIST classifier reads {four['share']:.0%} of them as {four['digit']:.0f}. The rule magnitude at 6 bits has a FID of "
        f"{magnitude['fid_mnist']:.1f}, FP32 one of {fp32['fid_mnist']:.1f}, although {magnitude['class_changed']:.0%} of the "
        "rule's images show another digit than FP32's."
    )
