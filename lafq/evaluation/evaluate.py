"""Rows of the tables: quantize every candidate, sample from the same noise, score the images."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from lafq import paths
from lafq.diffusion import workspace
from lafq.diffusion.mnist import REFERENCE
from lafq.evaluation import classifier, inception, metrics, samples, scoring
from lafq.evaluation.candidates import BASELINE, KEY, Candidate, sizes
from lafq.evaluation.peak_memory import PeakMeter
from lafq.evaluation.samples import Sampled, cached_samples, sample_on_cluster
from lafq.io import load_tensors, save_tensors
from lafq.quantization.checkpoint import save_quantized
from lafq.quantization.model import dequantize, quantize, weights_sha256

Draw = Callable[[Candidate, nn.Module, str], Sampled]
Score = Callable[[Candidate, nn.Module, Sampled], dict[str, float]]


def evaluate(
    model: nn.Module,
    candidates: list[Candidate],
    profile: str,
    *,
    images: int,
    steps: int,
    seed: int,
    batch: int = 100,
    inception_reference: int = 0,
    scheduler: str = "",
    keep: bool = False,
    store: Callable[[Candidate], nn.Module] | None = None,
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Sample every candidate from the same noise and score the images.

    Args:
        images, steps, seed, batch: of the sampling; batch is how many images are sampled at once.
        inception_reference: number of reference digits for the Inception columns; 0 leaves them empty.
        scheduler: address of a Dask scheduler whose workers shall sample; empty: this process does.
        keep: images are kept by their recipe in results/<profile>/samples (`samples` says how), not in build/.
        store: makes a candidate's quantized copy of the model; None: `quantize` of its plan.

    Returns one row per candidate: its key, kept_share, mem_mib, mem_share, every metric with its interval and its paired difference
    from the FP32 model's, rmse, delta_loss, n_images, steps, same_machine (whether one kind of machine drew the row and its
    baseline), reference and sample; and uint8 images (N, 32, 32) by `sample`. All plans are checked first; equal plans are sampled
    once, and images that are there are not sampled again.
    """
    if images < 1:
        raise ValueError(f"{images} images asked for: at least one is needed")
    size = sizes(model, [c.plan for c in candidates])
    store = store or (lambda c: quantize(model, c.plan))
    sampling = {"images": images, "steps": steps, "seed": seed, "batch": batch}
    recipe_of = _recipes(model, profile) if keep else lambda *_: None
    if scheduler:
        copies = ((store(c), partial(recipe_of, c)) for c in candidates)
        sample_on_cluster(scheduler, model, copies, len(candidates), profile, **sampling)

    def draw(candidate: Candidate, quantized: nn.Module, label: str) -> Sampled:
        return cached_samples(quantized, profile, **sampling, label=label, recipe=recipe_of(candidate, quantized))

    features = inception_features(profile, inception_reference)
    baseline = draw(BASELINE, model, "FP32 baseline")
    score = _scores(model, baseline, features, any(c.inception for c in candidates), images, seed)
    against = f"{REFERENCE.stop - REFERENCE.start} test digits, 32x32"
    against += f" (Inception: {inception_reference})" if features else ""
    rows, drawn = [], {}
    for candidate, bytes_row, sampled, scores in _rows(candidates, size, store, draw, score):
        drawn[sampled.key] = sampled.images[:, 0].numpy()
        sampled_as = {"n_images": images, "steps": steps, "same_machine": len(sampled.machines | baseline.machines) == 1}
        named = {name: getattr(candidate, name) for name in KEY}
        rows.append({**named, **bytes_row, **scores, **sampled_as, "reference": against, "sample": sampled.key})
        print(f"{' '.join(named.values())}: {bytes_row['mem_mib']:.2f} MiB, FID (MNIST) {scores['fid_mnist']:.2f}", flush=True)
    return pd.DataFrame(rows), drawn


def _rows(
    candidates: list[Candidate], size: pd.DataFrame, store: Callable[[Candidate], nn.Module], draw: Draw, score: Score
) -> Iterator[tuple[Candidate, dict[str, float], Sampled, dict[str, float]]]:
    """Quantize, sample, score: one candidate after another, so that one quantized model is held at a time."""
    for i, (candidate, bytes_row) in enumerate(zip(candidates, size.to_dict("records"), strict=True), start=1):
        quantized = dequantize(store(candidate))
        sampled = draw(candidate, quantized, f"row {i} of {len(candidates)}")
        yield candidate, bytes_row, sampled, score(candidate, quantized, sampled)


def _scores(
    model: nn.Module, baseline: Sampled, features: "InceptionFeatures | None", inception_rows: bool, images: int, seed: int
) -> Score:
    """A function that scores a candidate's images and its held-out losses against the FP32 model's; equal images only once."""
    make = scoring.make_scorer(images, seed, features.reference if features else None)
    expected = make(baseline.images, features.of(baseline.images) if features and inception_rows else None)
    losses, found = scoring.held_out_losses(model, seed), {}

    def score(candidate: Candidate, quantized: nn.Module, sampled: Sampled) -> dict[str, float]:
        key = sampled.key, candidate.inception
        if key not in found:
            scored = make(sampled.images, features.of(sampled.images) if features and candidate.inception else None)
            after = scoring.held_out_losses(quantized, seed)
            off = scoring.damage(after, losses, sampled.images, baseline.images, seed)
            found[key] = scoring.against_baseline(scored, expected) | off
        return found[key]

    return score


def _recipes(model: nn.Module, profile: str) -> Callable[[Candidate, nn.Module], samples.Recipe]:
    """A function of a row and its quantized model: the row's recipe, or that of an earlier row with the very same weights."""
    weights, first = weights_sha256(model), {}

    def recipe_of(candidate: Candidate, quantized: nn.Module) -> samples.Recipe:
        known = candidate.method in ("baseline", "uniform") or candidate.made
        own = samples.recipe(model, candidate, weights, {} if known else workspace.fisher_settings(profile))
        return first.setdefault(weights_sha256(quantized), own)

    return recipe_of


def peak_memory(model: nn.Module, candidates: list[Candidate], profile: str) -> pd.DataFrame:
    """Peak MiB of sampling from each candidate's file, whole (it repeats to a few tenths): columns KEY and peak_mib."""
    path, found = paths.BUILD / profile / "peak.safetensors", []
    with PeakMeter(next(model.parameters()).device) as meter:
        for candidate in candidates:
            save_quantized(path, quantize(model, candidate.plan), model)
            found.append([*(getattr(candidate, name) for name in KEY), round(meter.mib(path))])
    path.unlink(missing_ok=True)
    return pd.DataFrame(found, columns=[*KEY, "peak_mib"])


def evaluate_large(
    model: nn.Module, configurations: list[Candidate], profile: str, *, images: int, **settings: Any
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """`evaluate` with many images, the unquantized model first, and a tenth of them as a block of `block_statistics`.

    settings: those of `evaluate`. Its columns and those of `block_statistics`.
    """
    rows = [BASELINE, *(row for row in configurations if row.method != "baseline")]
    table, samples = evaluate(model, rows, profile, images=images, **settings)
    return table.merge(block_statistics(samples, table["sample"][0], images // 10), on="sample", how="left"), samples


def quality(model: nn.Module, profile: str, *, images: int, block: int, steps: int, seed: int) -> pd.DataFrame:
    """Metrics of the unquantized model on `images` images and on each disjoint block of them, the metric's own spread.

    One row for all and one a block: columns images (a range), n_images, fid_mnist, is_mnist, kid_mnist.
    """
    generated = cached_samples(model, profile, images, steps, seed).images
    network = classifier.load()
    reference = metrics.mnist_reference(network)
    parts = {f"0-{images - 1}": generated} | {
        f"{start}-{start + block - 1}": generated[start : start + block] for start in range(0, images - block + 1, block)
    }
    seen = {k: metrics.mnist_features(network, x) for k, x in parts.items()}
    scores = [{"images": k, "n_images": len(f), **metrics.score(f, z, reference)} for k, (f, z) in seen.items()]
    return pd.DataFrame(scores)


def block_statistics(samples: dict[str, np.ndarray], baseline: str, block: int) -> pd.DataFrame:
    """fid_mnist of disjoint blocks of images, as a paper of `block` images would have it: mean and standard deviation.

    samples: uint8 (N, 32, 32) by digest; baseline: the digest of the unquantized model's. One row a sample, columns sample,
    blocks, block_fid_mnist, block_fid_mnist_sd, and block_delta_fid_mnist(_sd), of the differences from the baseline's blocks.
    """
    network = classifier.load()
    reference = metrics.mnist_reference(network)

    def fids(images: np.ndarray) -> pd.Series:
        features, _ = metrics.mnist_features(network, torch.from_numpy(images)[:, None])
        return pd.Series([metrics.fid(part, reference) for part in features.split(block) if len(part) == block])

    at_baseline, rows = fids(samples[baseline]), []
    for key, images in samples.items():
        found = fids(images)
        spread = {"block_fid_mnist": found, "block_delta_fid_mnist": found - at_baseline}
        numbers = {name: v for k, values in spread.items() for name, v in ((k, values.mean()), (f"{k}_sd", values.std()))}
        rows.append({"sample": key, "blocks": len(found), **numbers})
    return pd.DataFrame(rows)


class InceptionFeatures(NamedTuple):
    """The network, its reference features, and a function of images that gives their features and keeps them."""

    extractor: FeatureExtractorInceptionV3
    reference: metrics.Reference
    of: Callable[[Tensor], Tensor]


def inception_features(profile: str, reference_images: int) -> InceptionFeatures | None:
    """Inception with its reference, or None where the profile asks for none or no weights are to be had; a line says which."""
    if not reference_images:
        print("Inception columns: left empty (no Inception reference is asked for)")
        return None
    extractor, source = inception.load()
    print(source)
    if extractor is None:
        return None
    suffix = f"{weights_sha256(extractor)[:12]}.safetensors"

    def features(images: Tensor) -> Tensor:
        path = paths.BUILD / profile / "features" / f"{hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]}.{suffix}"
        if not path.is_file():
            save_tensors(path, {"features": metrics.inception_features(extractor, images)})
        return load_tensors(path, "this notebook")[0]["features"]

    return InceptionFeatures(
        extractor, metrics.inception_reference(extractor, reference_images, paths.BUILD / "inception"), features
    )
