"""Rows of the tables: quantize every model, sample from the same noise, score the images, alone and
against the FP32 model's.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lafq.quantization.model import dequantize_, weights_sha256
from lafq.study.diffusion import subject
from lafq.study.diffusion.ddpm import unit_interval
from lafq.study.diffusion.mnist import REFERENCE
from lafq.study.diffusion.training import held_out_losses
from lafq.study.images import metrics
from lafq.study.images.features import (
    NAMES,
    FeatureExtractor,
    Features,
    inception_extractor,
    mnist_extractor,
)
from lafq.study.images.sampling import ImageStore, Recipe, Sampled, Sampling
from lafq.study.rows import BASELINE, Row, quantized, recipe, sizes
from lafq.study.workspace import Workspace

METRICS = tuple(f"{metric}_{name}" for name in NAMES for metric in ("fid", "is", "kid"))


class Scored(NamedTuple):
    """Metrics of one set of images, and their bootstrap draws (count,)."""

    values: dict[str, float]
    draws: dict[str, Tensor]


class Scorer:
    """Scores sets of N images with error bars: every set on the same resamples of the N indices."""

    def __init__(self, images: int, seed: int) -> None:
        self.indices = metrics.resamples(images, seed)

    def score(self, images: Tensor, extractors: Sequence[FeatureExtractor]) -> Scored:
        """The metrics of uint8 images (N, 1, 32, 32) on each extractor's features."""
        scored = Scored({}, {})
        for extractor in extractors:
            seen = extractor.features(images)
            draws = {
                "fid": metrics.fid_draws(seen.features, extractor.reference, self.indices),
                "kid": metrics.kid_draws(seen.features, extractor.reference, self.indices),
            }
            if seen.logits is not None:
                draws["is"] = metrics.inception_score_draws(seen.logits, self.indices)
            scored.values.update(metric_values(seen, extractor))
            scored.draws.update({f"{m}_{extractor.name}": d for m, d in draws.items()})
        return scored


def metric_values(seen: Features, extractor: FeatureExtractor) -> dict[str, float]:
    """fid_, is_ (where there are logits) and kid_<name> of what an extractor sees of images."""
    values = {"fid": metrics.fid(seen.features, extractor.reference)}
    if seen.logits is not None:
        values["is"] = metrics.inception_score(seen.logits)
    values["kid"] = metrics.kid(seen.features, extractor.reference)
    return {f"{metric}_{extractor.name}": value for metric, value in values.items()}


def against_baseline(scored: Scored, baseline: Scored) -> dict[str, float]:
    """The columns of a row: for every metric the value, its difference from the baseline's, and
    both 95 % intervals.
    """
    columns = {}
    nan = float("nan")
    for metric in METRICS:
        value, delta, draws, paired = nan, nan, torch.full((2,), nan), torch.full((2,), nan)
        if metric in scored.values:
            value, draws = scored.values[metric], scored.draws[metric]
            delta, paired = value - baseline.values[metric], draws - baseline.draws[metric]
        columns |= _columns(metric, value, draws) | _columns(f"delta_{metric}", delta, paired)
    return columns


def paired_change(
    losses: Tensor, baseline: Tensor, generated: Tensor, unquantized: Tensor, seed: int
) -> dict[str, float]:
    """What FID cannot see, of images (N, 1, 32, 32) and held-out losses against the unquantized
    model's from the same noise.

    `rmse`, the mean over images of the root mean squared difference (0..1); `psnr`, the peak
    signal-to-noise ratio of all of them in dB; `class_changed`, the share of images whose predicted
    digit changes; `delta_loss`, the rise of the denoising loss on held-out digits, with its 95 %
    interval.
    """
    error = (unit_interval(generated) - unit_interval(unquantized)).square().flatten(1).mean(1)
    digits, digits_before = (
        mnist_extractor().features(images).logits.argmax(1) for images in (generated, unquantized)
    )
    rise = losses - baseline
    draws = metrics.mean_draws(rise, metrics.resamples(len(rise), seed))
    return {
        "rmse": error.sqrt().mean().item(),
        "psnr": -10 * error.mean().log10().item(),
        "class_changed": (digits != digits_before).float().mean().item(),
        **_columns("delta_loss", rise.mean().item(), draws),
    }


class Evaluation:
    """Draws and scores the rows of one table, and compares each with the FP32 model's images from
    the same noise. inception_rows: whether any row asks for Inception's features.
    """

    def __init__(
        self,
        work: Workspace,
        model: nn.Module,
        sampling: Sampling,
        inception: FeatureExtractor | None,
        inception_rows: bool,
    ) -> None:
        self.work, self.model, self.sampling = work, model, sampling
        self.store = ImageStore(work)
        self.extractors = [mnist_extractor(), *([inception] if inception else [])]
        self.inception_rows = inception_rows
        self.recipes: dict[str, Recipe] = {}
        self.scores: dict[tuple[str, bool], dict[str, float]] = {}

    @cached_property
    def baseline(self) -> Sampled:
        """The images of the FP32 model."""
        return self.draw(BASELINE, self.model, "FP32 baseline")

    @cached_property
    def expected(self) -> tuple[Scored, Tensor]:
        """The scores of the FP32 model's images, and its held-out losses."""
        scored = self._scored(self.baseline, self.inception_rows)
        return scored, held_out_losses(self.model, self.sampling.seed)

    def draw(self, row: Row, rounded: nn.Module, label: str) -> Sampled:
        """The images of a row; rounded: its quantized model, read back in FP32."""
        return self.store.draw(rounded, self.sampling, label, self.recipe(row, rounded))

    def draw_on_cluster(self, rows: list[Row]) -> None:
        """Have a Dask cluster draw the images of all rows that are not kept yet."""
        seed = self.sampling.seed
        copies = ((quantized(self.model, row, seed), partial(self.recipe, row)) for row in rows)
        self.store.draw_on_cluster(self.model, copies, len(rows), self.sampling)

    def recipe(self, row: Row, rounded: nn.Module) -> Recipe | None:
        """A row's recipe, or that of an earlier row with the very same weights; None where images
        are not kept.
        """
        if not self.work.keep:
            return None
        needs_fisher = row.rule not in ("baseline", "uniform") and not row.made
        fisher = subject.fisher_settings(self.work) if needs_fisher else {}
        names = subject.quantizable(self.model)
        words = recipe(row, weights_sha256(self.model), fisher, names)
        return self.recipes.setdefault(weights_sha256(rounded), words)

    def score(self, row: Row, rounded: nn.Module, sampled: Sampled) -> dict[str, float]:
        """The columns of a row's images and held-out losses; equal images are scored once."""
        key = sampled.key, row.inception
        if key not in self.scores:
            scored, losses = self.expected
            images, seed = (sampled.images, self.baseline.images), self.sampling.seed
            change = paired_change(held_out_losses(rounded, seed), losses, *images, seed)
            of_images = against_baseline(self._scored(sampled, row.inception), scored)
            self.scores[key] = of_images | change
        return self.scores[key]

    def _scored(self, sampled: Sampled, inception: bool) -> Scored:
        scorer = Scorer(self.sampling.images, self.sampling.seed)
        return scorer.score(sampled.images, self.extractors[: 2 if inception else 1])


def evaluate(
    work: Workspace,
    model: nn.Module,
    rows: list[Row],
    sampling: Sampling,
    inception_reference: int = 0,
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Quantize the model as every row says, sample from the same noise, and score the images.

    inception_reference: number of reference digits for the Inception columns; 0 leaves them empty.

    Returns one line per row (KEY, bytes, every metric with its interval and its paired difference
    from FP32, and how it was sampled; results/README.md lists the columns), and uint8 images (N,
    32, 32) by `sample`, the key of a row's images. All plans are checked first. Equal plans are
    sampled once; images that are kept already are not sampled again. Raises ValueError for a plan
    that does not fit the model and for no images, and the errors of `ImageStore.draw`.
    """
    stored = sizes(model, [row.plan for row in rows]).to_dict("records")
    inception = inception_extractor(inception_reference)
    run = Evaluation(work, model, sampling, inception, any(row.inception for row in rows))
    if work.scheduler:
        run.draw_on_cluster(rows)
    baseline, lines, images = run.baseline, [], {}
    for row, size in zip(rows, stored, strict=True):
        # One quantized model is held at a time.
        rounded = dequantize_(quantized(model, row, sampling.seed))
        sampled = run.draw(row, rounded, f"row {len(lines) + 1} of {len(rows)}")
        scores = run.score(row, rounded, sampled)
        how = _how(sampling, sampled, baseline, inception_reference if inception else 0)
        lines.append({**row.key, **size, **scores, **how})
        images[sampled.key] = sampled.images[:, 0].numpy()
        print(
            f"{' '.join(row.key.values())}: {size['mem_mib']:.2f} MiB, FID (MNIST) "
            f"{scores['fid_mnist']:.2f}",
            flush=True,
        )
    return pd.DataFrame(lines), images


def _how(
    sampling: Sampling, sampled: Sampled, baseline: Sampled, inception_reference: int
) -> dict[str, Any]:
    reference = f"{REFERENCE.stop - REFERENCE.start} test digits, 32x32"
    if inception_reference:
        reference += f" (Inception: {inception_reference})"
    return {
        "n_images": sampling.images,
        "steps": sampling.steps,
        "same_machine": len(sampled.machines | baseline.machines) == 1,
        "reference": reference,
        "sample": sampled.key,
    }


def quality(work: Workspace, model: nn.Module, sampling: Sampling, block: int) -> pd.DataFrame:
    """Metrics of the unquantized model on all images and on each disjoint block of them: the
    metric's own spread.

    One row for all images and one per block: columns images (a range), n_images, fid_mnist,
    is_mnist, kid_mnist.
    """
    words = recipe(BASELINE, weights_sha256(model), {}) if work.keep else None
    generated = ImageStore(work).draw(model, sampling, recipe=words).images
    starts = range(0, len(generated) - block + 1, block)
    extractor, lines = mnist_extractor(), []
    for part in (range(len(generated)), *(range(start, start + block) for start in starts)):
        seen = extractor.features(generated[part.start : part.stop])
        line = {"images": f"{part.start}-{part.stop - 1}", "n_images": len(part)}
        lines.append(line | metric_values(seen, extractor))
    return pd.DataFrame(lines)


def evaluate_large(
    work: Workspace, model: nn.Module, rows: list[Row], sampling: Sampling
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """`evaluate` with many images, the unquantized model first, and the columns of
    `block_statistics` for blocks of a tenth.
    """
    rows = [BASELINE, *(row for row in rows if row.rule != "baseline")]
    table, images = evaluate(work, model, rows, sampling)
    blocks = block_statistics(images, table["sample"][0], sampling.images // 10)
    return table.merge(blocks, on="sample", how="left"), images


def block_statistics(images: dict[str, np.ndarray], baseline: str, block: int) -> pd.DataFrame:
    """fid_mnist of disjoint blocks of images, as a paper of `block` images would have it: mean and
    standard deviation.

    images: uint8 (N, 32, 32) by `sample`; baseline: that of the unquantized model. One row per
    sample, columns sample, blocks, block_fid_mnist, block_fid_mnist_sd, and
    block_delta_fid_mnist(_sd), of the differences from the baseline's blocks; fid_mnist_inf, FID
    extrapolated to infinite N from blocks of a fifth, a half and all of the images.
    """
    features = {
        key: mnist_extractor().features(torch.from_numpy(pixels)[:, None]).features
        for key, pixels in images.items()
    }
    before, lines, sizes = _block_fids(features[baseline], block), [], [2, 5, 10]
    for key, of_row in features.items():
        fids = _block_fids(of_row, block)
        means = [_block_fids(of_row, size * block).mean() for size in sizes]
        line = {"sample": key, "blocks": len(fids)}
        for name, values in (("block_fid_mnist", fids), ("block_delta_fid_mnist", fids - before)):
            line |= {name: values.mean(), f"{name}_sd": values.std()}
        beyond = metrics.fid_at_infinity([size * block for size in sizes], means)
        lines.append(line | {"fid_mnist_inf": beyond})
    return pd.DataFrame(lines)


def _block_fids(features: Tensor, size: int) -> pd.Series:
    parts = [part for part in features.split(size) if len(part) == size]
    return pd.Series([metrics.fid(part, mnist_extractor().reference) for part in parts])


def _columns(name: str, value: float, draws: Tensor) -> dict[str, float]:
    low, high = metrics.interval(value, draws)
    return {name: value, f"{name}_low": low, f"{name}_high": high}
