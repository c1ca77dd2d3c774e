"""What the released code's way of scoring images moves (07_audit): stretching, reference size, pairing, which weights."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics

from lafq import classifier, intervals, metrics, paths
from lafq.evaluation import SeenByInception

SMALL_REFERENCE = 500


def stretched(images: Tensor) -> Tensor:
    """Every uint8 image (N, 1, 32, 32) stretched on its own to 0..255, as the released code does before FID."""
    values = images.float()
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    return ((values - low) / (high - low).clamp_min(1) * 255).round().to(torch.uint8)


class Eyes(NamedTuple):
    """Features to judge images by: a function of images, and the real digits' reference.

    sizes: for R6, the same fewer digits as they are here and as 28x28, where there are any.
    """

    features: Callable[[Tensor], Tensor]
    reference: metrics.Reference
    sizes: tuple[metrics.Reference, metrics.Reference] | None = None


def eyes(inception: SeenByInception | None) -> dict[str, Eyes]:
    """The MNIST features and, where Inception is to be had, its features with the 28x28 reference of R6."""
    network = classifier.load()
    found = {"MNIST": Eyes(lambda x: metrics.mnist_features(network, x)[0], metrics.mnist_reference(network))}
    if inception:
        fewer = inception.reference.features[:SMALL_REFERENCE]
        released = metrics.inception_reference(inception.extractor, len(fewer), paths.BUILD / "inception", padded=False)
        here = metrics.Reference(fewer, fid_features_to_statistics(fewer))
        found["Inception"] = Eyes(
            lambda x: metrics.inception_features(inception.extractor, x), inception.reference, (here, released)
        )
    return found


def protocol_choices(seen: dict[str, Eyes], unquantized: Tensor, quantized: Tensor, other_noise: Tensor, seed: int) -> pd.DataFrame:
    """A row a choice: a FID, or difference of FIDs, as here and as in the released code; what it changes, with 95 % interval.

    unquantized, quantized: images from the same noise; other_noise: images of the quantized model from noise of another
    seed, which has no pairs to resample: that row stands without an interval.
    """
    indices = intervals.resamples(len(unquantized), seed)
    rows = []
    for name, eye in seen.items():
        draws = intervals.fid_draws(eye.reference, indices)
        plain, altered, low = (eye.features(x) for x in (unquantized, stretched(unquantized), quantized))
        fid = {key: metrics.fid(f, eye.reference) for key, f in (("plain", plain), ("altered", altered), ("low", low))}
        base = draws(plain)
        rows.append((name, "FID, each image stretched to 0..255", fid["plain"], fid["altered"], draws(altered) - base))
        if eye.sizes:
            ours, theirs = (intervals.fid_draws(reference, indices)(plain) for reference in eye.sizes)
            values = [metrics.fid(plain, reference) for reference in eye.sizes]
            count = len(eye.sizes[0].features)
            rows.append((name, f"FID, real digits 28x28 (R6; {count} of them)", *values, theirs - ours))
        paired, unpaired = fid["low"] - fid["plain"], metrics.fid(eye.features(other_noise), eye.reference) - fid["plain"]
        rows.append((name, "quantized less FP32, the EMA weights sampled untouched (R1)", paired, 0.0, base - draws(low)))
        rows.append((name, "quantized less FP32, other noise in each row (R7)", paired, unpaired, None))
    table = pd.DataFrame(rows, columns=["features", "choice", "here", "released", "draws"])
    table["change"] = table["released"] - table["here"]
    pairs = zip(table["change"], table["draws"], strict=True)
    ends = [(math.nan, math.nan) if drawn is None else intervals.interval(change, drawn) for change, drawn in pairs]
    return table.drop(columns="draws").assign(change_low=[low for low, _ in ends], change_high=[high for _, high in ends])
