"""Scores of generated images with error bars, alone and against the FP32 model's images from the
same noise.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lafq.networks import evaluating
from lafq.rng import generator
from lafq.study.diffusion.ddpm import add_noise, unit_interval
from lafq.study.diffusion.mnist import HELD_OUT, mnist
from lafq.study.diffusion.unet import TIMESTEPS
from lafq.study.images import bootstrap, classifier, metrics
from lafq.study.images.metrics import Reference

METRICS = ("fid_mnist", "is_mnist", "kid_mnist", "fid_inception", "is_inception", "kid_inception")
Features = tuple[Tensor, Tensor | None]
LOSS_DIGITS = 200


class Scored(NamedTuple):
    """Metrics of one set of images, and their bootstrap draws (count,)."""

    values: dict[str, float]
    draws: dict[str, Tensor]


def make_scorer(
    images: int, seed: int, inception: Reference | None
) -> Callable[[Tensor, Features | None], Scored]:
    """A function that scores uint8 images (N, 1, 32, 32) and, where given, what
    `metrics.inception_features` gives of them.

    Every call takes the same resamples of the N image indices. inception: the reference of the
    Inception features.
    """
    network = classifier.load()
    reference = metrics.mnist_reference(network)
    indices = bootstrap.resamples(images, seed)
    fid, kid = (
        bootstrap.fid_bootstrap(reference, indices),
        bootstrap.kid_bootstrap(reference, indices),
    )
    inception_score = bootstrap.inception_score_bootstrap(indices)
    # The images as they are come first. torch-fidelity's own FID takes some 10 s in 2,048
    # dimensions; a test holds this against it.
    as_they_are = torch.cat([torch.arange(images)[None], indices])
    fid_inception = bootstrap.fid_bootstrap(inception, as_they_are) if inception else None
    kid_inception = bootstrap.kid_bootstrap(inception, indices) if inception else None

    def score(generated: Tensor, on_inception: Features | None = None) -> Scored:
        seen, logits = metrics.mnist_features(network, generated)
        draws = {
            "fid_mnist": fid(seen),
            "is_mnist": inception_score(logits),
            "kid_mnist": kid(seen),
        }
        values = metrics.mnist_metrics(seen, logits, reference)
        if on_inception is not None:
            features, logits = on_inception
            found = fid_inception(features)
            values["fid_inception"], draws["fid_inception"] = found[0].item(), found[1:]
            values["kid_inception"], draws["kid_inception"] = (
                metrics.kid(features, inception),
                kid_inception(features),
            )
            if logits is not None:
                values["is_inception"], draws["is_inception"] = (
                    metrics.inception_score(logits),
                    inception_score(logits),
                )
        return Scored(values, draws)

    return score


def against_baseline(scored: Scored, baseline: Scored) -> dict[str, float]:
    """The columns of a row: for every metric the value, its difference from the baseline's, and
    both 95 % intervals.
    """
    row = {}
    for metric in METRICS:
        nothing = metric not in scored.values
        value, draws = (
            scored.values.get(metric, float("nan")),
            scored.draws.get(metric, torch.full((2,), float("nan"))),
        )
        delta = float("nan") if nothing else value - baseline.values[metric]
        paired = draws if nothing else draws - baseline.draws[metric]
        row |= _columns(metric, value, draws) | _columns(f"delta_{metric}", delta, paired)
    return row


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
    off = (unit_interval(generated) - unit_interval(unquantized)).square().flatten(1).mean(1)
    network = classifier.load()
    digits = [
        metrics.mnist_features(network, images)[1].argmax(1) for images in (generated, unquantized)
    ]
    rise = losses - baseline
    draws = bootstrap.mean_bootstrap(bootstrap.resamples(len(rise), seed))(rise)
    return {
        "rmse": off.sqrt().mean().item(),
        "psnr": -10 * off.mean().log10().item(),
        "class_changed": (digits[0] != digits[1]).float().mean().item(),
        **_columns("delta_loss", rise.mean().item(), draws),
    }


@torch.inference_mode()
def held_out_outputs(
    model: nn.Module, seed: int, digits: int = LOSS_DIGITS, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Predicted and true noise (digits, 1, 32, 32) of so many held-out digits from number `first`
    on.

    The timesteps are spread evenly over all of them, one per digit; the noise is that of the seed,
    whatever the model.
    """
    device = next(model.parameters()).device
    x0 = unit_interval(mnist(train=False)[0][HELD_OUT][first : first + digits])
    t = torch.arange(digits) * TIMESTEPS // digits
    noise = torch.randn(x0.shape, generator=generator(seed, HELD_OUT.start + first))
    noised = add_noise(x0, t, noise)
    batches = zip(noised.split(100), t.split(100), strict=True)
    with evaluating(model):
        outputs = [
            model(
                x.to(device).contiguous(memory_format=torch.channels_last), steps.to(device)
            ).cpu()
            for x, steps in batches
        ]
    return torch.cat(outputs), noise


def held_out_losses(model: nn.Module, seed: int, digits: int = LOSS_DIGITS) -> Tensor:
    """Denoising loss of each of the first held-out digits (digits,): mean over the pixels of (eps -
    eps_theta)^2.
    """
    predicted, noise = held_out_outputs(model, seed, digits)
    return (predicted - noise).square().flatten(1).mean(1)


def output_errors(
    model: nn.Module, outputs: tuple[Tensor, Tensor], seed: int, first: int = 0
) -> tuple[Tensor, float]:
    """Mean squared difference per pixel of a model's output from the unquantized model's, for each
    held-out digit (digits,), and the rise of the denoising loss.

    outputs: the unquantized model's, as `held_out_outputs` gives them for the same seed and first
    digit.
    """
    expected, noise = outputs
    predicted, _ = held_out_outputs(model, seed, len(noise), first)
    rise = (predicted - noise).square().mean() - (expected - noise).square().mean()
    return (predicted - expected).square().flatten(1).mean(1), rise.item()


def ratio_of_means(
    errors: Tensor, reference: Tensor | float, seed: int
) -> tuple[float, float, float]:
    """Mean error over the mean of a reference, with its 95 % interval: a bootstrap over the digits,
    paired, of the logarithm.

    A few digits have most of the error, and on the ratio's own scale the interval reaches below
    zero.
    """
    if not errors.any():
        return 0.0, 0.0, 0.0
    mean = bootstrap.mean_bootstrap(bootstrap.resamples(len(errors), seed))
    over, draws = (
        (reference.mean(), mean(reference))
        if isinstance(reference, Tensor)
        else (reference, reference)
    )
    value, draws = (errors.mean() / over).item(), mean(errors) / draws
    low, high = bootstrap.interval(math.log(value), draws.log())
    return value, math.exp(low), math.exp(high)


def output_mse(errors: Tensor, rise: float, seed: int) -> dict[str, float]:
    """`damage`, the mean of `output_errors` with its 95 % interval over the digits, and
    `delta_loss`.
    """
    value, low, high = ratio_of_means(errors, 1.0, seed)
    return {"damage": value, "damage_low": low, "damage_high": high, "delta_loss": rise}


def _columns(name: str, value: float, draws: Tensor) -> dict[str, float]:
    low, high = bootstrap.interval(value, draws)
    return {name: value, f"{name}_low": low, f"{name}_high": high}
