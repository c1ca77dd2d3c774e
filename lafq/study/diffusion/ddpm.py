"""DDPM (Ho et al. 2020): the noise schedule, noised images in batches, ancestral sampling.

q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, 1 - alpha_bar_t), where alpha_bar_t is the product of
1 - beta_0, ..., 1 - beta_t, and beta is linear from 1e-4 to 0.02 over 1,000 steps. Timestep t = 0
is the cleanest, t = 999 is almost pure noise.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lafq.networks import evaluating
from lafq.rng import generator
from lafq.study.diffusion.subject import SHAPE, TIMESTEPS

BETAS = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)
ALPHA_BAR = torch.cumprod(1 - BETAS, dim=0)
BATCH = 8


def unit_interval(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [0, 1], the model's range; ValueError for another dtype."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 (0 to 255), these are {images.dtype}: convert them")
    return images.float() / 255


def add_noise(x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """A draw from q(x_t | x_0): x_0 and the noise eps (B, ...), t (B,) -> x_t (B, ...)."""
    alpha_bar = ALPHA_BAR.to(x_0)[t].view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps


def noised_batches(
    images: Tensor, samples: int, seed: int, batch: int = BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    """(x_t, t) of `samples` uint8 images (N, ...), drawn with replacement; t evenly spread."""
    g = generator(seed)
    times = (torch.arange(samples) * TIMESTEPS // samples)[torch.randperm(samples, generator=g)]
    for t in tqdm(times.split(batch), "noised digits", leave=False):
        x_0 = unit_interval(images[torch.randint(len(images), t.shape, generator=g)])
        yield add_noise(x_0, t, torch.randn(x_0.shape, generator=g)), t


def bin_edges(bins: int) -> list[int]:
    """The first timestep of each of `bins` bins of consecutive timesteps, and 1,000 at the end."""
    return [round(b * TIMESTEPS / bins) for b in range(bins + 1)]


def stratified_batches(
    images: Tensor, samples: int, bins: int, seed: int, like: Tensor
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """((x_t, t), eps) of every timestep bin: `samples` draws of the uint8 images (N, ...), with
    replacement, spread evenly over the bins; t uniform within its bin.

    like: a tensor of the device and dtype wanted. Raises ValueError for a bin without a sample.
    """
    if not 1 <= bins <= TIMESTEPS or samples < bins:
        raise ValueError(f"{samples} samples over {bins} bins: give every bin one at least")
    edges = bin_edges(bins)
    for b in tqdm(range(bins), "Fisher", leave=False):
        g, count = generator(seed, b), samples // bins + (b < samples % bins)
        t = torch.randint(edges[b], edges[b + 1], (count,), generator=g).to(like.device)
        x_0 = unit_interval(images[torch.randint(len(images), (count,), generator=g)]).to(like)
        eps = torch.randn(x_0.shape, generator=g, dtype=torch.float32).to(like)
        yield (add_noise(x_0, t, eps), t), eps


def trailing_timesteps(steps: int) -> list[int]:
    """`steps` evenly spaced timesteps, the first always 999 (a "trailing" stride)."""
    if not 1 <= steps <= TIMESTEPS:
        raise ValueError(f"{steps} sampling steps asked for: choose 1 to {TIMESTEPS}")
    return (np.round(TIMESTEPS - np.arange(steps) * TIMESTEPS / steps).astype(int) - 1).tolist()


def ancestral_step(x_t: Tensor, eps: Tensor, z: Tensor, t: int, s: int) -> Tensor:
    """A draw x_s (B, ...) from p(x_s | x_t), s < t, with the posterior's variance and x_0 not
    clipped; x_{-1} is the image (Ho et al. 2020, algorithm 2, for a subset of the timesteps).
    """
    alpha_bar_t, alpha_bar_s = ALPHA_BAR[t].item(), ALPHA_BAR[s].item() if s >= 0 else 1.0
    alpha = alpha_bar_t / alpha_bar_s
    beta = 1 - alpha
    # Equation 15, then equation 7: mu and sigma of q(x_s | x_t, x_0).
    x_0 = (x_t - (1 - alpha_bar_t) ** 0.5 * eps) / alpha_bar_t**0.5
    mu = (alpha_bar_s**0.5 * beta * x_0 + alpha**0.5 * (1 - alpha_bar_s) * x_t) / (1 - alpha_bar_t)
    sigma = ((1 - alpha_bar_s) / (1 - alpha_bar_t) * beta) ** 0.5
    return mu + sigma * z


def ddim_step(x_t: Tensor, eps: Tensor, z: Tensor, t: int, s: int) -> Tensor:
    """x_s (B, ...) of the deterministic sampler, without the noise z (Song et al. 2021, "Denoising
    Diffusion Implicit Models", equation 12 with sigma = 0).
    """
    alpha_bar_t, alpha_bar_s = ALPHA_BAR[t].item(), ALPHA_BAR[s].item() if s >= 0 else 1.0
    x_0 = (x_t - (1 - alpha_bar_t) ** 0.5 * eps) / alpha_bar_t**0.5
    return alpha_bar_s**0.5 * x_0 + (1 - alpha_bar_s) ** 0.5 * eps


def sampler_noise(images: Iterable[int], steps: int, seed: int) -> Tensor:
    """The noise (B, steps, *SHAPE) of these images: the start, and what each step but the last
    adds.
    """
    return torch.stack([torch.randn((steps, *SHAPE), generator=generator(seed, i)) for i in images])


def reverse_process(
    model: Callable[..., Tensor], noise: Tensor, step: Callable[..., Tensor] = ancestral_step
) -> Iterator[tuple[int, Tensor]]:
    """The states (t, x_t) from t = 999 down, then the images (-1, x_{-1}), from `sampler_noise` on
    the model's device.
    """
    x_t, *z = noise.transpose(0, 1).contiguous()
    times = [*trailing_timesteps(noise.shape[1]), -1]
    for (t, s), z_t in zip(pairwise(times), [*z, torch.zeros_like(x_t)], strict=True):
        yield t, x_t
        eps = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
        x_t = step(x_t, eps, z_t, t, s)
    yield -1, x_t


def sampler(
    model: Callable[..., Tensor], noise: Tensor, step: Callable[..., Tensor] = ancestral_step
) -> Tensor:
    """The images (B, *SHAPE) of `reverse_process`, not clamped, with gradients: what
    `estimate_sensitivity` takes for `through`.
    """
    return deque(reverse_process(model, noise, step), maxlen=1)[0][1]


@torch.inference_mode()
def sample(
    model: nn.Module,
    images: int,
    steps: int,
    seed: int,
    batch_size: int = 100,
    label: str = "sampling",
    first: int = 0,
) -> Tensor:
    """The images first, ..., first + images - 1 of the model, uint8 (images, *SHAPE): clamped to
    [0, 1] and rounded; ValueError for no images, and for a number of steps out of range.

    Image i depends on (seed, i) alone, so that two models, or two batch sizes, see the same noise.
    The model's weights are put into channels-last order, in place; their values stay.
    """
    if images < 1:
        raise ValueError(f"{images} images asked for: at least one is needed")
    trailing_timesteps(steps)  # its error comes before the progress bar
    model = model.to(memory_format=torch.channels_last)
    batches, pixels = torch.arange(first, first + images).split(batch_size), []
    bar = tqdm(total=len(batches) * steps, desc=label, unit="step", leave=False)
    with evaluating(model), bar:
        for batch in batches:
            noise = sampler_noise(batch.tolist(), steps, seed)
            for t, x_t in reverse_process(model, noise.to(next(model.parameters()).device)):
                bar.update(t >= 0)
                if t < 0:
                    pixels.append((x_t.clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    return torch.cat(pixels)
