"""What the released code's way of scoring images moves (07_audit): stretching, reference size,
pairing, which weights.
"""

import math

import pandas as pd
import torch
from torch import Tensor, nn

from lafq.quantization.model import dequantize_, quantize
from lafq.study import threshold_rows
from lafq.study.diffusion.mnist import REFERENCE, mnist, unpadded
from lafq.study.images import metrics
from lafq.study.images.features import FeatureExtractor, inception_extractor, mnist_extractor
from lafq.study.images.metrics import Reference
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.workspace import Workspace

SMALL_REFERENCE = 500


def stretched(images: Tensor) -> Tensor:
    """Every uint8 image (N, 1, 32, 32) stretched on its own to 0..255, as the released code does
    before FID.
    """
    values = images.float()
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    return ((values - low) / (high - low).clamp_min(1) * 255).round().to(torch.uint8)


def digits_of_two_sizes(extractor: FeatureExtractor) -> tuple[Reference, Reference]:
    """For R6: the references of the same few digits, 32x32 as they are here, and 28x28."""
    few = extractor.reference.features[:SMALL_REFERENCE]
    digits = unpadded(mnist(train=False)[0][REFERENCE][: len(few)])
    return Reference(few), Reference(extractor.features(digits).features)


def measure_protocol(
    work: Workspace, model: nn.Module, sampling: Sampling, inception_reference: int
) -> pd.DataFrame:
    """`protocol_choices` for uniform INT8 of a model, from the noise of the sampling's seed and of
    the next one.
    """
    int8 = dequantize_(quantize(model, threshold_rows.uniform(model, ("int8",))[0].plan))
    other = sampling._replace(seed=sampling.seed + 1)
    drawn = [
        ImageStore(work).draw(m, s).images
        for m, s in ((model, sampling), (int8, sampling), (int8, other))
    ]
    extractors, sizes = {"MNIST": mnist_extractor()}, {}
    if inception := inception_extractor(inception_reference):
        extractors["Inception"] = inception
        sizes["Inception"] = digits_of_two_sizes(inception)
    return protocol_choices(extractors, sizes, *drawn, sampling.seed)


def protocol_choices(
    extractors: dict[str, FeatureExtractor],
    sizes: dict[str, tuple[Reference, Reference]],
    unquantized: Tensor,
    quantized: Tensor,
    other_noise: Tensor,
    seed: int,
) -> pd.DataFrame:
    """One row per choice: a FID, or difference of FIDs, as here and as in the released code; what
    it changes, with 95 % interval.

    sizes: for R6, references of fewer digits as they are here and as 28x28, by extractor.
    unquantized, quantized: images from the same noise; other_noise: images of the quantized model
    from noise of another seed, which has no pairs to resample: that row stands without an interval.
    """
    # The images as they are come first, then their resamples.
    indices = torch.cat(
        [torch.arange(len(unquantized))[None], metrics.resamples(len(unquantized), seed)]
    )
    rows = []
    for name, extractor in extractors.items():
        seen, of_stretched, of_int8, of_other = (
            extractor.features(images).features
            for images in (unquantized, stretched(unquantized), quantized, other_noise)
        )
        plain, altered, int8 = (
            metrics.fid_draws(features, extractor.reference, indices)
            for features in (seen, of_stretched, of_int8)
        )
        rows.append((name, "FID, each image stretched to 0..255", plain, altered))
        if name in sizes:
            here, released = (
                metrics.fid_draws(seen, reference, indices) for reference in sizes[name]
            )
            count = len(sizes[name][0].features)
            rows.append((name, f"FID, real digits 28x28 (R6; {count} of them)", here, released))
        rise, other = int8 - plain, metrics.fid_draws(of_other, extractor.reference, indices[:1])
        ema = "FID of INT8 minus FP32 (R1: images from the EMA weights)"
        rows.append((name, ema, rise, torch.zeros_like(rise)))
        noise = "FID of INT8 minus FP32, other noise in each row (R7)"
        rows.append((name, noise, rise[:1], other - plain[:1]))
    found = [(name, choice, *_change(here, released)) for name, choice, here, released in rows]
    return pd.DataFrame(
        found,
        columns=["features", "choice", "here", "released", "change", "change_low", "change_high"],
    )


def _change(here: Tensor, released: Tensor) -> tuple[float, float, float, float, float]:
    """Both values (first in each), their difference, and its interval where there are resamples."""
    difference = released - here
    ends = (
        metrics.interval(difference[0].item(), difference[1:])
        if len(difference) > 1
        else (math.nan, math.nan)
    )
    return here[0].item(), released[0].item(), difference[0].item(), *ends
