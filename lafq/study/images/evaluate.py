"""Rows of the tables: models quantized, sampled from the same noise, and scored, alone and against
the FP32 model.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

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
from lafq.study.images.sampling import ImageStore, Recipe, RowFiles, Sampled, Sampling
from lafq.study.rows import BASELINE, Row, quantized, recipe, sizes
from lafq.study.workspace import Workspace

METRICS = tuple(f"{metric}_{name}" for name in NAMES for metric in ("fid", "is", "kid"))
NONE, NO_DRAWS = float("nan"), torch.tensor([torch.nan])  # of a metric that was not asked for


class Scored(NamedTuple):
    """Metrics of one set of images, and their bootstrap draws (count,)."""

    values: dict[str, float]
    draws: dict[str, Tensor]


def score(images: Tensor, extractors: Sequence[FeatureExtractor], seed: int) -> Scored:
    """The metrics of uint8 images (N, 1, 32, 32), on the same resamples for an equal N and seed."""
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
    """For every metric the value, its difference from the baseline's, and both 95 % intervals."""
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
        self.store = ImageStore(work)
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
        return self.store.draw(rounded, self.sampling, label, self.recipe(row, rounded))

    def draw_on_cluster(self, rows: Sequence[Row]) -> None:
        """Have a Dask cluster draw the images that are not kept yet, those of equal rows once."""
        drawn: set[str] = set()

        def tasks() -> Iterator[tuple[RowFiles, bytes]]:
            for row in rows:
                small = quantized(self.model, row, self.sampling.seed)
                packed = cluster.pack(small, self.model)
                rounded = dequantize_(small)
                files = self.store.files(rounded, self.sampling, self.recipe(row, rounded))
                if files.missing and files.key not in drawn:
                    drawn.add(files.key)
                    yield files, packed

        how = {"width": self.model.width, "device": self.work.device.type}
        done = cluster.sample_all(self.work.scheduler, tasks(), **self.sampling._asdict(), **how)
        for files, images, machine in tqdm(done, "sampling on the cluster", len(rows)):
            for batch in files.missing:
                files.keep(batch, images[batch.start : batch.stop], machine)

    def recipe(self, row: Row, rounded: nn.Module) -> Recipe | None:
        """A row's recipe, or an earlier row's with the very same weights; None if not kept."""
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
        more = f" (Inception: {inception[0]})" if inception else ""
        return {
            "n_images": self.sampling.images,
            "steps": self.sampling.steps,
            "same_machine": len(sampled.machines | self.baseline.machines) == 1,
            "reference": f"{mnist} test digits, 32x32{more}",
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
    `sample`, the key of a row's images. All plans are checked first; ValueError for one that does
    not fit the model, and as `ImageStore.draw`. What is kept already is not sampled again.
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
    """`evaluate`, the unquantized model first, with the columns of `block_statistics`."""
    rows = [BASELINE, *(row for row in rows if row.rule != "baseline")]
    table, images = evaluate(work, model, rows, sampling)
    blocks = block_statistics(images, table["sample"][0])
    return table.merge(blocks, on="sample", how="left"), images


def block_statistics(images: dict[str, np.ndarray], baseline: str) -> pd.DataFrame:
    """fid_mnist of disjoint blocks of a tenth of the images, uint8 (N, 32, 32) by `sample`, as a
    paper of so many would have it: mean, standard deviation (_sd), and those of the difference from
    the same block of the `sample` baseline.

    fid_mnist_inf: FID extrapolated to infinite N from blocks of a fifth, a half and all images.
    """
    look, block = mnist_extractor().features, len(images[baseline]) // 10
    features = {key: look(torch.from_numpy(x)[:, None]).features for key, x in images.items()}
    fids = pd.DataFrame({key: _block_fids(of_row, block) for key, of_row in features.items()})
    deltas, sizes = fids.sub(fids[baseline], axis=0), [2 * block, 5 * block, 10 * block]

    def beyond(of_row: Tensor) -> float:
        return metrics.fid_at_infinity(sizes, [_block_fids(of_row, n).mean() for n in sizes])

    columns = {"blocks": fids.count()}
    columns |= {"block_fid_mnist": fids.mean(), "block_fid_mnist_sd": fids.std()}
    columns |= {"block_delta_fid_mnist": deltas.mean(), "block_delta_fid_mnist_sd": deltas.std()}
    columns["fid_mnist_inf"] = [beyond(of_row) for of_row in features.values()]
    return pd.DataFrame(columns).rename_axis("sample").reset_index()


def _block_fids(features: Tensor, size: int) -> pd.Series:
    parts = [part for part in features.split(size) if len(part) == size]
    return pd.Series([metrics.fid(part, mnist_extractor().reference) for part in parts])


def _with_interval(name: str, value: float, draws: Tensor) -> dict[str, float]:
    low, high = metrics.interval(value, draws)
    return {name: value, f"{name}_low": low, f"{name}_high": high}
