"""DDPM: ancestral sampling with per-image noise (Ho et al. 2020); the noise schedule is in
`noising`.

Timestep t = 0 is the cleanest, t = 999 is almost pure noise.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lafq.networks import evaluating
from lafq.rng import generator
from lafq.study.diffusion.noising import ALPHA_BAR
from lafq.study.diffusion.unet import TIMESTEPS


def trailing_timesteps(steps: int) -> list[int]:
    """`steps` timesteps from 999 down, evenly spaced, the first always 999 (a "trailing" stride)."""
    if not 1 <= steps <= TIMESTEPS:
        raise ValueError(f"{steps} sampling steps asked for: choose 1 to {TIMESTEPS}")
    return (np.round(TIMESTEPS - np.arange(steps) * TIMESTEPS / steps).astype(int) - 1).tolist()


def ancestral_step(x: Tensor, eps: Tensor, noise: Tensor, t: int, t_next: int) -> Tensor:
    """One draw from p(x_{t_next} | x_t), posterior variance, x0 not clipped; t_next = -1 ends the
    chain (no noise).

    Source: Ho et al. 2020, equations 6, 7 and 15, for a strided subset of the timesteps. All
    tensors (B, 1, 32, 32).
    """
    abar, abar_next = ALPHA_BAR[t].item(), ALPHA_BAR[t_next].item() if t_next >= 0 else 1.0
    alpha = abar / abar_next
    x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
    mean = (abar_next**0.5 * (1 - alpha) * x0 + alpha**0.5 * (1 - abar_next) * x) / (1 - abar)
    variance = (1 - abar_next) / (1 - abar) * (1 - alpha)
    return mean + variance**0.5 * noise


def reverse_process(
    model: nn.Module, streams: list[torch.Generator], steps: int
) -> Iterator[tuple[int, Tensor]]:
    """The states of the reverse process: (t, x_t) for each of `steps` timesteps from 999 down, then
    (-1, x_0).

    streams: one CPU generator per image, which gives its start and its noise. x_t: (images, 1, 32,
    32), on the model's device. Raises ValueError for a number of steps out of range.
    """
    timesteps, device = trailing_timesteps(steps), next(model.parameters()).device

    def draw() -> Tensor:
        return torch.stack([torch.randn(1, 32, 32, generator=g) for g in streams]).to(device)

    x = draw()
    for t, t_next in zip(timesteps, [*timesteps[1:], -1], strict=True):
        yield t, x
        with torch.no_grad():
            eps = model(x, torch.full((len(x),), t, device=device))
        x = ancestral_step(x, eps, draw() if t_next >= 0 else torch.zeros_like(x), t, t_next)
    yield -1, x


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
    """Generate the images first, ..., first + images - 1 from the model as it is (pass the EMA
    weights).

    Image i depends on (seed, i) alone, so that two models, or two batch sizes, see the same noise.
    `label` stands beside the progress bar. The model's weights are put into channels-last order, in
    place; their values stay. Returns uint8 (images, 1, 32, 32): clamped to [0, 1] and rounded.
    Raises ValueError for no images, and the errors of `reverse_process`.
    """
    if images < 1:
        raise ValueError(f"{images} images asked for: at least one is needed")
    model = model.to(memory_format=torch.channels_last)
    batches, done = range(first, first + images, batch_size), []
    trailing_timesteps(steps)  # raises for a wrong number of steps before the progress bar opens
    with (
        evaluating(model),
        tqdm(total=len(batches) * steps, desc=label, unit="step", leave=False) as bar,
    ):
        for start in batches:
            streams = [
                generator(seed, i) for i in range(start, min(start + batch_size, first + images))
            ]
            for t, x in reverse_process(model, streams, steps):
                bar.update(t >= 0)
                last = x
            done.append((last.clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    return torch.cat(done)
