"""Rows of the tables: quantize every candidate, sample from the same noise, score the images."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from lafq.quantization.checkpoint import save_quantized
from lafq.quantization.model import dequantize, quantize, weights_sha256
from lafq.study import workspace
from lafq.study.diffusion import subject
from lafq.study.diffusion.mnist import REFERENCE
from lafq.study.diffusion.unet import quantizable
from lafq.study.images import bootstrap, classifier, inception, metrics, samples, scoring
from lafq.study.images.peak_memory import PeakMeter
from lafq.study.images.samples import Sampled, Sampling, cached_samples, sample_on_cluster
from lafq.study.rows import BASELINE, KEY, Row, quantized, recipe, sizes
from lafq.study.workspace import Workspace

# From a candidate, its quantized model read back in FP32, and (Draw) the label of a progress bar.
Draw = Callable[[Row, nn.Module, str], Sampled]
Score = Callable[[Row, nn.Module, Sampled], dict[str, float]]


def evaluate(
    work: Workspace,
    model: nn.Module,
    candidates: list[Row],
    sampling: Sampling,
    inception_reference: int = 0,
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Quantize the model as every candidate says, sample from the same noise, and score the images.

    inception_reference: number of reference digits for the Inception columns; 0 leaves them empty.

    Returns one row per candidate (KEY, bytes, every metric with its interval and its paired
    difference from FP32, and how it was sampled; results/README.md lists the columns), and uint8
    images (N, 32, 32) by `sample`, the key of a row's images. All plans are checked first. Equal
    plans are sampled once; images that are kept already are not sampled again. Raises ValueError
    for a plan that does not fit the model and for no images, and the errors of `cached_samples`.
    """
    stored = sizes(model, [c.plan for c in candidates]).to_dict("records")
    provenance_of = _provenances(work, model) if work.keep else lambda *_: None
    if work.scheduler:
        copies = (
            (quantized(model, c, sampling.seed), partial(provenance_of, c)) for c in candidates
        )
        sample_on_cluster(work, model, copies, len(candidates), sampling)

    def draw(candidate: Row, rounded: nn.Module, label: str) -> Sampled:
        return cached_samples(work, rounded, sampling, label, provenance_of(candidate, rounded))

    features = load_inception(work, inception_reference)
    baseline = draw(BASELINE, model, "FP32 baseline")
    score = _scores(model, baseline, features, any(c.inception for c in candidates), sampling)
    reference = f"{REFERENCE.stop - REFERENCE.start} test digits, 32x32" + (
        f" (Inception: {inception_reference})" if features else ""
    )
    rows, images = [], {}
    for candidate, sampled, scores in _rows(model, candidates, sampling.seed, draw, score):
        images[sampled.key] = sampled.images[:, 0].numpy()
        named, size = candidate.key, stored[len(rows)]
        how = {
            "n_images": sampling.images,
            "steps": sampling.steps,
            "same_machine": len(sampled.machines | baseline.machines) == 1,
        }
        rows.append(
            {**named, **size, **scores, **how, "reference": reference, "sample": sampled.key}
        )
        print(
            f"{' '.join(named.values())}: {size['mem_mib']:.2f} MiB, FID (MNIST) "
            f"{scores['fid_mnist']:.2f}",
            flush=True,
        )
    return pd.DataFrame(rows), images


def _rows(
    model: nn.Module, candidates: list[Row], seed: int, draw: Draw, score: Score
) -> Iterator[tuple[Row, Sampled, dict[str, float]]]:
    """Quantize, sample, score: one candidate after another, so that one quantized model is held at
    a time.
    """
    for i, candidate in enumerate(candidates, start=1):
        rounded = dequantize(quantized(model, candidate, seed))
        sampled = draw(candidate, rounded, f"row {i} of {len(candidates)}")
        yield candidate, sampled, score(candidate, rounded, sampled)


def _scores(
    model: nn.Module,
    baseline: Sampled,
    features: "InceptionFeatures | None",
    inception_rows: bool,
    sampling: Sampling,
) -> Score:
    """A function that scores a candidate's images and its held-out losses against the FP32 model's;
    equal images only once.
    """
    seed, reference = sampling.seed, features.reference if features else None
    score_images = scoring.make_scorer(sampling.images, seed, reference)
    expected = score_images(
        baseline.images, features.extract(baseline.images) if features and inception_rows else None
    )
    losses, found = scoring.held_out_losses(model, seed), {}

    def score(candidate: Row, rounded: nn.Module, sampled: Sampled) -> dict[str, float]:
        key = sampled.key, candidate.inception
        if key not in found:
            scored = score_images(
                sampled.images,
                features.extract(sampled.images) if features and candidate.inception else None,
            )
            after = scoring.held_out_losses(rounded, seed)
            off = scoring.paired_change(after, losses, sampled.images, baseline.images, seed)
            found[key] = scoring.against_baseline(scored, expected) | off
        return found[key]

    return score


def _provenances(
    work: Workspace, model: nn.Module
) -> Callable[[Row, nn.Module], samples.Provenance]:
    """A function of a candidate and its quantized model: its provenance, or an earlier candidate's
    with the very same weights.
    """
    of_model, first = weights_sha256(model), {}

    def provenance_of(candidate: Row, rounded: nn.Module) -> samples.Provenance:
        needs_none = candidate.rule in ("baseline", "uniform") or candidate.made
        fisher = {} if needs_none else subject.fisher_settings(work)
        own = recipe(candidate, of_model, fisher, quantizable(model))
        return first.setdefault(weights_sha256(rounded), own)

    return provenance_of


def measure_peak_memory(work: Workspace, model: nn.Module, candidates: list[Row]) -> pd.DataFrame:
    """Peak memory of sampling from each candidate's file, in whole MiB (it repeats to a few
    tenths): columns KEY and peak_mib.
    """
    found = []
    with TemporaryDirectory() as folder, PeakMeter(work.device) as meter:
        path = Path(folder) / "peak.safetensors"
        for candidate in candidates:
            save_quantized(path, quantize(model, candidate.plan), model)
            found.append(candidate.key | {"peak_mib": round(meter.mib(path))})
    return pd.DataFrame(found, columns=[*KEY, "peak_mib"])


def evaluate_large(
    work: Workspace, model: nn.Module, candidates: list[Row], sampling: Sampling
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """`evaluate` with many images, the unquantized model first, and the columns of
    `block_statistics` for blocks of a tenth.
    """
    rows = [BASELINE, *(row for row in candidates if row.rule != "baseline")]
    table, images = evaluate(work, model, rows, sampling)
    return table.merge(
        block_statistics(images, table["sample"][0], sampling.images // 10), on="sample", how="left"
    ), images


def quality(work: Workspace, model: nn.Module, sampling: Sampling, block: int) -> pd.DataFrame:
    """Metrics of the unquantized model on all images and on each disjoint block of them: the
    metric's own spread.

    One row for all images and one per block: columns images (a range), n_images, fid_mnist,
    is_mnist, kid_mnist.
    """
    own = recipe(BASELINE, weights_sha256(model), {}) if work.keep else None
    network, generated = (
        classifier.load(),
        cached_samples(work, model, sampling, provenance=own).images,
    )
    reference, found = metrics.mnist_reference(network), []
    for part in (
        range(len(generated)),
        *(range(i, i + block) for i in range(0, len(generated) - block + 1, block)),
    ):
        features, logits = metrics.mnist_features(network, generated[part.start : part.stop])
        scores = metrics.mnist_metrics(features, logits, reference)
        found.append({"images": f"{part.start}-{part.stop - 1}", "n_images": len(part), **scores})
    return pd.DataFrame(found)


def block_statistics(samples: dict[str, np.ndarray], baseline: str, block: int) -> pd.DataFrame:
    """fid_mnist of disjoint blocks of images, as a paper of `block` images would have it: mean and
    standard deviation.

    samples: uint8 (N, 32, 32) by `sample`; baseline: that of the unquantized model. One row per
    sample, columns sample, blocks, block_fid_mnist, block_fid_mnist_sd, and
    block_delta_fid_mnist(_sd), of the differences from the baseline's blocks; fid_mnist_inf, FID
    extrapolated to infinite N from blocks of a fifth, a half and all of the images.
    """
    network = classifier.load()
    reference = metrics.mnist_reference(network)

    def fids(features: Tensor, size: int) -> pd.Series:
        return pd.Series(
            [metrics.fid(part, reference) for part in features.split(size) if len(part) == size]
        )

    features = {
        key: metrics.mnist_features(network, torch.from_numpy(images)[:, None])[0]
        for key, images in samples.items()
    }
    at_baseline, rows = fids(features[baseline], block), []
    for key, of_row in features.items():
        found, sizes = fids(of_row, block), [2 * block, 5 * block, 10 * block]
        beyond = bootstrap.fid_at_infinity(sizes, [fids(of_row, size).mean() for size in sizes])
        spread = {"block_fid_mnist": found, "block_delta_fid_mnist": found - at_baseline}
        numbers = {
            name: v
            for k, values in spread.items()
            for name, v in ((k, values.mean()), (f"{k}_sd", values.std()))
        }
        rows.append({"sample": key, "blocks": len(found), **numbers, "fid_mnist_inf": beyond})
    return pd.DataFrame(rows)


class InceptionFeatures(NamedTuple):
    """The network, its reference features, and a function of images that gives features and logits
    and keeps them.
    """

    extractor: FeatureExtractorInceptionV3
    reference: metrics.Reference
    extract: Callable[[Tensor], tuple[Tensor, Tensor | None]]


def load_inception(work: Workspace, reference_images: int) -> InceptionFeatures | None:
    """Inception with its reference, or None where the profile asks for none or no weights are
    available; a line says which.
    """
    if not reference_images:
        print("Inception columns: left empty (no Inception reference is asked for)")
        return None
    extractor, source = inception.load()
    print(source)
    if extractor is None:
        return None
    reference = metrics.inception_reference(
        extractor, reference_images, workspace.BUILD / "inception"
    )
    return InceptionFeatures(
        extractor,
        reference,
        partial(metrics.kept_inception_features, extractor, folder=work.build / "features"),
    )
