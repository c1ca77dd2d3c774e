"""Rows of the tables: quantize every model, sample from the same noise, score the images, alone and
against the FP32 model's.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lafq.quantization.model import dequantize_, weights_sha256
from lafq.study.diffusion import subject
from lafq.study.diffusion.ddpm import unit_interval
from lafq.study.diffusion.training import held_out_losses
from lafq.study.images import cluster, metrics
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
NONE, NO_DRAWS = float("nan"), torch.tensor([torch.nan])  # of a metric that was not asked for


class Scored(NamedTuple):
    """Metrics of one set of images, and their bootstrap draws (count,)."""

    values: dict[str, float]
    draws: dict[str, Tensor]


def score(images: Tensor, extractors: Sequence[FeatureExtractor], seed: int) -> Scored:
    """The metrics of uint8 images (N, 1, 32, 32) on each extractor's features; sets of equally many
    images are resampled alike.
    """
    indices, scored = metrics.resamples(len(images), seed), Scored({}, {})
    for extractor in extractors:
        seen, reference = extractor.features(images), extractor.reference
        draws = {
            "fid": metrics.fid_draws(seen.features, reference, indices),
            "kid": metrics.kid_draws(seen.features, reference, indices),
        }
        if seen.logits is not None:
            draws["is"] = metrics.inception_score_draws(seen.logits, indices)
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
    for metric in METRICS:
        value, before = (s.values.get(metric, NONE) for s in (scored, baseline))
        draws, paired = (s.draws.get(metric, NO_DRAWS) for s in (scored, baseline))
        columns |= _with_interval(metric, value, draws)
        columns |= _with_interval(f"delta_{metric}", value - before, draws - paired)
    return columns


def paired_change(
    losses: Tensor, baseline: Tensor, generated: Tensor, unquantized: Tensor, seed: int
) -> dict[str, float]:
    """What FID cannot see, of images (N, 1, 32, 32) and held-out losses against the unquantized
    model's from the same noise.

    `rmse`, the mean over images of the root mean squared difference (0..1); `psnr`, the peak
    signal-to-noise ratio of all of them in dB; `class_changed`, the share of images whose predicted
    digit changes; `delta_loss`, the rise of the denoising loss, with its 95 % interval.
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
        **_with_interval("delta_loss", rise.mean().item(), draws),
    }


class Evaluation:
    """Draws and scores the rows of one table, and compares each with `baseline`, the FP32 model's
    images from the same noise. rows: what a Dask cluster draws first, where there is one.
    """

    def __init__(
        self,
        work: Workspace,
        model: nn.Module,
        sampling: Sampling,
        inception: FeatureExtractor | None = None,
        rows: Sequence[Row] = (),
    ) -> None:
        self.work, self.model, self.sampling = work, model, sampling
        self.extractors = [mnist_extractor(), *([inception] if inception else [])]
        self.recipes: dict[str, Recipe] = {}
        self.scores: dict[tuple[str, bool], dict[str, float]] = {}
        if work.scheduler and rows:
            self.draw_on_cluster(rows)
        self.baseline = self.draw(BASELINE, model, "FP32 baseline")

    @cached_property
    def expected(self) -> tuple[Scored, Tensor]:
        """The scores of the FP32 model's images, and its held-out losses."""
        scored = score(self.baseline.images, self.extractors, self.sampling.seed)
        return scored, held_out_losses(self.model, self.sampling.seed)

    def draw(self, row: Row, rounded: nn.Module, label: str) -> Sampled:
        """The images of a row; rounded: its quantized model, read back in FP32."""
        return ImageStore(self.work).draw(rounded, self.sampling, label, self.recipe(row, rounded))

    def draw_on_cluster(self, rows: Sequence[Row]) -> None:
        """Have a Dask cluster draw the images of all rows that are not kept yet."""

        def packed() -> Iterator[tuple[bytes, nn.Module, Recipe | None]]:
            for row in rows:
                small = quantized(self.model, row, self.sampling.seed)
                content = cluster.pack(small, self.model)
                rounded = dequantize_(small)
                yield content, rounded, self.recipe(row, rounded)

        where = {"width": self.model.width, "device": self.work.device.type}
        ImageStore(self.work).draw_on_cluster(packed(), len(rows), self.sampling, **where)

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
        key, seed = (sampled.key, row.inception), self.sampling.seed
        if key not in self.scores:
            expected, losses = self.expected
            extractors = self.extractors if row.inception else self.extractors[:1]
            scored = score(sampled.images, extractors, seed)
            images = sampled.images, self.baseline.images
            change = paired_change(held_out_losses(rounded, seed), losses, *images, seed)
            self.scores[key] = against_baseline(scored, expected) | change
        return self.scores[key]

    def conditions(self, sampled: Sampled) -> dict[str, Any]:
        """The columns that say how a row's images were drawn and scored."""
        mnist, *inception = (extractor.reference_images for extractor in self.extractors)
        reference = f"{mnist} test digits, 32x32"
        return {
            "n_images": self.sampling.images,
            "steps": self.sampling.steps,
            "same_machine": len(sampled.machines | self.baseline.machines) == 1,
            "reference": reference + "".join(f" (Inception: {count})" for count in inception),
            "sample": sampled.key,
        }


def evaluate(
    work: Workspace,
    model: nn.Module,
    rows: list[Row],
    sampling: Sampling,
    inception_reference: int = 0,
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Quantize the model as every row says, sample from the same noise, and score the images.

    inception_reference: number of reference digits for the Inception columns; 0 leaves them empty.

    Returns one line per row (results/README.md lists the columns), and uint8 images (N, 32, 32) by
    `sample`, the key of a row's images. All plans are checked first. Equal plans are sampled once;
    images that are kept already are not sampled again. Raises ValueError for a plan that does not
    fit the model, and the errors of `ImageStore.draw`.
    """
    stored = sizes(model, [row.plan for row in rows]).to_dict("records")
    run = Evaluation(work, model, sampling, inception_extractor(inception_reference), rows)
    lines, images = [], {}
    for row, size in zip(rows, stored, strict=True):
        # One quantized model is held at a time.
        rounded = dequantize_(quantized(model, row, sampling.seed))
        sampled = run.draw(row, rounded, f"row {len(lines) + 1} of {len(rows)}")
        scores = run.score(row, rounded, sampled)
        lines.append({**row.key, **size, **scores, **run.conditions(sampled)})
        images[sampled.key] = sampled.images[:, 0].numpy()
        name, mib = " ".join(row.key.values()), size["mem_mib"]
        print(f"{name}: {mib:.2f} MiB, FID (MNIST) {scores['fid_mnist']:.2f}", flush=True)
    return pd.DataFrame(lines), images


def quality(work: Workspace, model: nn.Module, sampling: Sampling, block: int) -> pd.DataFrame:
    """Metrics of the unquantized model on all images and on each disjoint block of them: the
    metric's own spread. Columns images (a range), n_images, fid_mnist, is_mnist, kid_mnist.
    """
    generated, extractor = Evaluation(work, model, sampling).baseline.images, mnist_extractor()
    every, lines = range(len(generated)), []
    starts = every[: len(every) - block + 1 : block]
    for part in (every, *(every[start : start + block] for start in starts)):
        seen = extractor.features(generated[part.start : part.stop])
        line = {"images": f"{part.start}-{part.stop - 1}", "n_images": len(part)}
        lines.append(line | metric_values(seen, extractor))
    return pd.DataFrame(lines)


def evaluate_large(
    work: Workspace, model: nn.Module, rows: list[Row], sampling: Sampling
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """`evaluate` with many images, the unquantized model first, and the columns of
    `block_statistics`.
    """
    rows = [BASELINE, *(row for row in rows if row.rule != "baseline")]
    table, images = evaluate(work, model, rows, sampling)
    return table.merge(
        block_statistics(images, table["sample"][0]), on="sample", how="left"
    ), images


def block_statistics(images: dict[str, np.ndarray], baseline: str) -> pd.DataFrame:
    """fid_mnist of disjoint blocks of a tenth of the images, as a paper of so many would have it.

    images: uint8 (N, 32, 32) by `sample`; baseline: that of the unquantized model. Columns sample,
    blocks, block_fid_mnist and block_delta_fid_mnist (its difference from the baseline's block),
    each the mean and, with _sd, the standard deviation over the blocks; fid_mnist_inf, FID
    extrapolated to infinite N from blocks of a fifth, a half and all of the images.
    """
    features = {
        key: mnist_extractor().features(torch.from_numpy(pixels)[:, None]).features
        for key, pixels in images.items()
    }
    block = len(images[baseline]) // 10
    before, lines = _block_fids(features[baseline], block), []
    sizes = [2 * block, 5 * block, 10 * block]
    for key, of_row in features.items():
        fids = _block_fids(of_row, block)
        line = {"sample": key, "blocks": len(fids)}
        for name, values in (("block_fid_mnist", fids), ("block_delta_fid_mnist", fids - before)):
            line |= {name: values.mean(), f"{name}_sd": values.std()}
        means = [_block_fids(of_row, size).mean() for size in sizes]
        lines.append(line | {"fid_mnist_inf": metrics.fid_at_infinity(sizes, means)})
    return pd.DataFrame(lines)


def _block_fids(features: Tensor, size: int) -> pd.Series:
    parts = [part for part in features.split(size) if len(part) == size]
    return pd.Series([metrics.fid(part, mnist_extractor().reference) for part in parts])


def _with_interval(name: str, value: float, draws: Tensor) -> dict[str, float]:
    low, high = metrics.interval(value, draws)
    return {name: value, f"{name}_low": low, f"{name}_high": high}
