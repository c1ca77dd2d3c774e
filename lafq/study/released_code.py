"""What the released code's choices move (07_audit), each taken alone: in the Fisher values, in the
weights that they keep, and in the way of scoring images.

This is our own writing of what the authors' public code does; where it leaves something open, the
docstring says how it is read here.
"""

import copy
import math

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, grad

from lafq.quantization.model import dequantize_, quantize
from lafq.quantization.plan import make_plan
from lafq.study.diffusion import training
from lafq.study.diffusion.ddpm import ALPHA_BAR, unit_interval
from lafq.study.diffusion.mnist import REFERENCE, mnist, unpadded
from lafq.study.diffusion.unet import UNet, layer_of, quantizable
from lafq.study.fisher_by_timestep import fisher_by_timestep
from lafq.study.images import metrics
from lafq.study.images.evaluate import evaluate
from lafq.study.images.features import FeatureExtractor, inception_extractor, mnist_extractor
from lafq.study.images.metrics import Reference
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.poster import GROUPS
from lafq.study.rows import KEY, Row, keep_ratio, ratio_rows, uniform_rows
from lafq.study.workspace import Workspace


def fresh_network(model: UNet, seed: int) -> UNet:
    """A network of the same shape as it is before training (R2)."""
    torch.manual_seed(seed)
    return UNet(model.width).eval().to(next(model.parameters()).device)


def reconstruction_fisher(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Squared gradient of the mean of (model(z, 1) - z)^2 for one image, batch 1 (R3), by parameter
    name.

    z is the noise-free sqrt(abar_1) * x0 of the uint8 image (1, 32, 32), our reading of "a
    noise-free trajectory".
    """
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    z = ALPHA_BAR[1].sqrt().float() * unit_interval(image[None]).to(next(model.parameters()).device)
    t = torch.ones(1, dtype=torch.int64, device=z.device)
    gradient = grad(lambda p: (functional_call(model, p, (z, t)) - z).square().mean())(parameters)
    return {n: gradient[n].square() for n in quantizable(model)}


def variants(
    model: UNet, fisher: dict[str, Tensor], images: Tensor, samples: int, seed: int
) -> dict[str, dict[str, Tensor]]:
    """Fisher values (on the CPU) under each choice alone, the project's own first; images uint8 (N,
    1, 32, 32).
    """
    names, fresh = list(quantizable(model)), fresh_network(model, seed)
    together = reconstruction_fisher(fresh, images[0])
    found = {
        "this project": fisher,
        "untrained network (R2)": fisher_by_timestep(
            fresh, names, images, samples=samples, bins=20, seed=seed
        ).by_weight,
        "loss against the input, one image, t = 1 (R3)": reconstruction_fisher(model, images[0]),
        "one sample instead of many": fisher_by_timestep(
            model, names, images, samples=1, bins=1, seed=seed
        ).by_weight,
        "weight tensor as the unit (R4)": {n: f.mean().expand_as(f) for n, f in fisher.items()},
        "all of these, as released": {n: f.mean().expand_as(f) for n, f in together.items()},
    }
    return {choice: {n: f.cpu() for n, f in values.items()} for choice, values in found.items()}


def rank_correlation(ours: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Spearman's rank correlation of the values of all weights of each layer (NaN where all are
    equal).
    """
    theirs = _by_layer(other)
    return {
        layer: _spearman(_flat(parts), _flat(theirs[layer]))
        for layer, parts in _by_layer(ours).items()
    }


def rank_table(ours: dict[str, Tensor], found: dict[str, dict[str, Tensor]]) -> pd.DataFrame:
    """`rank_correlation` of every choice: columns choice and the layers."""
    return (
        pd.DataFrame({c: rank_correlation(ours, values) for c, values in found.items()})
        .T.rename_axis("choice")
        .reset_index()
    )


def kept_in_common(ours: dict[str, Tensor], other: dict[str, Tensor], ratio: float) -> float:
    """Of the weights that the ratio rule keeps by the first values, the share that it keeps by the
    second ones too.
    """
    first, second = keep_ratio(ours, ratio), keep_ratio(other, ratio)
    return sum(int((first[n] & second[n]).sum()) for n in first) / sum(
        int(m.sum()) for m in first.values()
    )


def fisher_choices(
    model: UNet, found: dict[str, dict[str, Tensor]], ratio: float, seed: int
) -> pd.DataFrame:
    """One row per choice: mean rank correlation with ours over the layers, kept weights in common,
    and the rise of the held-out denoising loss when the ratio rule on these values sends the other
    single weights to INT8 and to INT4."""
    ours = found["this project"]
    losses = training.held_out_losses(model, seed)
    rows = []
    for name, values in found.items():
        row = {
            "choice": name,
            "rank_correlation": pd.Series(rank_correlation(ours, values)).mean(),
            "kept_in_common": kept_in_common(ours, values, ratio),
        }
        for low in ("int8", "int4"):
            plan = make_plan(keep_ratio(values, ratio), low)
            rise = (
                (training.held_out_losses(dequantize_(quantize(model, plan)), seed) - losses)
                .mean()
                .item()
            )
            row[f"delta_loss_{low}"] = rise
        rows.append(row)
    return pd.DataFrame(rows)


def choice_rows(found: dict[str, dict[str, Tensor]], ratio: float) -> list[Row]:
    """The ratio rule in INT8 on the Fisher values of every choice."""
    return [row for values in found.values() for row in ratio_rows(values, [], [ratio])]


def evaluate_choices(
    work: Workspace,
    model: nn.Module,
    found: dict[str, dict[str, Tensor]],
    ratio: float,
    sampling: Sampling,
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """`evaluate` of `choice_rows`, with a column choice behind the key."""
    table, images = evaluate(work, model, choice_rows(found, ratio), sampling)
    table.insert(len(KEY), "choice", list(found))
    return table, images


def released_groups(model: nn.Module, fisher: dict[str, Tensor]) -> pd.DataFrame:
    """R5: a group's threshold is the mean of its squared weights; a tensor's score its mean Fisher
    value over the largest one.

    One row per group: the threshold, the lowest and highest score, and how many of its tensors the
    rule keeps.
    """
    means = {n: f.mean().item() for n, f in fisher.items()}
    scores = {n: m / max(means.values()) for n, m in means.items()}
    rows = []
    for group, layers in GROUPS.items():
        weights = {n: w for n, w in quantizable(model).items() if layer_of(n) in layers}
        tau = torch.cat([w.flatten() for w in weights.values()]).square().mean().item()
        own = [scores[n] for n in weights]
        rows.append((group, tau, min(own), max(own), sum(s >= tau for s in own), len(own)))
    return pd.DataFrame(
        rows, columns=["group", "tau", "lowest_score", "highest_score", "tensors_kept", "tensors"]
    )


@torch.no_grad()
def clamped(model: UNet, fisher: dict[str, Tensor], k: float) -> tuple[UNet, pd.DataFrame]:
    """R5: the mean/std rule limits the weights themselves to mean -+ k * std of their layer's
    Fisher values.

    Returns a copy so treated, and by layer the limits and the share of its weights that they
    change.
    """
    result, rows = copy.deepcopy(model), []
    parameters = dict(result.named_parameters())
    for layer, parts in _by_layer(fisher).items():
        values = torch.cat([f.flatten() for f in parts.values()]).double()
        low, high = (
            (values.mean() - k * values.std()).item(),
            (values.mean() + k * values.std()).item(),
        )
        weights = [parameters[n] for n in parts]
        outside = sum(int(((w < low) | (w > high)).sum()) for w in weights)
        rows.append((layer, low, high, outside / sum(w.numel() for w in weights)))
        for w in weights:
            w.clamp_(low, high)
    return result, pd.DataFrame(rows, columns=["layer", "low", "high", "weights_changed"])


def clamped_losses(model: UNet, limited: UNet, seed: int) -> pd.DataFrame:
    """One row: the denoising loss on held-out digits as trained and with limited weights."""
    models = {"as trained": model, "limited": limited}
    return pd.DataFrame(
        [{name: training.held_out_losses(m, seed).mean().item() for name, m in models.items()}]
    )


def _by_layer(values: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        layers.setdefault(layer_of(name), {})[name] = value
    return layers


def _flat(layer: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([v.flatten().cpu() for v in layer.values()]).numpy()


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    constant = a.min() == a.max() or b.min() == b.max()  # scipy warns, and gives the same NaN
    return math.nan if constant else float(spearmanr(a, b).statistic)


SMALL_REFERENCE = 500


def stretched(images: Tensor) -> Tensor:
    """Every uint8 image (N, 1, 32, 32) stretched on its own to 0..255, as the released code does
    before FID.
    """
    values = images.float()
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    return ((values - low) / (high - low).clamp_min(1) * 255).round().to(torch.uint8)


def digits_of_two_sizes(extractor: FeatureExtractor) -> tuple[Reference, Reference]:
    """For R6: the references of the same few digits, 32x32 as they are here, and 28x28."""
    few = extractor.reference.features[:SMALL_REFERENCE]
    digits = unpadded(mnist(train=False)[0][REFERENCE][: len(few)])
    return Reference(few), Reference(extractor.features(digits).features)


def measure_protocol(
    work: Workspace, model: nn.Module, sampling: Sampling, inception_reference: int
) -> pd.DataFrame:
    """`protocol_choices` for uniform INT8 of a model, from the noise of the sampling's seed and of
    the next one.
    """
    int8 = dequantize_(quantize(model, uniform_rows(model, ("int8",))[0].plan))
    other = sampling._replace(seed=sampling.seed + 1)
    drawn = [
        ImageStore(work).draw(m, s).images
        for m, s in ((model, sampling), (int8, sampling), (int8, other))
    ]
    extractors, sizes = {"MNIST": mnist_extractor()}, {}
    if inception := inception_extractor(inception_reference):
        extractors["Inception"] = inception
        sizes["Inception"] = digits_of_two_sizes(inception)
    return protocol_choices(extractors, sizes, *drawn, sampling.seed)


def protocol_choices(
    extractors: dict[str, FeatureExtractor],
    sizes: dict[str, tuple[Reference, Reference]],
    unquantized: Tensor,
    quantized: Tensor,
    other_noise: Tensor,
    seed: int,
) -> pd.DataFrame:
    """One row per choice: a FID, or difference of FIDs, as here and as in the released code; what
    it changes, with 95 % interval.

    sizes: for R6, references of fewer digits as they are here and as 28x28, by extractor.
    unquantized, quantized: images from the same noise; other_noise: images of the quantized model
    from noise of another seed, which has no pairs to resample: that row stands without an interval.
    """
    # The images as they are come first, then their resamples.
    indices = torch.cat(
        [torch.arange(len(unquantized))[None], metrics.resamples(len(unquantized), seed)]
    )
    rows = []
    for name, extractor in extractors.items():
        seen, of_stretched, of_int8, of_other = (
            extractor.features(images).features
            for images in (unquantized, stretched(unquantized), quantized, other_noise)
        )
        plain, altered, int8 = (
            metrics.fid_draws(features, extractor.reference, indices)
            for features in (seen, of_stretched, of_int8)
        )
        rows.append((name, "FID, each image stretched to 0..255", plain, altered))
        if name in sizes:
            here, released = (
                metrics.fid_draws(seen, reference, indices) for reference in sizes[name]
            )
            count = len(sizes[name][0].features)
            rows.append((name, f"FID, real digits 28x28 (R6; {count} of them)", here, released))
        rise, other = int8 - plain, metrics.fid_draws(of_other, extractor.reference, indices[:1])
        ema = "FID of INT8 minus FP32 (R1: images from the EMA weights)"
        rows.append((name, ema, rise, torch.zeros_like(rise)))
        noise = "FID of INT8 minus FP32, other noise in each row (R7)"
        rows.append((name, noise, rise[:1], other - plain[:1]))
    found = [(name, choice, *_change(here, released)) for name, choice, here, released in rows]
    return pd.DataFrame(
        found,
        columns=["features", "choice", "here", "released", "change", "change_low", "change_high"],
    )


def _change(here: Tensor, released: Tensor) -> tuple[float, float, float, float, float]:
    """Both values (first in each), their difference, and its interval where there are resamples."""
    difference = released - here
    ends = (
        metrics.interval(difference[0].item(), difference[1:])
        if len(difference) > 1
        else (math.nan, math.nan)
    )
    return here[0].item(), released[0].item(), difference[0].item(), *ends
