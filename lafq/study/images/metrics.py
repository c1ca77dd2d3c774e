"""FID, KID and IS of features, through torch-fidelity, with error bars: a paired bootstrap over the
images, with an interval freed of the bootstrap's own bias.

FID and IS depend on N, and a resample, which repeats images, behaves as fewer of them: its FID lies
far above the value. So the draws are centred: with value v, draws b and their mean m the interval
is [v - (q97.5 - m), v - (q2.5 - m)] (the basic bootstrap of Davison and Hinkley 1997, section 5.2,
less the bias m - v). Where N is below the number of features it is wider than it need be.
"""

from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from lafq.rng import generator

KID_SEED = 2020
RESAMPLES = 1000
LEVEL = 0.95
CHUNK = 50
LARGE = 1024


def _fidelity(metric: str) -> ModuleType:
    # Imported where a score is computed: it takes seconds, and whoever loads tables needs it not.
    return import_module(f"torch_fidelity.metric_{metric}")


class Reference:
    """Features (N, d) of real images, and what FID and KID need of them, computed once.

    statistics: mean "mu" (d,) and covariance "sigma" (d, d), where they are known; without features
    there is no KID.
    """

    def __init__(
        self, features: Tensor | None, statistics: dict[str, np.ndarray] | None = None
    ) -> None:
        self.features = features
        self.statistics = statistics or _fidelity("fid").fid_features_to_statistics(features)

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance, float64 (d, d)."""
        values, vectors = torch.linalg.eigh(torch.as_tensor(self.statistics["sigma"]).double())
        return vectors * values.clamp_min(0).sqrt() @ vectors.T

    @cached_property
    def kernel_mean(self) -> float:
        """The mean of KID's kernel over all pairs of two images."""
        kernel = _kid_kernel(self.features, self.features)
        n = len(kernel)
        return ((kernel.sum() - kernel.trace()) / (n * (n - 1))).item()


def fid(features: Tensor, reference: Reference) -> float:
    """Frechet distance between Gaussians fitted to the features (N, d) and to the reference;
    ValueError for fewer than two images, and for features that are not finite.
    """
    features = _usable(features, "FID")
    if features.shape[1] > LARGE:
        # torch-fidelity's takes 10 s in 2,048 dimensions; a test holds this against it.
        return fid_draws(features, reference, torch.arange(len(features))[None]).item()
    fidelity = _fidelity("fid")
    ours = fidelity.fid_features_to_statistics(features)
    metric = fidelity.fid_statistics_to_metric(ours, reference.statistics, verbose=False)
    return metric["frechet_inception_distance"]


def kid(features: Tensor, reference: Reference) -> float:
    """Unbiased squared MMD (cubic kernel) of features (N, d), over 100 subsets of min(N, 1,000);
    ValueError as `fid`.
    """
    features = _usable(features, "KID")
    size = min(len(features), len(reference.features), 1000)
    subsets = {"kid_subsets": 100, "kid_subset_size": size, "rng_seed": KID_SEED}
    kid_of = _fidelity("kid").kid_features_to_metric
    metric = kid_of(features, reference.features, **subsets, verbose=False)
    return metric["kernel_inception_distance_mean"]


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL divergence of p(y|x) from p(y), over one split of logits (N, classes)."""
    return _fidelity("isc").isc_features_to_metric(logits, splits=1)["inception_score_mean"]


def scores(features: Tensor, logits: Tensor | None, reference: Reference) -> dict[str, float]:
    """`fid`, `is` (where there are logits) and `kid` of what a network sees of images."""
    values = {"fid": fid(features, reference)}
    if logits is not None:
        values["is"] = inception_score(logits)
    return values if reference.features is None else values | {"kid": kid(features, reference)}


def score_draws(
    features: Tensor, logits: Tensor | None, reference: Reference, indices: Tensor
) -> dict[str, Tensor]:
    """The same metrics, for each row of indices: (count,)."""
    draws = {"fid": fid_draws(features, reference, indices)}
    if reference.features is not None:
        draws["kid"] = kid_draws(features, reference, indices)
    return draws if logits is None else draws | {"is": inception_score_draws(logits, indices)}


def resamples(images: int, seed: int, count: int = RESAMPLES) -> Tensor:
    """Indices (count, images) drawn with replacement from 0..images - 1."""
    return torch.randint(images, (count, images), generator=generator(seed, images))


def interval(value: float, draws: Tensor) -> tuple[float, float]:
    """The centred 95 % interval of a value with its bootstrap draws (count,)."""
    tail = (1 - LEVEL) / 2
    tails = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    # A resample of one image alone, which a handful of images gives at times, has no KID.
    low, high = torch.nanquantile(draws.double(), tails).tolist()
    centre = draws.double().nanmean().item()
    return value - (high - centre), value - (low - centre)


def with_interval(name: str, value: float, draws: Tensor) -> dict[str, float]:
    """A value and its interval as the columns name, name_low and name_high."""
    low, high = interval(value, draws)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def fid_draws(features: Tensor, reference: Reference, indices: Tensor) -> Tensor:
    """FID of the features (N, d), for each row of indices (count, n): (count,).

    With S the reference's covariance and Y the features times S^(1/2), the trace of (C S)^(1/2) is
    the sum of the singular values of the centred Y / sqrt(n - 1); they come from the smaller of the
    n x n and d x d products.
    """
    mu, sigma = (torch.as_tensor(reference.statistics[name]).double() for name in ("mu", "sigma"))
    x = features.double() - mu
    y, square, n = x @ reference.root, x.square().sum(1), indices.shape[1]
    gram = y @ y.T if n <= x.shape[1] else None
    draws = []
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
        shared = torch.linalg.eigvalsh(product / (n - 1)).clamp_min(0).sqrt().sum(1)
        draws.append(centre + trace + sigma.trace() - 2 * shared)
    return torch.cat(draws)


def kid_draws(features: Tensor, reference: Reference, indices: Tensor) -> Tensor:
    """`kid` against the whole reference, for each row of indices; no image pairs with itself."""
    kernel = _kid_kernel(features, features).fill_diagonal_(0)
    cross = _kid_kernel(features, reference.features).mean(1)
    times = torch.stack([torch.bincount(i, minlength=len(features)) for i in indices]).double()
    pairs = times.sum(1).square() - times.square().sum(1)
    among = ((times @ kernel) * times).sum(1) / pairs
    return among + reference.kernel_mean - 2 * cross[indices].mean(1)


def inception_score_draws(logits: Tensor, indices: Tensor) -> Tensor:
    """`inception_score`, for each row of indices: (count,)."""
    p = logits.double().softmax(1)
    entropy = -(p * p.clamp_min(1e-300).log()).sum(1)
    mean = torch.stack([p[i].mean(0) for i in indices])
    return (-(mean * mean.clamp_min(1e-300).log()).sum(1) - entropy[indices].mean(1)).exp()


def mean_draws(values: Tensor, indices: Tensor) -> Tensor:
    """Mean of one value an image (N,), for each row of indices: (count,)."""
    return values.double()[indices].mean(1)


def image_psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every image in dB (N,), from images (N, ...) in [0, 1] that are
    not rounded yet, as rounding to uint8 hides gains above 55 dB; 80 at most, which equal images
    have.
    """
    error = (images - reference).square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-8).log10()


def fid_at_infinity(sizes: Sequence[int], fids: Sequence[float]) -> float:
    """The intercept of a line through the FID of `sizes` images over 1 / N (Chong and Forsyth 2020,
    "Effectively Unbiased FID and Inception Score and Where to Find Them").
    """
    return float(np.polyfit(1 / np.asarray(sizes), np.asarray(fids), 1)[1])


def _usable(features: Tensor, metric: str) -> Tensor:
    if len(features) < 2:
        raise ValueError(f"{metric} needs at least two images")
    if not torch.isfinite(features).all():
        raise ValueError("features are not finite: the network that computes them is damaged")
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _kid_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3
