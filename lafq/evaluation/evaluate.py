"""Rows of the tables: sample every precision plan from the same noise, score the images, measure bytes and memory."""

import hashlib
import json
from collections.abc import Callable
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
from lafq.evaluation.candidates import KEY, Candidate, sizes
from lafq.evaluation.peak_memory import PeakMeter
from lafq.evaluation.samples import cached_samples, sample_key, sample_on_cluster
from lafq.io import atomic_write, load_tensors, save_tensors
from lafq.quantization.checkpoint import save_quantized
from lafq.quantization.model import dequantize, quantize, weights_sha256


def evaluate(
    model: nn.Module,
    configurations: list[Candidate],
    profile: str,
    *,
    images: int,
    steps: int,
    seed: int,
    inception_reference: int = 0,
    store: Callable[[Candidate], nn.Module] | None = None,
    batch: int = 100,
    scheduler: str = "",
    keep: bool = False,
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Sample every configuration from the same noise and score the images.

    Returns one row a configuration (its key, kept_share, mem_mib, mem_share, peak_mib, every metric with its interval and its
    paired difference from the unquantized model's, rmse, delta_loss, n_images, steps, same_machine, reference, sample) and the
    uint8 images (N, 32, 32) by `sample`, the key of `samples.cached_samples`: equal plans are sampled once, and images that are
    kept are not sampled again. same_machine: whether one kind of machine drew the row and its baseline. All plans are checked first.
    inception_reference: number of reference digits for the Inception columns; 0 leaves them empty. store: makes a
    configuration's packed copy of the model; None: `quantize` of its plan. batch: images sampled at once. scheduler: address
    of a Dask scheduler whose workers shall sample; empty: this process does. keep: images are kept by their recipe, in
    results/<profile>/samples (the module `samples` says how).
    """
    if images < 1:
        raise ValueError(f"{images} images asked for: at least one is needed")
    size = sizes(model, [c.plan for c in configurations])
    store = store or (lambda c: quantize(model, c.plan))
    features = inception_features(profile, inception_reference)
    score = scoring.make_scorer(images, seed, features.reference if features else None)
    against = f"{REFERENCE.stop - REFERENCE.start} test digits, 32x32"
    if features:
        against += f" (Inception: {inception_reference})"
    drawn = {"images": images, "steps": steps, "seed": seed, "batch": batch}
    recipe_of = _recipes(model, profile) if keep else lambda *_: None
    if scheduler:
        packed = ((store(c), partial(recipe_of, c)) for c in configurations)
        sample_on_cluster(scheduler, model, packed, len(configurations), profile, **drawn)
    seen_by_inception = features and any(c.inception for c in configurations)
    nothing = Candidate("baseline", "none", "fp32", "none", {})
    unquantized = cached_samples(model, profile, **drawn, label="FP32 baseline", recipe=recipe_of(nothing, model))
    baseline = score(unquantized.images, features.of(unquantized.images) if seen_by_inception else None)
    losses = scoring.held_out_losses(model, seed)
    rows, images_of, found = [], {}, {}
    pairs = zip(configurations, size.to_dict("records"), strict=True)
    with PeakMeter(next(model.parameters()).device) as meter:
        for i, (candidate, bytes_row) in enumerate(pairs, start=1):
            quantized = store(candidate)
            bytes_row["peak_mib"] = _peak(quantized, model, profile, meter)
            quantized = dequantize(quantized)
            label = f"row {i} of {len(size)}"
            row = cached_samples(quantized, profile, **drawn, label=label, recipe=recipe_of(candidate, quantized))
            images_of[row.key] = row.images[:, 0].numpy()
            if (row.key, candidate.inception) not in found:
                scored = score(row.images, features.of(row.images) if features and candidate.inception else None)
                after = scoring.held_out_losses(quantized, seed)
                off = scoring.damage(after, losses, row.images, unquantized.images, seed)
                found[row.key, candidate.inception] = scoring.against_baseline(scored, baseline) | off
            scores = found[row.key, candidate.inception]
            key_columns = {name: getattr(candidate, name) for name in KEY}
            drawn_columns = {"n_images": images, "steps": steps, "same_machine": len(row.machines | unquantized.machines) == 1}
            rows.append({**key_columns, **bytes_row, **scores, **drawn_columns, "reference": against, "sample": row.key})
            print(f"{' '.join(key_columns.values())}: {rows[-1]['mem_mib']:.2f} MiB, FID (MNIST) {scores['fid_mnist']:.2f}")
    return pd.DataFrame(rows), images_of


def _recipes(model: nn.Module, profile: str) -> Callable[[Candidate, nn.Module], samples.Recipe]:
    """A function of a row and its quantized model: the row's recipe, or that of an earlier row with the very same weights."""
    weights, first = weights_sha256(model), {}

    def recipe_of(candidate: Candidate, quantized: nn.Module) -> samples.Recipe:
        known = candidate.method in ("baseline", "uniform") or candidate.made
        fisher = {} if known else workspace.fisher_settings(profile)
        own = samples.recipe(model, candidate, weights, fisher)
        return first.setdefault(weights_sha256(quantized), own)

    return recipe_of


def evaluate_large(
    model: nn.Module, configurations: list[Candidate], profile: str, *, images: int, **settings: Any
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """`evaluate` with many images, the unquantized model first, and a tenth of them as a block of `block_statistics`.

    settings: those of `evaluate`. Its columns and those of `block_statistics`.
    """
    baseline = Candidate("baseline", "none", "fp32", "none", {})
    rows = [baseline, *(row for row in configurations if row.method != "baseline")]
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


def _peak(packed: nn.Module, model: nn.Module, profile: str, meter: PeakMeter) -> float:
    """Whole MiB: the measurement repeats to a few tenths."""
    path = paths.BUILD / profile / "peaks" / f"{sample_key(packed)}.json"
    if not path.is_file():
        weights = path.with_suffix(".safetensors")
        save_quantized(weights, packed, model)
        peak = round(meter.mib(weights))
        weights.unlink()
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(peak))
    return json.loads(path.read_text())
