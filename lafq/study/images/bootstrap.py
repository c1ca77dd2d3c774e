"""Error bars: a paired bootstrap over images, with an interval freed of the bootstrap's own bias.

FID and IS of N images depend on N, and a resample, which repeats images, behaves as fewer of them:
its FID lies far above
the value. So the draws are centred: with value v, draws b and their mean m the interval is [v -
(q97.5 - m), v - (q2.5 - m)] (the basic bootstrap of Davison and Hinkley 1997, section 5.2, less the
bias m - v). It speaks of the expected value at this N. Where N is below the number of features it
is wider than it need be (a test measures both on Gaussians).

A difference from the baseline is taken resample by resample, on the same indices for both.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lafq.rng import generator
from lafq.study.images.metrics import Reference

RESAMPLES = 1000
LEVEL = 0.95
CHUNK = 50

Draws = Callable[[Tensor], Tensor]


def resamples(images: int, seed: int, count: int = RESAMPLES) -> Tensor:
    """Indices (count, images) drawn with replacement from 0..images - 1, the same ones for an equal
    seed.
    """
    return torch.randint(images, (count, images), generator=generator(seed, images))


def interval(value: float, draws: Tensor) -> tuple[float, float]:
    """The centred 95 % interval of a value with its bootstrap draws (count,)."""
    tail = (1 - LEVEL) / 2
    # A resample of one image alone, which a handful of images gives at times, has no KID.
    low, high = torch.nanquantile(
        draws.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)
    ).tolist()
    centre = draws.double().nanmean().item()
    return value - (high - centre), value - (low - centre)


def fid_bootstrap(reference: Reference, indices: Tensor) -> Draws:
    """FID against the reference, resample by resample: a function of features (N, d) that gives
    (count,).

    With S the reference's covariance and Y the features times S^(1/2), the trace of (C S)^(1/2) is
    the sum of the singular values of the centred Y / sqrt(N - 1); they come from the smaller of the
    N x N and d x d products.
    """
    mean = torch.as_tensor(reference.statistics["mu"]).double()
    covariance = torch.as_tensor(reference.statistics["sigma"]).double()
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    n = indices.shape[1]

    def draws(features: Tensor) -> Tensor:
        x = features.double() - mean
        y, square = x @ root, x.square().sum(1)
        gram = y @ y.T if n <= x.shape[1] else None
        found = []
        for chosen in indices.split(CHUNK):
            centre = x[chosen].mean(1).square().sum(1)
            trace = (square[chosen].sum(1) - n * centre) / (n - 1)
            if gram is not None:
                product = gram[chosen[:, :, None], chosen[:, None, :]]
                product = product - product.mean(1, keepdim=True)
                product = product - product.mean(2, keepdim=True)
            else:
                centred = y[chosen] - y[chosen].mean(1, keepdim=True)
                product = centred.transpose(1, 2) @ centred
            shared = (torch.linalg.eigvalsh(product / (n - 1)).clamp_min(0)).sqrt().sum(1)
            found.append(centre + trace + covariance.trace() - 2 * shared)
        return torch.cat(found)

    return draws


def kid_bootstrap(reference: Reference, indices: Tensor) -> Draws:
    """Unbiased squared MMD (cubic kernel) against the whole reference: a function of features (N,
    d) that gives (count,).

    Pairs of one image with itself, which a resample contains, are left out.
    """
    other = reference.features.double()
    size = other.shape[1]
    kernel = (other @ other.T / size + 1) ** 3
    among = (kernel.sum() - kernel.trace()) / (len(other) * (len(other) - 1))

    def draws(features: Tensor) -> Tensor:
        x = features.double()
        own = (x @ x.T / size + 1) ** 3
        cross = ((x @ other.T / size + 1) ** 3).mean(1)
        own.fill_diagonal_(0)
        weights = torch.stack([torch.bincount(i, minlength=len(x)) for i in indices]).double()
        pairs = weights.sum(1).square() - weights.square().sum(1)
        return ((weights @ own) * weights).sum(1) / pairs + among - 2 * cross[indices].mean(1)

    return draws


def inception_score_bootstrap(indices: Tensor) -> Draws:
    """Inception score over one split: a function of logits (N, classes) that gives (count,)."""

    def draws(logits: Tensor) -> Tensor:
        p = logits.double().softmax(1)
        entropy = -(p * p.clamp_min(1e-300).log()).sum(1)
        mean = torch.stack([p[i].mean(0) for i in indices])
        return (-(mean * mean.clamp_min(1e-300).log()).sum(1) - entropy[indices].mean(1)).exp()

    return draws


def mean_bootstrap(indices: Tensor) -> Draws:
    """Mean of one value an image (N,): a function that gives (count,)."""
    return lambda values: values.double()[indices].mean(1)


def fid_at_infinity(sizes: Sequence[int], fids: Sequence[float]) -> float:
    """FID extrapolated to infinite N: the intercept of a line through the FID of `sizes` images
    over 1 / N.

    Source: Chong and Forsyth 2020, "Effectively Unbiased FID and Inception Score and Where to Find
    Them".
    """
    return float(np.polyfit(1 / np.asarray(sizes), np.asarray(fids), 1)[1])
