"""The damage of quantization: how far a model's outputs on held-out digits move, with intervals."""

import math

from torch import Tensor, nn

from lafq.study.diffusion.training import held_out_outputs
from lafq.study.images.metrics import interval, mean_draws, resamples


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
    indices = resamples(len(errors), seed)
    paired = isinstance(reference, Tensor)
    value = (errors.mean() / (reference.mean() if paired else reference)).item()
    draws = mean_draws(errors, indices) / (mean_draws(reference, indices) if paired else reference)
    low, high = interval(math.log(value), draws.log())
    return value, math.exp(low), math.exp(high)


def output_mse(errors: Tensor, rise: float, seed: int) -> dict[str, float]:
    """`damage`, the mean of `output_errors` with its 95 % interval over the digits, and
    `delta_loss`.
    """
    value, low, high = ratio_of_means(errors, 1.0, seed)
    return {"damage": value, "damage_low": low, "damage_high": high, "delta_loss": rise}
