"""Rows of the tables: models quantized, sampled from the same noise, and scored, alone and against
the FP32 model.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lafq.quantization.model import weights_sha256
from lafq.study import rows as study_rows
from lafq.study.diffusion import subject
from lafq.study.diffusion.ddpm import sample, unit_interval
from lafq.study.images import cluster, metrics
from lafq.study.images.features import NAMES, FeatureExtractor, extractors_of, mnist_extractor
from lafq.study.images.sampling import ImageStore, Recipe, Sampling
from lafq.study.rows import BASELINE, Row, quantized, sizes
from lafq.study.workspace import Workspace

METRICS = tuple(f"{metric}_{name}" for name in NAMES for metric in ("fid", "is", "kid"))
REDRAWN = 4  # images of a row that are drawn again
# Images drawn again: mean absolute difference of a pixel, in grey levels of 255, over all images
# compared. It was 0 with AVX2 kernels and batches of 8, where AVX-512 kernels had drawn batches of
# 25; between uniform INT8 and FP32 it is 0.14.
GREY_LEVELS = 0.02
NONE, NO_DRAWS = float("nan"), torch.tensor([torch.nan])  # of a metric that was not asked for


class Measured(NamedTuple):
    """Of a model: its images (N, 1, 32, 32), the digits that the classifier sees in them (N,), the
    images' metrics with their bootstrap draws.
    """

    images: Tensor
    digits: Tensor
    scores: dict[str, float]
    draws: dict[str, Tensor]


def measure(images: Tensor, extractors: Sequence[FeatureExtractor], seed: int) -> Measured:
    """Score uint8 images; the first extractor is the classifier's."""
    scores, draws = {}, {}
    seen = [extractor.features(images) for extractor in extractors]
    for extractor, of_images in zip(extractors, seen, strict=True):
        scores |= extractor.scores(of_images)
        draws |= extractor.score_draws(of_images, seed)
    return Measured(images, seen[0].logits.argmax(1), scores, draws)


def compare(row: Measured, baseline: Measured, seed: int) -> dict[str, float]:
    """For every metric the value, its difference from the unquantized model's, and both 95 %
    intervals; and what FID cannot see of images from the same noise.

    `image_psnr`, the mean over images of their peak signal-to-noise ratio in dB, with its interval,
    and `below_30`, the share of images below 30 dB; `psnr`, that of all pixels together;
    `class_changed`, the share of images whose predicted digit changes.
    """
    columns = {}
    for metric in METRICS:
        value, before = (m.scores.get(metric, NONE) for m in (row, baseline))
        draws, paired = (m.draws.get(metric, NO_DRAWS) for m in (row, baseline))
        columns |= metrics.with_interval(metric, value, draws)
        columns |= metrics.with_interval(f"delta_{metric}", value - before, draws - paired)
    columns |= image_error(unit_interval(row.images), unit_interval(baseline.images), seed)
    columns["class_changed"] = (row.digits != baseline.digits).float().mean().item()
    return columns


def image_error(images: Tensor, reference: Tensor, seed: int) -> dict[str, float]:
    """The columns image_psnr, below_30 and psnr of images in [0, 1] from the same noise."""
    psnr = metrics.image_psnr(images, reference)
    draws = metrics.mean_draws(psnr, metrics.resamples(len(psnr), seed))
    columns = metrics.with_interval("image_psnr", psnr.double().mean().item(), draws)
    below = (psnr < 30).double().mean().item()
    return columns | {
        "below_30": below,
        "psnr": -10 * (images - reference).square().mean().log10().item(),
    }


def recipes(work: Workspace, model: nn.Module, rows: Sequence[Row]) -> list[Recipe | None]:
    """How the weights of every row are made, for a profile that keeps images by it."""
    if not work.keep:
        return [None] * len(rows)
    weights, names, words = weights_sha256(model), subject.quantizable(model), []
    for row in rows:
        needs_fisher = row.rule not in ("baseline", "uniform") and not row.made
        fisher = subject.fisher_settings(work) if needs_fisher else {}
        words.append(study_rows.recipe(row, weights, fisher, names))
    return words


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
    store, (first, *words) = ImageStore(work), recipes(work, model, [BASELINE, *rows])
    extractors, seed = extractors_of(inception_reference), sampling.seed
    references = {extractor.name: extractor.reference_images for extractor in extractors}
    reference = f"{references['mnist']} test digits, 32x32"
    if "inception" in references:
        reference += f" (Inception: {references['inception']})"
    if not work.keep:
        announce(work, model, sampling, len(rows) + 1)
    if work.scheduler:
        copies = (quantized(model, row, seed) for row in rows)
        cluster.draw(store, zip(copies, words, strict=True), sampling)
    unquantized = store.draw(model, sampling, "FP32 baseline", first)
    baseline = measure(unquantized.images, extractors, seed)
    lines, images, scores = [], {}, {}
    for row, size, recipe in zip(rows, stored, words, strict=True):
        # One quantized model is held at a time.
        small = quantized(model, row, seed)
        sampled = store.draw(small, sampling, f"row {len(lines) + 1} of {len(rows)}", recipe)
        key = sampled.key, row.inception
        if key not in scores:  # equal images are scored once
            asked = [e for e in extractors if row.inception or e.name != "inception"]
            scores[key] = compare(measure(sampled.images, asked, seed), baseline, seed)
        drawn = {"n_images": sampling.images, "steps": sampling.steps}
        drawn["same_machine"] = len(sampled.machines | unquantized.machines) == 1
        drawn |= {"reference": reference, "sample": sampled.key}
        lines.append({**row.key, **size, **scores[key], **drawn})
        images[sampled.key] = sampled.images[:, 0].numpy()
        name, mib = " ".join(row.key.values()), size["mem_mib"]
        print(f"{name}: {mib:.2f} MiB, FID (MNIST) {scores[key]['fid_mnist']:.2f}", flush=True)
    return pd.DataFrame(lines), images


def announce(work: Workspace, model: nn.Module, sampling: Sampling, rows: int) -> None:
    """Print how long drawing the images of so many rows takes at most, where that is minutes."""
    batch = min(sampling.batch, sampling.images)
    x = torch.zeros(batch, *subject.SHAPE, device=work.device)
    t = torch.zeros(batch, dtype=torch.int64, device=work.device)
    with torch.inference_mode():
        model(x, t)  # which prepares the kernels
        start = time.perf_counter()
        model(x, t)
    seconds = (time.perf_counter() - start) * sampling.steps * len(sampling.batches) * rows
    if seconds > 60:
        print(
            f"drawing {rows} rows of {sampling.images} images: {seconds / 3600:.1f} hours at most"
        )


def redraw(
    work: Workspace, model: nn.Module, rows: Sequence[Row], sampling: Sampling
) -> pd.DataFrame:
    """The first images of rows whose images are kept, drawn again and compared with these: columns
    KEY, n_images, steps, `grey_levels` (mean absolute difference of a pixel, of 255), `within`
    (at most GREY_LEVELS), and the `machine` that drew the kept ones.
    """
    store, lines, batch = ImageStore(work), [], sampling.batches[0]
    count = min(REDRAWN, len(batch))
    how = sampling._replace(images=count, batch=count)
    for row, recipe in zip(rows, recipes(work, model, rows), strict=True):
        small = quantized(model, row, sampling.seed)
        files = store.files(small, sampling, recipe)
        kept, machine = files.read(batch)
        images = sample(small, *how, "drawn again").numpy()
        store.count(files.key, range(count), "compared")
        off = np.abs(images.astype(int) - kept[:count]).mean()
        line = {"n_images": count, "steps": sampling.steps, "grey_levels": off}
        lines.append({**row.key, **line, "within": off <= GREY_LEVELS, "machine": machine})
    return pd.DataFrame(lines)


def quality(work: Workspace, model: nn.Module, sampling: Sampling, block: int) -> pd.DataFrame:
    """Metrics of the unquantized model on all images and on each disjoint block of them: the
    metric's own spread. Columns images (a range), n_images, fid_mnist, is_mnist, kid_mnist.
    """
    [words], extractor = recipes(work, model, [BASELINE]), mnist_extractor()
    images, lines = ImageStore(work).draw(model, sampling, "FP32 baseline", words).images, []
    every = torch.arange(len(images))
    for part in (every, *_blocks(every, block)):
        line = {"images": f"{part[0]}-{part[-1]}", "n_images": len(part)}
        lines.append(line | extractor.scores(extractor.features(images[part])))
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
    columns = {"blocks": fids.count()}
    columns |= {"block_fid_mnist": fids.mean(), "block_fid_mnist_sd": fids.std()}
    columns |= {"block_delta_fid_mnist": deltas.mean(), "block_delta_fid_mnist_sd": deltas.std()}
    means = [[_block_fids(of_row, n).mean() for n in sizes] for of_row in features.values()]
    columns["fid_mnist_inf"] = [metrics.fid_at_infinity(sizes, of_row) for of_row in means]
    return pd.DataFrame(columns).rename_axis("sample").reset_index()


def _block_fids(features: Tensor, size: int) -> pd.Series:
    reference = mnist_extractor().reference
    return pd.Series([metrics.fid(block, reference) for block in _blocks(features, size)])


def _blocks(of_images: Tensor, size: int) -> list[Tensor]:
    return [block for block in of_images.split(size) if len(block) == size]
