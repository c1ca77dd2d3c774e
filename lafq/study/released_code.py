"""What the released code's choices move (07_audit), each taken alone: in the Fisher values, in the
weights that they keep, and in the way of scoring images. Our own writing of the authors' code.
"""

import copy

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from lafq.quantization.model import dequantize_, quantize
from lafq.quantization.plan import make_plan
from lafq.study.diffusion import subject
from lafq.study.diffusion.ddpm import ALPHA_BAR, unit_interval
from lafq.study.diffusion.subject import LAYERS, UNet, layer_of, mnist, quantizable
from lafq.study.diffusion.training import held_out_losses
from lafq.study.fisher_by_timestep import fisher_by_timestep
from lafq.study.images import metrics
from lafq.study.images.evaluate import evaluate
from lafq.study.images.features import FeatureExtractor, inception_extractor, mnist_extractor
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.rows import KEY, keep_ratio, ratio_rows
from lafq.study.workspace import Workspace

OURS, SMALL_REFERENCE = "this project", 500
Choices = dict[str, dict[str, Tensor]]


def fresh_network(model: UNet, seed: int) -> UNet:
    """A network of the same shape as it is before training (R2)."""
    torch.manual_seed(seed)
    return UNet(model.width).eval().to(next(model.parameters()).device)


def reconstruction_fisher(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Squared gradient of the mean of (model(z, 1) - z)^2 for one image, batch 1 (R3); z is the
    noise-free sqrt(abar_1) * x0 of the image, our reading of "a noise-free trajectory".
    """
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    z = ALPHA_BAR[1].sqrt().float() * unit_interval(image[None]).to(next(model.parameters()).device)
    t = torch.ones(1, dtype=torch.int64, device=z.device)
    gradient = grad(lambda p: (functional_call(model, p, (z, t)) - z).square().mean())(parameters)
    return {n: gradient[n].square() for n in quantizable(model)}


def variants(
    model: UNet, fisher: dict[str, Tensor], images: Tensor, samples: int, seed: int
) -> Choices:
    """Fisher values (on the CPU) under each choice alone, the project's own first."""
    names, fresh = list(quantizable(model)), fresh_network(model, seed)
    untrained = fisher_by_timestep(fresh, names, images, samples=samples, bins=20, seed=seed)
    single = fisher_by_timestep(model, names, images, samples=1, bins=1, seed=seed)
    choices = {
        OURS: fisher,
        "untrained network (R2)": untrained.by_weight,
        "loss against the input, one image, t = 1 (R3)": reconstruction_fisher(model, images[0]),
        "one sample instead of many": single.by_weight,
        "weight tensor as the unit (R4)": _by_tensor(fisher),
        "all of these, as released": _by_tensor(reconstruction_fisher(fresh, images[0])),
    }
    return {choice: {n: f.cpu() for n, f in values.items()} for choice, values in choices.items()}


def _by_tensor(fisher: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: f.mean().expand_as(f) for n, f in fisher.items()}


def rank_table(choices: Choices) -> pd.DataFrame:
    """Spearman's rank correlation of every choice with ours by layer (NaN: all values equal)."""
    table = {}
    for layer in LAYERS:
        names = [n for n in choices[OURS] if layer_of(n) == layer]
        flat = {c: torch.cat([v[n].flatten() for n in names]) for c, v in choices.items()}
        table[layer] = pd.DataFrame({c: v.numpy() for c, v in flat.items()}).corr("spearman")[OURS]
    return pd.DataFrame(table).rename_axis("choice").reset_index()


def kept_in_common(ours: dict[str, Tensor], other: dict[str, Tensor], ratio: float) -> float:
    """Of the weights that the ratio rule keeps by our values, the share kept by the others too."""
    first, second = keep_ratio(ours, ratio), keep_ratio(other, ratio)
    both = sum((kept & second[n]).sum().item() for n, kept in first.items())
    return both / sum(kept.sum().item() for kept in first.values())


def fisher_choices(model: UNet, choices: Choices, ratio: float, seed: int) -> pd.DataFrame:
    """One row per choice: mean rank correlation with ours over the layers, kept weights in common,
    and the rise of the held-out loss under the ratio rule in INT8 and INT4, with 95 % interval.
    """
    ranks = rank_table(choices).set_index("choice")
    table = pd.DataFrame({"rank_correlation": ranks.mean(axis=1)}).reset_index()
    table["kept_in_common"] = [kept_in_common(choices[OURS], v, ratio) for v in choices.values()]
    losses = held_out_losses(model, seed)
    indices = metrics.resamples(len(losses), seed)
    for low in ("int8", "int4"):
        rises = []
        for values in choices.values():
            small = dequantize_(quantize(model, make_plan(keep_ratio(values, ratio), low)))
            rise = held_out_losses(small, seed) - losses
            draws = metrics.mean_draws(rise, indices)
            rises.append(metrics.with_interval(f"delta_loss_{low}", rise.mean().item(), draws))
        table = table.join(pd.DataFrame(rises))
    return table


def evaluate_choices(
    work: Workspace, model: nn.Module, choices: Choices, ratio: float, sampling: Sampling
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """`evaluate` of the ratio rule in INT8 on every choice, with a column choice after the key."""
    rows = [row for values in choices.values() for row in ratio_rows(values, [ratio])]
    table, images = evaluate(work, model, rows, sampling)
    table.insert(len(KEY), "choice", list(choices))
    return table, images


def released_groups(model: nn.Module, fisher: dict[str, Tensor]) -> pd.DataFrame:
    """R5: a group's tau is its mean squared weight, a tensor's score mean F over the largest."""
    means, rows = pd.Series({n: f.mean().item() for n, f in fisher.items()}), []
    for group, layers in subject.GROUPS.items():
        weights = {n: w for n, w in quantizable(model).items() if layer_of(n) in layers}
        tau = torch.cat([w.flatten() for w in weights.values()]).square().mean().item()
        scores = (means / means.max())[list(weights)]
        rows.append((group, tau, scores.min(), scores.max(), (scores >= tau).sum(), len(scores)))
    columns = ["group", "tau", "lowest_score", "highest_score", "tensors_kept", "tensors"]
    return pd.DataFrame(rows, columns=columns)


@torch.no_grad()
def clamped(model: UNet, fisher: dict[str, Tensor], k: float) -> tuple[UNet, pd.DataFrame]:
    """R5: a copy whose weights are limited to mean -+ k * std of their layer's Fisher values; by
    layer the limits, and the share of its weights that they change.
    """
    result, rows = copy.deepcopy(model), []
    weights = quantizable(result)
    for layer in LAYERS:
        names = [n for n in fisher if layer_of(n) == layer]
        values = torch.cat([fisher[n].flatten() for n in names]).double()
        mean, std = values.mean().item(), values.std().item()
        low, high = mean - k * std, mean + k * std
        before = torch.cat([weights[n].flatten() for n in names])
        changed = ((before < low) | (before > high)).double().mean().item()
        rows.append({"layer": layer, "low": low, "high": high, "weights_changed": changed})
        for n in names:
            weights[n].clamp_(low, high)
    return result, pd.DataFrame(rows)


def clamped_losses(model: UNet, limited: UNet, seed: int) -> pd.DataFrame:
    """One row: the denoising loss on held-out digits as trained and with limited weights."""
    losses = [held_out_losses(m, seed).mean().item() for m in (model, limited)]
    return pd.DataFrame([losses], columns=["as trained", "limited"])


def stretched(images: Tensor) -> Tensor:
    """Every uint8 image (N, 1, 32, 32) on its own to 0..255, as in the released code before FID."""
    values = images.float()
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    return ((values - low) / (high - low).clamp_min(1) * 255).round().to(torch.uint8)


def measure_protocol(
    work: Workspace, model: nn.Module, sampling: Sampling, inception_reference: int
) -> pd.DataFrame:
    """`protocol_choices` of uniform INT8 on MNIST and Inception features, the latter with R6."""
    store, seed = ImageStore(work), sampling.seed
    int8 = dequantize_(quantize(model, dict.fromkeys(quantizable(model), "int8")))
    draws = (model, sampling), (int8, sampling), (int8, sampling._replace(seed=seed + 1))
    drawn = [store.draw(*draw).images for draw in draws]
    tables = {"MNIST": protocol_choices(mnist_extractor(), *drawn, seed)}
    if inception := inception_extractor(inception_reference):
        digits = mnist(train=False)[0][subject.REFERENCE][:SMALL_REFERENCE]
        both = (inception.features(x).features for x in (digits, subject.unpadded(digits)))
        sizes = tuple(map(metrics.Reference, both))
        tables["Inception"] = protocol_choices(inception, *drawn, seed, sizes)
    return pd.concat(tables, names=["features"]).reset_index("features")


def protocol_choices(
    extractor: FeatureExtractor,
    unquantized: Tensor,
    quantized: Tensor,
    other_noise: Tensor,
    seed: int,
    sizes: tuple[metrics.Reference, metrics.Reference] | None = None,
) -> pd.DataFrame:
    """One row per choice: a FID, or difference of FIDs, as here and as in the released code; what
    it changes, with 95 % interval.

    unquantized, quantized: images from the same noise; other_noise: of the quantized model, from
    another seed's. sizes: for R6, references of the same few digits, as here and as 28x28.
    """
    count = len(unquantized)
    # The images as they are come first, then their resamples.
    indices = torch.cat([torch.arange(count)[None], metrics.resamples(count, seed)])

    def fid(images: Tensor, reference: metrics.Reference = extractor.reference) -> Tensor:
        return metrics.fid_draws(extractor.features(images).features, reference, indices)

    here = fid(unquantized)
    name, rise = "FID of INT8 minus FP32", fid(quantized) - here
    choices = {"FID, each image stretched to 0..255": (here, fid(stretched(unquantized)))}
    if sizes:
        both = tuple(fid(unquantized, reference) for reference in sizes)
        choices[f"FID, real digits 28x28 (R6; {len(sizes[0].features)} of them)"] = both
    choices[f"{name} (R1: images from the EMA weights)"] = rise, torch.zeros_like(rise)
    other = fid(other_noise) - here
    other[1:] = torch.nan  # without pairs there is nothing to resample
    choices[f"{name}, other noise in each row (R7)"] = rise, other
    rows = []
    for choice, (ours, released) in choices.items():
        change = released - ours
        row = {"choice": choice, "here": ours[0].item(), "released": released[0].item()}
        rows.append(row | metrics.with_interval("change", change[0].item(), change[1:]))
    return pd.DataFrame(rows)
