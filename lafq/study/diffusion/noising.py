"""The noise schedule, and noised digits in batches.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, with beta_t linear from 1e-4 to 0.02 over 1,000 steps
(Ho et al. 2020).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from lafq.rng import generator
from lafq.study.diffusion.unet import TIMESTEPS

BETAS = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)
ALPHA_BAR = torch.cumprod(1 - BETAS, dim=0)
BATCH = 8


def unit_interval(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [0, 1], the model's range; ValueError for images of another dtype."""
    if images.dtype != torch.uint8:
        raise ValueError(
            f"images must be uint8 (0 to 255), these are {images.dtype}: convert them first"
        )
    return images.float() / 255


def add_noise(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """q(x_t | x_0): x0 and noise (B, 1, 32, 32), t (B,) -> x_t (B, 1, 32, 32)."""
    abar = ALPHA_BAR.to(x0)[t].view(-1, 1, 1, 1)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def noised_batches(
    images: Tensor, samples: int, seed: int, batch: int = BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    """(x_t, t) of `samples` uint8 images (N, 1, 32, 32), drawn with replacement, t spread evenly
    over all timesteps.
    """
    g = generator(seed)
    times = (torch.arange(samples) * TIMESTEPS // samples)[torch.randperm(samples, generator=g)]
    for t in tqdm(times.split(batch), desc="noised digits", unit="batch", leave=False):
        x0 = unit_interval(images[torch.randint(len(images), t.shape, generator=g)])
        yield add_noise(x0, t, torch.randn(x0.shape, generator=g)), t


def bin_edges(bins: int) -> list[int]:
    """The first timestep of each of `bins` bins of consecutive timesteps, and 1,000 behind them."""
    return [round(b * TIMESTEPS / bins) for b in range(bins + 1)]


def stratified_batches(
    images: Tensor, samples: int, bins: int, seed: int, like: Tensor
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """((x_t, t), noise) of every timestep bin: `samples` draws spread evenly over the bins, t
    uniform within its bin.

    images: uint8 (N, 1, 32, 32), drawn from with replacement. like: a tensor of the device and
    dtype wanted. Raises ValueError for fewer samples than bins, or a number of bins out of range.
    """
    if not 1 <= bins <= TIMESTEPS or samples < bins:
        raise ValueError(
            f"{samples} samples over {bins} timestep bins: give every bin at least one sample"
        )
    edges = bin_edges(bins)

    def batches() -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        for b in tqdm(range(bins), desc="Fisher", unit="bin", leave=False):
            g, count = generator(seed, b), samples // bins + (b < samples % bins)
            t = torch.randint(edges[b], edges[b + 1], (count,), generator=g)
            x0 = unit_interval(images[torch.randint(len(images), (count,), generator=g)]).to(like)
            noise = torch.randn(x0.shape, generator=g, dtype=torch.float32).to(like)
            yield (add_noise(x0, t.to(like.device), noise), t.to(like.device)), noise

    return batches()
