"""What the released code's way of scoring images moves (07_audit): stretching, reference size,
pairing, which weights.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from lafq.quantization.model import dequantize_, quantize
from lafq.study import threshold_rows, workspace
from lafq.study.images import bootstrap, classifier, metrics
from lafq.study.images.evaluate import InceptionFeatures, load_inception
from lafq.study.images.samples import Sampling, cached_samples
from lafq.study.workspace import Workspace

SMALL_REFERENCE = 500


def stretched(images: Tensor) -> Tensor:
    """Every uint8 image (N, 1, 32, 32) stretched on its own to 0..255, as the released code does
    before FID.
    """
    values = images.float()
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    return ((values - low) / (high - low).clamp_min(1) * 255).round().to(torch.uint8)


class FeatureExtractor(NamedTuple):
    """Features to judge images by: a function of images, and the real digits' reference.

    sizes: for R6, the same fewer digits as they are here and as 28x28, where there are any.
    """

    features: Callable[[Tensor], Tensor]
    reference: metrics.Reference
    sizes: tuple[metrics.Reference, metrics.Reference] | None = None


def extractors(inception: InceptionFeatures | None) -> dict[str, FeatureExtractor]:
    """The MNIST features and, where Inception is to be had, its features with the 28x28 reference
    of R6.
    """
    network = classifier.load()
    found = {
        "MNIST": FeatureExtractor(
            lambda x: metrics.mnist_features(network, x)[0], metrics.mnist_reference(network)
        )
    }
    if inception:
        fewer = inception.reference.features[:SMALL_REFERENCE]
        released = metrics.inception_reference(
            inception.extractor, len(fewer), workspace.BUILD / "inception", padded=False
        )
        here = metrics.Reference.of(fewer)
        found["Inception"] = FeatureExtractor(
            lambda x: metrics.inception_features(inception.extractor, x)[0],
            inception.reference,
            (here, released),
        )
    return found


def measure_protocol(
    work: Workspace, model: nn.Module, sampling: Sampling, inception_reference: int
) -> pd.DataFrame:
    """`protocol_choices` for uniform INT8 of a model, from the noise of the sampling's seed and of
    the next one.
    """
    int8 = dequantize_(quantize(model, threshold_rows.uniform(model, ("int8",))[0].plan))
    other = sampling._replace(seed=sampling.seed + 1)
    drawn = [
        cached_samples(work, m, s).images
        for m, s in ((model, sampling), (int8, sampling), (int8, other))
    ]
    return protocol_choices(
        extractors(load_inception(work, inception_reference)), *drawn, sampling.seed
    )


def protocol_choices(
    seen: dict[str, FeatureExtractor],
    unquantized: Tensor,
    quantized: Tensor,
    other_noise: Tensor,
    seed: int,
) -> pd.DataFrame:
    """One row per choice: a FID, or difference of FIDs, as here and as in the released code; what
    it changes, with 95 % interval.

    unquantized, quantized: images from the same noise; other_noise: images of the quantized model
    from noise of another
    seed, which has no pairs to resample: that row stands without an interval.
    """
    # The images as they are come first, then their resamples.
    indices = torch.cat(
        [torch.arange(len(unquantized))[None], bootstrap.resamples(len(unquantized), seed)]
    )
    rows = []
    for name, eye in seen.items():
        fid = bootstrap.fid_bootstrap(eye.reference, indices)
        seen_plain = eye.features(unquantized)
        plain, altered, low = (
            fid(seen_plain),
            fid(eye.features(stretched(unquantized))),
            fid(eye.features(quantized)),
        )
        rows.append((name, "FID, each image stretched to 0..255", plain, altered))
        if eye.sizes:
            ours, theirs = (
                bootstrap.fid_bootstrap(reference, indices)(seen_plain) for reference in eye.sizes
            )
            rows.append(
                (
                    name,
                    f"FID, real digits 28x28 (R6; {len(eye.sizes[0].features)} of them)",
                    ours,
                    theirs,
                )
            )
        rows.append(
            (
                name,
                "FID of INT8 minus FP32 (R1: images from the EMA weights)",
                low - plain,
                torch.zeros_like(low),
            )
        )
        other = fid(eye.features(other_noise))[:1] - plain[:1]
        rows.append(
            (name, "FID of INT8 minus FP32, other noise in each row (R7)", (low - plain)[:1], other)
        )
    found = [(name, choice, *_change(here, released)) for name, choice, here, released in rows]
    return pd.DataFrame(
        found,
        columns=["features", "choice", "here", "released", "change", "change_low", "change_high"],
    )


def _change(here: Tensor, released: Tensor) -> tuple[float, float, float, float, float]:
    """Both values (first in each), their difference, and its interval where there are resamples."""
    difference = released - here
    ends = (
        bootstrap.interval(difference[0].item(), difference[1:])
        if len(difference) > 1
        else (math.nan, math.nan)
    )
    return here[0].item(), released[0].item(), difference[0].item(), *ends
