"""The Fisher information of the diffusion model by weight tensor, timestep and block of samples
(02_fisher): empirical, on noised digits; and Monte Carlo, on noised digits and on the states that
the model's own reverse process visits.
"""

from bisect import bisect
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from lafq.fisher.empirical import empirical_fisher
from lafq.fisher.sensitivity import estimate_sensitivity
from lafq.study.diffusion import ddpm
from lafq.study.diffusion.subject import TIMESTEPS, UNet, layer_of

BLOCKS = 10  # of the samples of every bin
COLUMNS = ["parameter", "layer", "weights", "t_low", "t_high", "fisher"]
BLOCK_COLUMNS = ["parameter", "t_low", "block", "samples", "fisher"]


class Fisher(NamedTuple):
    """by_weight: F of every weight, by parameter name, in the parameter's shape.

    timesteps: mean F of a tensor in a timestep bin; COLUMNS, weights is their number in the tensor.
    blocks: the same by block of samples, which intervals resample; BLOCK_COLUMNS.
    """

    by_weight: dict[str, Tensor]
    timesteps: pd.DataFrame
    blocks: pd.DataFrame


def fisher_by_timestep(
    model: UNet, names: list[str], images: Tensor, *, samples: int, bins: int, seed: int
) -> Fisher:
    """`empirical_fisher` of the noise prediction on uint8 images (N, 1, 32, 32), drawn as by
    `ddpm.stratified_batches`; errors as of both.
    """
    batches = ddpm.stratified_batches(images, samples, bins, seed, next(model.parameters()))
    fisher, edges = empirical_fisher(model, names, batches), ddpm.bin_edges(bins)
    timesteps = [
        (name, layer_of(name), fisher.by_weight[name].numel(), low, high - 1, mean)
        for (low, high), means in zip(pairwise(edges), fisher.by_batch, strict=True)
        for name, mean in means.items()
    ]
    blocks = [
        (name, low, block, len(part), part.mean().item())
        for low, of_bin in zip(edges[:-1], fisher.by_sample, strict=True)
        for name, values in of_bin.items()
        for block, part in enumerate(values.tensor_split(BLOCKS))
        if len(part)
    ]
    tables = pd.DataFrame(timesteps, columns=COLUMNS), pd.DataFrame(blocks, columns=BLOCK_COLUMNS)
    return Fisher(fisher.by_weight, *tables)


def fisher_kinds(
    model: UNet, names: list[str], images: Tensor, *, samples: int, bins: int, seed: int, steps: int
) -> pd.DataFrame:
    """Mean Monte Carlo Fisher value by kind of input, tensor, bin and block (one backward pass).

    Of noised digits `samples` draws, spread evenly over the bins; of the reverse process, of
    `steps` sampling steps, as many images at one timestep of each bin that it visits.
    """
    batches = ddpm.stratified_batches(images, samples, bins, seed, next(model.parameters()))
    states, rows = _reverse_states(model, max(1, samples // bins), bins, seed, steps), []
    sources = {
        "Monte Carlo, noised digits": (x_and_t for x_and_t, _ in batches),
        "Monte Carlo, states of the reverse process": states,
    }
    for kind, source in sources.items():
        for x, t in source:
            t_low = max(edge for edge in ddpm.bin_edges(bins) if edge <= t.min())
            parts = zip(x.tensor_split(BLOCKS), t.tensor_split(BLOCKS), strict=True)
            for block, part in enumerate(p for p in parts if len(p[0])):
                block_seed = (seed * TIMESTEPS + t_low) * BLOCKS + block
                known = estimate_sensitivity(model, [part], block_seed, names, curvature=False)
                rows += [
                    (kind, name, t_low, block, len(part[0]), f.mean().item())
                    for name, f in known.fisher.items()
                ]
    return pd.DataFrame(rows, columns=["kind", *BLOCK_COLUMNS])


@torch.no_grad()
def _reverse_states(
    model: UNet, images: int, bins: int, seed: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(x_t, t) at the last timestep that the reverse process visits in each bin."""
    last = {bisect(ddpm.bin_edges(bins), t): t for t in ddpm.trailing_timesteps(steps)}
    noise = ddpm.sampler_noise(range(images), steps, seed).to(next(model.parameters()).device)
    for t, x in tqdm(ddpm.reverse_process(model, noise), "reverse process", steps + 1, leave=False):
        if t in last.values():
            yield x, torch.full((len(x),), t, device=x.device)


def by_layer(timesteps: pd.DataFrame) -> pd.DataFrame:
    """Weights, mean_fisher per weight and share_of_all of the Fisher trace, of every layer."""
    traced = timesteps.assign(trace=timesteps["fisher"] * timesteps["weights"])
    total = traced.groupby("layer")[["weights", "trace"]].sum()
    table = pd.DataFrame({"weights": total["weights"] // timesteps["t_low"].nunique()})
    table["mean_fisher"] = total["trace"] / total["weights"]
    table["share_of_all"] = total["trace"] / total["trace"].sum()
    return table.reset_index()
