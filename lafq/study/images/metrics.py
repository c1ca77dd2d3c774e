"""Image quality through torch-fidelity: FID, KID and IS on MNIST features and, as far as its
weights are there, on Inception's.

Both sides are 32x32 (real digits zero-padded as the generated ones are). The reference set is the
first 5,000 test digits for MNIST features; for Inception as many of them as the profile says. IS is
over one split; KID takes 100 subsets of min(N, 1,000) images, from a fixed seed. Features are what
is compared, whichever network they come from.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from tqdm import tqdm

from lafq.quantization.model import weights_sha256
from lafq.study.diffusion.ddpm import unit_interval
from lafq.study.diffusion.mnist import REFERENCE, mnist
from lafq.study.images import inception
from lafq.study.images.classifier import Classifier
from lafq.tensors import load_tensors, save_tensors

KID_SEED = 2020
INCEPTION_BATCH = 16  # 50 took a third longer on two cores


class Reference(NamedTuple):
    """Features (N, d) of the reference digits with their FID statistics (mean and covariance)."""

    features: Tensor
    statistics: dict[str, np.ndarray]

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """The reference that these features make."""
        return cls(features, fid_features_to_statistics(features))


_REFERENCES: dict[str, Reference] = {}


@torch.inference_mode()
def mnist_features(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 1, 32, 32) -> features (N, 128) and logits (N, 10) of the shipped
    classifier.
    """
    _check(images, (32, 32))
    pairs = [classifier(unit_interval(batch)) for batch in images.split(500)]
    return torch.cat([f for f, _ in pairs]), torch.cat([z for _, z in pairs])


@torch.inference_mode()
def inception_features(
    extractor: FeatureExtractorInceptionV3, images: Tensor
) -> tuple[Tensor, Tensor | None]:
    """uint8 images (N, 1, 32, 32) -> pool features (N, 2048), and logits (N, 1008) where the
    weights have the last layer.

    The grey value is repeated in the three colours.
    """
    _check(images)
    batches = tqdm(
        images.split(INCEPTION_BATCH), desc="Inception features", unit="batch", leave=False
    )
    features, logits = zip(
        *(extractor(batch.expand(-1, 3, -1, -1)) for batch in batches), strict=True
    )
    return torch.cat(features), torch.cat(logits) if inception.has_logits(extractor) else None


def _check(images: Tensor, size: tuple[int, int] | None = None) -> None:
    if (
        images.dtype != torch.uint8
        or images.ndim != 4
        or images.shape[1] != 1
        or (size and images.shape[2:] != size)
    ):
        wanted = "H, W" if size is None else "{}, {}".format(*size)
        raise ValueError(
            f"images must be uint8 (N, 1, {wanted}), these are {images.dtype} of shape "
            f"{tuple(images.shape)}"
        )


def mnist_reference(classifier: Classifier) -> Reference:
    """The reference digits seen by the classifier; taken once in a process."""
    key = weights_sha256(classifier)
    if key not in _REFERENCES:
        features, _ = mnist_features(classifier, mnist(train=False)[0][REFERENCE])
        _REFERENCES[key] = Reference.of(features)
    return _REFERENCES[key]


def inception_reference(
    extractor: FeatureExtractorInceptionV3, images: int, cache: Path, padded: bool = True
) -> Reference:
    """The first `images` reference digits seen by Inception; their features are computed once and
    kept in `cache`.

    padded: whether the digits have their zero padding to 32x32, as the generated images have, or
    are 28x28.
    """
    digits = mnist(train=False)[0][REFERENCE][:images]
    if len(digits) < images:
        raise ValueError(f"{images} Inception reference images asked for: there are {len(digits)}")
    if not padded:
        digits = digits[:, :, 2:-2, 2:-2]
    return Reference.of(kept_inception_features(extractor, digits, cache)[0])


def kept_inception_features(
    extractor: FeatureExtractorInceptionV3, images: Tensor, folder: Path
) -> tuple[Tensor, Tensor | None]:
    """`inception_features`, kept in `folder` by the images and the weights: thousands of images
    take minutes.
    """
    images_sha256 = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    path = folder / f"{images_sha256[:16]}.{weights_sha256(extractor)[:12]}.safetensors"
    if not path.is_file():
        features, logits = inception_features(extractor, images)
        save_tensors(path, {"features": features} | ({} if logits is None else {"logits": logits}))
    found, _ = load_tensors(path, "the notebook")
    return found["features"], found.get("logits")


def fid(features: Tensor, reference: Reference) -> float:
    """Frechet distance between Gaussians fitted to the features (N, d) and to the reference; at
    least two images.
    """
    if len(features) < 2:
        raise ValueError("FID needs at least two images")
    if not torch.isfinite(features).all():
        raise ValueError(
            "the features of the images are not finite: the network that computes them is damaged"
        )
    statistics = fid_features_to_statistics(features)
    return fid_statistics_to_metric(statistics, reference.statistics, verbose=False)[KEY_METRIC_FID]


def kid(features: Tensor, reference: Reference) -> float:
    """Unbiased squared MMD, cubic polynomial kernel, between the features (N, d) and the reference."""
    size = min(len(features), len(reference.features), 1000)
    return kid_features_to_metric(
        features,
        reference.features,
        kid_subsets=100,
        kid_subset_size=size,
        rng_seed=KID_SEED,
        verbose=False,
    )[KEY_METRIC_KID_MEAN]


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL divergence between p(y|x) and p(y), over one split, from logits (N,
    classes).
    """
    return isc_features_to_metric(logits, splits=1)[KEY_METRIC_ISC_MEAN]


def mnist_metrics(features: Tensor, logits: Tensor, reference: Reference) -> dict[str, float]:
    """fid_mnist, is_mnist and kid_mnist of what `mnist_features` gives."""
    return {
        "fid_mnist": fid(features, reference),
        "is_mnist": inception_score(logits),
        "kid_mnist": kid(features, reference),
    }
